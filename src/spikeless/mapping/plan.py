"""Decide for each variable of a SavedModel whether its bytes can be mapped from a file.

In: a meta graph and its checkpoint. Out: a ``MappingPlan`` with every variable and what
is to become of it:

* **mapped**: one assignment restores it from the checkpoint, and everybody else only
  reads it.
* **restored**: left as it is, with the reason. A variable that an operation might write
  to must stay on the heap: mapped memory is read-only, and writing to it would kill the
  server.
* **dropped**: no signature and no initialiser reaches it, so there is no need to
  restore it at all.

Reading is proved, not assumed: the handle is followed from the variable through every
function call, loop and branch to the operations that take it, and an operation that is
not known to only read is a reason not to map.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from spikeless.formats.checkpoint import Checkpoint, Pieces
from spikeless.formats.graph import (
    MAIN,
    Program,
    Scope,
    Use,
    ancestors,
    attribute,
    called,
    closure,
    operation_name,
    prune,
)
from spikeless.formats.protos import meta_graph_pb2, node_def_pb2, op_def_pb2, types_pb2
from spikeless.formats.savedmodel import INIT_SIGNATURE
from spikeless.formats.tensors import NUMPY_DTYPES, dtype_name

#: Collections that name operations which run at load
#: (``tensorflow/cc/saved_model/constants.h``).
_INIT_COLLECTIONS = ("saved_model_main_op", "legacy_init_op")

#: Operations that are variables.
VARIABLES = frozenset({"VarHandleOp", "VariableV2", "Variable"})
#: Operations on a handle that neither write to the variable nor copy it.
_READS = frozenset({"ReadVariableOp", "VariableShape", "VarIsInitializedOp", "DisableCopyOnRead"})
#: Sparse reads. They may copy the whole variable and make later dense reads copy it
#: each time (``EnsureSparseVariableAccess`` in training_op_helpers.h), so they are
#: rewritten.
GATHERS: Mapping[str, str] = {"ResourceGather": "GatherV2", "ResourceGatherNd": "GatherNd"}
#: Operations that read, of their first input, single rows: axis 0 is given, or their
#: only one.
_ROW_READS = frozenset(
    {"Gather", "GatherNd", *GATHERS}
    | {f"SparseSegment{how}{more}" for how in ("Sum", "Mean", "SqrtN") for more in ("", "WithNumSegments")}
)
#: Operations that read none of it.
_NO_READS = _READS - {"ReadVariableOp"} | {"Shape", "Size", "Rank"}
#: Operations that write into the very tensor they are given, even where it is a
#: variable's.
_WRITES_IN_PLACE = frozenset({"InplaceUpdate", "InplaceAdd", "InplaceSub"})
_ASSIGNS = frozenset({"AssignVariableOp", "Assign"})


class VariableState(enum.Enum):
    MAPPED = "mapped"
    RESTORED = "restored"
    DROPPED = "dropped"


@dataclass
class Variable:
    """One variable of a meta graph, and what becomes of it."""

    name: str
    node: node_def_pb2.NodeDef
    dtype: int
    #: As stored in the checkpoint, or as declared where it is not from there; None for
    #: an unknown shape.
    shape: tuple[int, ...] | None = None
    #: Bytes in the checkpoint; None if it is not from there.
    size: int | None = None
    #: Its entries in the checkpoint's index.
    pieces: Pieces | None = None
    state: VariableState = VariableState.RESTORED
    #: Why it is not mapped.
    reason: str = ""
    #: The assignments that restore it.
    restores: list[Use] = field(default_factory=list)
    #: Where its handle is read sparsely.
    gathers: list[Use] = field(default_factory=list)
    #: Whether nothing ever reads more of it than the rows it asks for, as of an
    #: embedding.
    by_row: bool = False

    @property
    def is_reference(self) -> bool:
        """A variable of TensorFlow 1: its output is a reference instead of a handle."""
        return bool(self.node.op != "VarHandleOp")


@dataclass
class MappingPlan:
    """What is to be done to one meta graph."""

    meta_graph: meta_graph_pb2.MetaGraphDef
    program: Program
    #: The main graph's operations that signatures, initialisers and assets need.
    serving: set[str]
    #: In name order.
    variables: list[Variable]

    def mapped(self) -> list[Variable]:
        return [variable for variable in self.variables if variable.state is VariableState.MAPPED]


def plan_variables(
    meta_graph: meta_graph_pb2.MetaGraphDef, checkpoint: Checkpoint | None, min_bytes: int
) -> MappingPlan:
    """Decide what becomes of each variable of ``meta_graph``.

    Args:
        meta_graph: is pruned to what a server can feed, fetch or run (see ``tidy``).
        checkpoint: None for a SavedModel without variables.
        min_bytes: smaller variables are restored as before: a file and a mapping each
            would not pay.
    """
    tidy(meta_graph)
    serving = ancestors(meta_graph.graph_def, serving_roots(meta_graph))
    plan = MappingPlan(meta_graph, Program(meta_graph.graph_def), serving, [])
    planner = _Planner(plan, checkpoint, min_bytes)
    plan.variables = sorted(planner.variables(), key=lambda variable: variable.name)
    return plan


def tidy(meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    """Remove what no server can reach: saving, training, initial values.

    Functions that ``tf.saved_model.load`` makes available stay. A saved graph's
    collections describe the variables to Python; entries that name removed operations
    would break ``tf.compat.v1.saved_model.load``.
    """
    graph = meta_graph.graph_def
    restore = meta_graph.saver_def.restore_op_name
    prune(graph, [*serving_roots(meta_graph), restore], python_functions(meta_graph))
    names = {node.name for node in graph.node}
    for key, collection in list(meta_graph.collection_def.items()):
        kind = collection.WhichOneof("kind")
        missing = any(operation_name(name) not in names for name in collection.node_list.value)
        if kind == "bytes_list" or missing:
            del meta_graph.collection_def[key]


def python_functions(meta_graph: meta_graph_pb2.MetaGraphDef) -> list[str]:
    """The functions that ``tf.saved_model.load`` looks for."""
    return list(meta_graph.object_graph_def.concrete_functions)


class _Planner:
    def __init__(self, plan: MappingPlan, checkpoint: Checkpoint | None, min_bytes: int) -> None:
        self.program, self.serving = plan.program, plan.serving
        self.checkpoint = checkpoint
        self.min_bytes = min_bytes
        self.operations = {op.name: op for op in plan.meta_graph.meta_info_def.stripped_op_list.op}
        self.named_tensors = {_main_tensor(name) for name in serving_roots(plan.meta_graph)}
        # A function that something else calls too, now or after tf.saved_model.load, is
        # no place for surgery.
        library, nodes = self.program.library, self.program.main.nodes.values()
        serving = called(library, (node for node in nodes if node.name in self.serving))
        others = closure(library, {*serving, *python_functions(plan.meta_graph)})
        self.restore_scopes = self.program.scopes.keys() - others
        self.writers_in_place = [node for _, node in self.program.nodes() if node.op in _WRITES_IN_PLACE]

    def variables(self) -> Iterator[Variable]:
        sources = [(scope, node) for scope, node in self.program.nodes() if node.op in VARIABLES]
        sharing = Counter(_identity(node) for _, node in sources)
        for scope, node in sources:
            variable = Variable(node.name, node, attribute(node, "dtype").type, _declared_shape(node))
            variable.reason = self._examine(scope, variable, alone=sharing[_identity(node)] == 1)
            if not variable.reason:
                variable.state = VariableState.MAPPED
            elif variable.state is VariableState.DROPPED:
                variable.reason = ""
            yield variable

    def _examine(self, scope: Scope, variable: Variable, alone: bool) -> str:
        """Fill in a variable from its uses; returns why it cannot be mapped, if so."""
        output = scope.output(variable.node, "resource", 0)
        reached = [*self.program.follow(scope, output)]
        uses = scope.uses(output) if variable.is_reference else reached
        problems = [problem for use in uses if (problem := self._problem(variable, use))]
        variable.by_row = self._read_by_row(variable, reached)
        key_problem = self._find_entry(variable)
        if scope.name == MAIN and variable.name not in self.serving and not problems and alone:
            variable.state = VariableState.DROPPED
            return "no signature reaches it"
        if _main_tensor(variable.name) in self.named_tensors and scope.name == MAIN:
            problems.append("a signature names it")
        if scope.name != MAIN:
            problems.append(f"it is created inside {scope}")
        if not alone:
            problems.append("several operations create it under one name")
        if variable.dtype not in NUMPY_DTYPES or variable.dtype == types_pb2.DT_STRING:
            problems.append(f"{dtype_name(variable.dtype)} is no plain memory")
        if key_problem:
            problems.append(key_problem)
        problems += [f"{node.op} {node.name} may write to any variable" for node in self.writers_in_place]
        if not problems and (variable.size or 0) < self.min_bytes:
            problems.append(f"smaller than {self.min_bytes} bytes")
        return problems[0] if problems else ""

    def _problem(self, variable: Variable, use: Use) -> str:
        """Sort one use of a variable; returns why it may be harmful, if so."""
        node = use.node
        restores = use.scope.name in self.restore_scopes and (
            use.scope.name != MAIN or node.name not in self.serving
        )
        if node.op in _ASSIGNS and use.position == 0 and restores:
            variable.restores.append(use)
            outputs = use.scope.uses(use.scope.output(node, "output_ref", 0))
            return "the result of its assignment is used" if node.op == "Assign" and outputs else ""
        if variable.is_reference:
            by_reference = _takes_reference(self.operations.get(node.op), node, use.position)
            return f"{node.op} {node.name} in {use.scope} may write to it" if by_reference else ""
        if node.op in GATHERS:
            variable.gathers.append(use)
            return ""
        return "" if node.op in _READS else f"{node.op} {node.name} in {use.scope} may write to it"

    def _read_by_row(self, variable: Variable, reached: Iterable[Use]) -> bool:
        """Whether all that reads a variable looks rows up in it, and something does."""
        restores = {id(use.node) for use in variable.restores}
        uses: list[Use] = []
        for use in reached:
            if use.node.op == "ReadVariableOp":
                value = use.scope.output(use.node, "value", 0)
                uses += self.program.follow(use.scope, value)
            elif id(use.node) not in restores:
                uses.append(use)
        reads = [use for use in uses if use.node.op not in _NO_READS]
        return bool(reads) and all(map(_looks_up_rows, reads))

    def _find_entry(self, variable: Variable) -> str:
        """Find what is restored into a variable; returns why it cannot, if so."""
        if len(variable.restores) != 1:
            return "nothing restores it" if not variable.restores else "it is restored more than once"
        (use,) = variable.restores
        source = restored_from(use)
        if source is None:
            return "what is restored is not what the checkpoint holds"
        restore, index = source
        names, slices = (restore_strings(use.scope, restore, position) for position in (1, 2))
        if names is None or slices is None or self.checkpoint is None:
            return "the names to restore are not constant"
        pieces = self.checkpoint.find(names[index], slices[index])
        if pieces is None:
            return f"{names[index]} is not stored row by row in the checkpoint"
        entries = [self.checkpoint.entries[key] for key in pieces]
        variable.pieces, variable.size = pieces, sum(entry.size for entry in entries)
        rows = [[dim.size for dim in entry.shape.dim] for entry in entries]
        variable.shape = (sum(shape[0] for shape in rows), *rows[0][1:]) if rows[0] else ()
        if entries[0].dtype != variable.dtype:
            return f"the checkpoint holds {dtype_name(entries[0].dtype)} for it"
        return ""


def _looks_up_rows(use: Use) -> bool:
    if use.position:
        return False
    if use.node.op == "GatherV2":
        axis = use.scope.constant(use.node.input[2])
        return axis is not None and not axis.any()
    return use.node.op in _ROW_READS


def restored_from(use: Use) -> tuple[node_def_pb2.NodeDef, int] | None:
    """The ``RestoreV2`` that an assignment takes, and the number of its output."""
    source = use.scope.producer(use.node.input[1])
    while source is not None and source[0].op == "Identity":
        source = use.scope.producer(source[0].input[0])
    return source if source is not None and source[0].op == "RestoreV2" else None


def restore_strings(scope: Scope, restore: node_def_pb2.NodeDef, position: int) -> list[str] | None:
    """Tensor names (input 1) or slices (input 2) of a ``RestoreV2``, if constant."""
    texts = scope.constant(restore.input[position])
    if texts is None:
        return None
    return [text.decode("utf-8", "surrogateescape") for text in texts.reshape(-1).tolist()]


def _takes_reference(operation: op_def_pb2.OpDef | None, node: node_def_pb2.NodeDef, position: int) -> bool:
    """Whether an operation takes this input by reference; True if that is unknown."""
    if operation is None:
        return True
    for argument in operation.input_arg:
        if argument.number_attr:
            count = attribute(node, argument.number_attr).i
        elif argument.type_list_attr:
            count = len(attribute(node, argument.type_list_attr).list.type)
        else:
            count = 1
        if position < count:
            return bool(argument.is_ref)
        position -= count
    return True


def serving_roots(meta_graph: meta_graph_pb2.MetaGraphDef) -> list[str]:
    """What a server may feed, fetch or run: tensors and operations by name."""
    roots: list[str] = []
    for key, signature in meta_graph.signature_def.items():
        roots += _names(signature.outputs.values())
        if key != INIT_SIGNATURE:
            roots += _names(signature.inputs.values())
    for collection in _INIT_COLLECTIONS:
        if collection in meta_graph.collection_def:
            roots += meta_graph.collection_def[collection].node_list.value
    roots += [asset.tensor_info.name for asset in meta_graph.asset_file_def]
    if meta_graph.saver_def.filename_tensor_name:
        roots.append(meta_graph.saver_def.filename_tensor_name)
    return roots


def _names(infos: Iterable[meta_graph_pb2.TensorInfo]) -> Iterator[str]:
    for info in infos:
        encoding = info.WhichOneof("encoding")
        if encoding == "name":
            yield info.name
        elif encoding == "coo_sparse":
            sparse = info.coo_sparse
            yield from (sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name)
        elif encoding == "composite_tensor":
            yield from _names(info.composite_tensor.components)


def _main_tensor(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _identity(node: node_def_pb2.NodeDef) -> tuple[bytes, bytes]:
    """Two operations with the same container and shared name are one variable."""
    return attribute(node, "container").s, attribute(node, "shared_name").s or node.name.encode()


def _declared_shape(node: node_def_pb2.NodeDef) -> tuple[int, ...] | None:
    shape = attribute(node, "shape").shape
    sizes = tuple(int(dim.size) for dim in shape.dim)
    return None if shape.unknown_rank or any(size < 0 for size in sizes) else sizes
