"""Do at publish time what a server would do at each load: optimise the graph.

In: a meta graph. Out: the same, as TensorFlow's own optimiser (Grappler) leaves it:
functions inlined, constants folded, everything that no signature needs gone. A server
that is told so by the model (`spikeless.formats.session_overrides`) need not optimise
it again; any other finds little left to do.

What is lost is what only Python sees, the exported object with its functions: an
optimised model is for servers. The graph belongs to the version of TensorFlow that
optimised it, or a later one.

As a program, it reads a ``MetaGraphDef`` and writes the ``GraphDef`` of its fetches
(the ``train_op`` collection). It runs in a process of its own: TensorFlow's Python
package is large, and an optimiser may crash.
"""

from __future__ import annotations

import os
import sys

from spikeless.disk import children
from spikeless.errors import FailedPrecondition
from spikeless.formats.graph import ancestors, called, closure, library_of, operation_name, replace
from spikeless.formats.protos import graph_pb2, meta_graph_pb2
from spikeless.mapping.plan import serving_roots

_FETCHES = "train_op"
#: Where a server places operations before it optimises a graph. Those of unknown place
#: are not fused.
_DEVICE = "/job:localhost/replica:0/task:0/device:CPU:0"
_MESSAGE_CHARACTERS = 2000


def optimize(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    """Optimise what serves, not what restores: folding that would copy mapped memory.

    Args:
        meta_graph: is changed.

    Raises:
        FailedPrecondition: the optimiser failed.
    """
    graph = meta_graph.graph_def
    roots = sorted({operation_name(root) for root in serving_roots(meta_graph)})
    serving = ancestors(graph, roots)
    item = meta_graph_pb2.MetaGraphDef(graph_def=graph)
    replace(item.graph_def.node, [node for node in graph.node if node.name in serving])
    for node in item.graph_def.node:
        node.device = node.device or _DEVICE
    item.collection_def[_FETCHES].node_list.value.extend(roots)
    done = children.run(
        [sys.executable, "-m", "spikeless.mapping.optimize"],
        input=item.SerializeToString(),
        capture_output=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        message = done.stderr.decode(errors="replace")[-_MESSAGE_CHARACTERS:]
        raise FailedPrecondition(f"the graph cannot be optimised, so leave --optimize out: {message}")
    optimized = graph_pb2.GraphDef.FromString(done.stdout)
    for node in optimized.node:
        if node.device == _DEVICE:
            node.device = ""
    present = {node.name for node in optimized.node}
    restoring = ancestors(graph, [meta_graph.saver_def.restore_op_name]) - serving
    # The variables' handles are in both parts; an operation that the optimiser removed
    # may still be needed.
    needed = ancestors(graph, restoring) - present
    optimized.node.extend(node for node in graph.node if node.name in needed)
    library = library_of(graph)
    kept = library_of(optimized)
    for name in sorted(closure(library, called(library, optimized.node)) - kept.keys()):
        optimized.library.function.append(library[name])
    graph.CopyFrom(optimized)
    meta_graph.ClearField("object_graph_def")


def _main() -> None:
    from tensorflow.core.protobuf import config_pb2
    from tensorflow.python.grappler import tf_optimizer

    item = meta_graph_pb2.MetaGraphDef.FromString(sys.stdin.buffer.read())
    graph = tf_optimizer.OptimizeGraph(config_pb2.ConfigProto(), item)
    sys.stdout.buffer.write(graph.SerializeToString())


if __name__ == "__main__":
    _main()
