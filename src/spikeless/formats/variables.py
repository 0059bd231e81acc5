"""Whether a SavedModel has the variables that its graph restores.

In: a SavedModel's directory. Out: nothing, or an error that names the file that is not
there. TensorFlow loads a SavedModel without ``variables/variables.index`` as one that
restores nothing, so that only its requests fail.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from pathlib import Path

from spikeless.errors import DataLoss, NotFound
from spikeless.formats import savedmodel
from spikeless.formats.graph import needed
from spikeless.formats.protos import meta_graph_pb2

INDEX_FILE = "variables.index"
_SHARD = re.compile(r"variables\.data-\d+-of-(\d+)")
#: Operations that give a variable its value.
_ASSIGNS = frozenset({"AssignVariableOp", "Assign"})
#: What TensorFlow 2 writes into every checkpoint, and no model's answer depends on.
_OBJECT_GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"


def check_variables(path: Path, tags: Collection[str] = savedmodel.SERVE_TAGS) -> None:
    """Refuse a SavedModel that lacks a file of its variables.

    ``saved_model.pb`` is read only where there is no index of variables.

    Args:
        path: its directory.
        tags: of the meta graph that is served.

    Raises:
        NotFound: it has no index of variables, and its graph restores some.
        DataLoss: a data shard of the variables is missing.
        SpikelessError: ``saved_model.pb`` is not there, or no SavedModel.
    """
    index = path / savedmodel.VARIABLES_DIRECTORY / INDEX_FILE
    if not index.is_file():
        file = path / savedmodel.SAVED_MODEL_FILE
        if _restores(path, file.stat().st_mtime_ns if file.is_file() else 0, frozenset(tags)):
            raise NotFound(f"{index} is missing, but the graph restores it; copy or export the model again")
        return
    shards = [match for file in index.parent.iterdir() if (match := _SHARD.fullmatch(file.name))]
    expected = int(shards[0][1]) if shards else 1
    if len(shards) != expected:
        raise DataLoss(
            f"{index.parent} has {len(shards)} of the {expected} data files that belong to {index.name}; "
            "copy or export the model again"
        )


@functools.lru_cache(maxsize=256)
def _restores(path: Path, changed: int, tags: frozenset[str]) -> bool:
    """The same of a file since ``changed``, for those who ask again and again."""
    return restores(savedmodel.read(path).meta_graph(tags))


def restores(meta_graph: meta_graph_pb2.MetaGraphDef) -> bool:
    """Whether a graph takes values from a checkpoint when it is loaded.

    That is so when the operation that servers run for it (``saver_def``) assigns
    something, or reads more than the description of the model's objects.
    """
    graph, restore = meta_graph.graph_def, meta_graph.saver_def.restore_op_name
    if restore not in {node.name for node in graph.node}:
        return False
    for scope, node in needed(graph, [restore]):
        if node.op in _ASSIGNS:
            return True
        if node.op == "RestoreV2":
            names = scope.constant(node.input[1])
            if names is None or {*names.reshape(-1).tolist()} - {_OBJECT_GRAPH}:
                return True
    return False
