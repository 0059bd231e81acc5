"""What the servers of a repository can do, as far as a model may ask for more.

In: a SavedModel's meta graph and a `ServerTarget`. Out: what servers refuse, or may
refuse, in words that name the remedy. A model that needs XLA on a CPU, a newer
TensorFlow, or operations that TensorFlow has not loads here, or not, whatever servers
do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from spikeless.formats.graph import all_nodes

#: They call back into Python, which no server has.
_PYTHON_OPS = frozenset({"PyFunc", "PyFuncStateless", "EagerPyFunc"})


@dataclass(frozen=True)
class ServerTarget:
    """The servers that are to load a version."""

    #: Their version, such as ``2.20.0``; None: that of TensorFlow here.
    version: str | None = None
    #: Whether they compile by XLA on a CPU; None: unknown.
    xla: bool | None = None


def needs_xla(graph: Any) -> bool:
    """Whether a part of the graph must be compiled by XLA (``jit_compile=True``)."""
    return any(
        part.attr["_XlaMustCompile"].b
        for part in (*graph.library.function, *all_nodes(graph))
        if "_XlaMustCompile" in part.attr
    )


def newer_than(meta_graph: Any, version: str) -> str | None:
    """Why servers of a version may not load what a newer TensorFlow exported, or None.

    TensorFlow promises that older graphs load in newer versions, and not the reverse.
    """
    exporter = meta_graph.meta_info_def.tensorflow_version
    if _minor(exporter) <= _minor(version):
        return None
    return (
        f"TensorFlow {exporter} exported it, and servers have {version}, which may lack what it uses: export "
        f"it with TensorFlow {'.'.join(map(str, _minor(version)))} or older, or update servers first"
    )


def ops_without_kernel(graph: Any, known: Collection[str]) -> str | None:
    """Which operations of a graph servers do not have, or None.

    Args:
        graph: the GraphDef of the model.
        known: the operations that TensorFlow has (`spikeless.runtime.op_names`).
    """
    functions = {function.signature.name for function in graph.library.function}
    used = {node.op for node in all_nodes(graph)} - functions
    if python := used & _PYTHON_OPS:
        return (
            f"it calls Python ({', '.join(sorted(python))}, of tf.py_function or tf.numpy_function), which "
            "no server has: write that part in TensorFlow"
        )
    if unknown := used.difference(known):
        return (
            f"TensorFlow here has no {'operation' if len(unknown) == 1 else 'operations'} "
            f"{', '.join(sorted(unknown))}: stock TensorFlow Serving has those of TensorFlow Text and "
            "Decision Forests, which the embedded engine lacks; others need a server that is built with them"
        )
    return None


def _minor(version: str) -> tuple[int, ...]:
    """``2.20.0-rc1`` -> ``(2, 20)``; what is no version is older than any."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()
