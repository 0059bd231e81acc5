"""What is cheap to import stays cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "statement",
    [
        "from spikeless.cli import cli",
        "import spikeless.formats.protos",
        "import spikeless.engine.server",
        "import spikeless.warmup",
        "import spikeless.client",
        "import spikeless.bench, spikeless.bench.report",
        "import spikeless.bench.load.locustfile",
    ],
)
def test_tensorflow_is_not_imported(statement: str) -> None:
    program = f"{statement}\nimport sys\nassert 'tensorflow.python' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_tensorflow_can_still_be_imported_afterwards() -> None:
    program = (
        "import spikeless.formats.protos, tensorflow as tf\n"
        "assert tf.add(1, 1).numpy() == 2\n"
        "from tensorflow.core.framework import tensor_pb2\n"
        "assert tensor_pb2 is spikeless.formats.protos.tensor_pb2\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_server_does_without_libraries_that_it_does_not_use() -> None:
    """Each would be private memory of every server, with metrics and REST or not."""
    program = (
        "import sys, spikeless.cli.serve\n"
        "assert not {'prometheus_client', 'waitress', 'rich'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_plug_in_of_locust_needs_nothing_else_of_the_project() -> None:
    program = (
        "import sys, spikeless.openloop.user\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('spikeless.')}\n"
        "assert ours == {'http2', 'openloop', 'errors'}, ours"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
