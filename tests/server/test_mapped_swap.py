"""A swap of a mapped version of 64 MiB takes no private memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import IS_EMBEDDED, ServerFactory
from places import SUPPORT

from spikeless.disk import proc
from spikeless.formats.states import State
from spikeless.mapping import MapSettings
from spikeless.repository import publishing
from spikeless.repository.gates import GateSettings
from spikeless.sidecars.exporter import Exporter, ExporterSettings

MAKE = SUPPORT / "mapping_models.py"
SIZE = (1 << 18) * 64 * 4
PAGE = 4096


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model"
    command = [sys.executable, str(MAKE), "--large", "references", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    return path


@pytest.mark.parametrize("mapped", [False, True], ids=["stock", "mapped"])
def test_what_a_swap_takes(serve: ServerFactory, saved_model: Path, tmp_path: Path, mapped: bool) -> None:
    models = tmp_path / "models"
    mapping = MapSettings(verify=False) if mapped else None
    gates = GateSettings(mapping=mapping, load=False).pipeline()
    publishing.publish(saved_model, models, "m", gates=gates)
    inputs = {"ids": np.arange(40, dtype=np.int32).reshape(10, 4)}
    # As in the images: oneDNN's own pool gives nothing back.
    environment = {"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1"}
    with serve(model_name="m", model_base_path=models / "m", environment=environment) as running:
        first = running.client.predict("m", inputs)
        pid = running.server.pid
        # TensorFlow Serving's first swap takes memory for its threads, which it keeps.
        publishing.publish(saved_model, models, "m", gates=gates)
        running.wait("m", {1: State.END, 2: State.AVAILABLE})
        running.client.predict("m", inputs)
        faults_before, private_before = proc.counters(pid).minor_faults, proc.private_memory(pid)
        publishing.publish(saved_model, models, "m", gates=gates)
        running.wait("m", {2: State.END, 3: State.AVAILABLE})
        second = running.client.predict("m", inputs)
        taken = (proc.counters(pid).minor_faults - faults_before) * PAGE
        assert np.array_equal(first["rows"], second["rows"])
        assert proc.private_memory(pid) < private_before + SIZE / 8, "the old version's memory is given back"
        if mapped:
            # Not even for a moment: what was freed again would have been given before.
            # The threads that TensorFlow Serving starts take up to 19 MiB.
            assert taken < (SIZE / 4 if IS_EMBEDDED else SIZE / 2)
        else:
            assert taken > SIZE
        # What is read of the parameters, and none of the libraries, which are larger.
        parameters = proc.mapped_parameters(pid)
        assert (0 < parameters <= SIZE < proc.memory(pid)["RssFile"]) if mapped else parameters == 0
        exporter = Exporter(ExporterSettings(running.server.target, models, pid))
        exported = {metric.name: metric.samples for metric in exporter.collect()}
        assert exported["spikeless_memory_mapped_bytes"][0].value == parameters
