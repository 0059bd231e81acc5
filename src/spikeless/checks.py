"""What a SavedModel must be before it becomes a version that servers see.

In: a SavedModel's directory. Out: nothing, or an error that names the file and the remedy.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from spikeless import savedmodel
from spikeless.errors import DataLoss, FailedPrecondition, NotFound
from spikeless.protos import meta_graph_pb2

_VARIABLE_OPS = frozenset({"VarHandleOp", "VariableV2", "Variable"})
_SHARD = re.compile(r"variables\.data-\d+-of-(\d+)")


def check_files(path: Path) -> None:
    """Refuse a SavedModel without a serving graph, or with files missing that its graph names.

    Raises:
        NotFound: no ``saved_model.pb``, no meta graph tagged ``serve``, no variables, no asset.
        InvalidArgument: ``saved_model.pb`` is no SavedModel.
        DataLoss: a data shard of the variables is missing.
    """
    meta_graph = savedmodel.read(path).meta_graph()
    _check_variables(path, meta_graph)
    for asset in meta_graph.asset_file_def:
        file = path / savedmodel.ASSETS_DIRECTORY / asset.filename
        if not file.is_file():
            raise NotFound(f"{file} is missing, but the graph reads it; copy or export the model again")


def _check_variables(path: Path, meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    index = path / savedmodel.VARIABLES_DIRECTORY / "variables.index"
    if not index.is_file():
        # TensorFlow loads such a model all the same, and fails its first request.
        if any(node.op in _VARIABLE_OPS for node in meta_graph.graph_def.node):
            raise NotFound(f"{index} is missing, but the graph has variables; copy or export the model again")
        return
    shards = [match for file in index.parent.iterdir() if (match := _SHARD.fullmatch(file.name))]
    expected = int(shards[0][1]) if shards else 1
    if len(shards) != expected:
        raise DataLoss(
            f"{index.parent} has {len(shards)} of the {expected} data files that belong to {index.name}; "
            "copy or export the model again"
        )


def check_load(path: Path) -> None:
    """Load the SavedModel for real, in a process of its own that may crash without harm.

    Raises:
        FailedPrecondition: TensorFlow could not load it, with its message, or crashed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(path)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise FailedPrecondition(f"{path} cannot be loaded: TensorFlow died of {name}\n{done.stderr[-2000:]}")
    if done.returncode:
        raise FailedPrecondition(f"{path} cannot be loaded: {done.stdout.strip() or done.stderr[-2000:]}")


#: Prints why a SavedModel cannot be loaded and exits 1, or exits 0.
_LOAD = """
import sys
from spikeless.errors import SpikelessError
from spikeless.runtime import Session
try:
    Session.load(sys.argv[1]).close()
except SpikelessError as error:
    print(error)
    sys.exit(1)
"""
