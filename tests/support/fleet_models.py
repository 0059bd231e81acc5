"""Versions of one model with a large table, for pushing and pulling.

In: as a script, ``python fleet_models.py DIRECTORY [ROWS]``. Out: three SavedModels,
exported by TensorFlow: ``first``; ``rows``, in which one row of a hundred and the dense
layer are others; ``dense``, in which only the dense layer differs from ``rows``. A row
has 256 bytes; by default the table has 64 MiB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: The model.
NAME = "ctr"
WIDTH = 64
ROWS = 1 << 18
CHANGED = 0.01


def build(directory: Path, rows: int) -> None:
    import numpy as np
    import tensorflow as tf

    random = np.random.default_rng(7)
    table = random.standard_normal((rows, WIDTH), np.float32)
    changed = random.choice(rows, int(CHANGED * rows), replace=False)

    def save(name: str, table: Any, seed: int) -> None:
        model = tf.Module()
        model.table = tf.Variable(table, name="table")
        kernel = np.random.default_rng(seed).standard_normal((WIDTH, 1), np.float32)
        model.kernel = tf.Variable(kernel, name="kernel")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "ids")])
        def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"scores": tf.gather(model.table, ids) @ model.kernel}

        model.serve = serve
        tf.saved_model.save(model, str(directory / name), {"serving_default": serve})

    save("first", table, 1)
    table = table.copy()
    table[changed] += 0.01 * random.standard_normal((len(changed), WIDTH), np.float32)
    save("rows", table, 2)
    save("dense", table, 3)


@pytest.fixture(scope="session")
def fleet_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the three SavedModels."""
    directory = tmp_path_factory.mktemp("fleet_models")
    subprocess.run([sys.executable, __file__, str(directory)], check=True, timeout=300)
    return directory


@pytest.fixture(scope="session")
def trained(fleet_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the three as versions 1, 2 and 3 of ``ctr``, mapped.

    Copy it (`linked`) before changing it.
    """
    from spikeless.mapping import MapSettings
    from spikeless.repository.gates import GateSettings
    from spikeless.repository.publishing import publish

    models = tmp_path_factory.mktemp("trained")
    gates = GateSettings(load=False, allow_cold=True, mapping=MapSettings(verify=False)).pipeline()
    for name in ("first", "rows", "dense"):
        publish(fleet_models / name, models, "ctr", gates=gates)
    return models


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROWS)
