"""Carry out a plan: change a meta graph so that it maps what it used to restore.

In: a ``MappingPlan`` and the absolute path of each mapped variable's file. Out: the
plan's meta graph, changed in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from spikeless.formats.checkpoint import Pieces
from spikeless.formats.graph import Program, Scope, Use, attribute, replace
from spikeless.formats.protos import function_pb2, node_def_pb2, types_pb2
from spikeless.formats.tensors import to_proto
from spikeless.mapping.plan import (
    GATHERS,
    MappingPlan,
    Variable,
    VariableState,
    restore_strings,
    restored_from,
    tidy,
)

#: The operation whose value is a file's memory, and its attribute that names the file
#: (``tensorflow/core/kernels/immutable_constant_op.cc``).
MAPPED_OPERATION = "ImmutableConst"
FILE_ATTRIBUTE = "memory_region_name"
#: TensorFlow folds an operation without inputs into a constant, which would copy the
#: mapped memory to the heap. It leaves those with this attribute alone
#: (``IsConstantFoldable`` in constant_folding.cc); an empty list has no other effect.
_NOT_FOLDED = "_scoped_allocator"


def apply(plan: MappingPlan, files: Mapping[Pieces, str]) -> None:
    """Rewrite ``plan.meta_graph``.

    Args:
        plan: is used up: its graph is another one afterwards.
        files: the path that the server maps, by the variable's pieces in the
            checkpoint.
    """
    mapped = plan.mapped()
    dropped = [variable for variable in plan.variables if variable.state is VariableState.DROPPED]
    edits = [use for variable in (*mapped, *dropped) for use in variable.restores]
    scopes = {use.scope.name: use.scope for use in edits}
    chains = {
        name: {*_chain(use for use in edits if use.scope.name == name)} - plan.serving for name in scopes
    }
    for variable in mapped:
        (use,) = variable.restores
        assert variable.pieces is not None
        _assign_mapped(variable, use, files[variable.pieces])
    for use in {(use.scope.name, use.node.name): use for v in mapped for use in v.gathers}.values():
        _read_densely(use)
    for name, scope in scopes.items():
        gone = {use.node.name for v in dropped for use in v.restores if use.scope.name == name}
        scope.remove(gone)
        _sweep(scope, chains[name])
        if scope.function is not None:
            _drop_unused_arguments(plan.program, scope.function)
    tidy(plan.meta_graph)


def _assign_mapped(variable: Variable, use: Use, path: str) -> None:
    """Let the assignment that restores a variable take the mapped file instead.

    ``AssignVariableOp`` adopts the tensor that it is given, so the mapping becomes the
    variable's storage: it is made once, when the model is loaded, and lives as long as
    the variable.
    """
    source = restored_from(use)
    assert source is not None
    constant = use.scope.add(f"{use.node.name}/mapped", MAPPED_OPERATION, like=source[0])
    constant.attr["dtype"].type = variable.dtype
    constant.attr["shape"].shape.SetInParent()
    for size in variable.shape or ():
        constant.attr["shape"].shape.dim.add(size=size)
    constant.attr[FILE_ATTRIBUTE].s = path.encode("utf-8", "surrogateescape")
    constant.attr[_NOT_FOLDED].list.SetInParent()
    if variable.is_reference:
        _make_resource(variable, use)
    use.node.input[1] = use.scope.output(constant, "tensor", 0)


def _make_resource(variable: Variable, use: Use) -> None:
    """Turn a TensorFlow 1 variable into a resource variable.

    ``Assign`` always copies into a reference variable; only a resource variable adopts.
    """
    scope, node = use.scope, variable.node
    readers = scope.uses(scope.output(node, "ref", 0))
    shared_name = attribute(node, "shared_name").s or node.name.encode()
    node.op = "VarHandleOp"
    node.attr["shared_name"].s = shared_name
    read = scope.add(f"{node.name}/ReadVariableOp", "ReadVariableOp", like=node)
    read.input.append(node.name)
    read.attr["dtype"].type = variable.dtype
    for reader in readers:
        if reader.node.name != use.node.name:
            reader.node.input[reader.position] = read.name
    assign = use.node
    assign.op = "AssignVariableOp"
    assign.attr["dtype"].type = variable.dtype
    for changed, names in ((node, ["_output_shapes"]), (assign, ["_output_shapes", "T", "use_locking"])):
        for name in names:
            changed.attr.pop(name, None)


def _read_densely(use: Use) -> None:
    """Replace a sparse read by a dense read, which shares the buffer, and a lookup."""
    scope, node = use.scope, use.node
    dtype, indices = node.attr["dtype"].type, node.attr["Tindices"].type
    batch_dims = attribute(node, "batch_dims").i
    read = scope.add(f"{node.name}/read", "ReadVariableOp", like=node)
    read.input.append(node.input[0])
    read.input.extend(name for name in node.input if name.startswith("^"))
    read.attr["dtype"].type = dtype
    node.input[0] = scope.output(read, "value", 0)
    node.op = GATHERS[node.op]
    for name in [name for name in node.attr if not name.startswith("_")]:
        del node.attr[name]
    node.attr["Tparams"].type = dtype
    node.attr["Tindices"].type = indices
    if node.op == "GatherV2":
        axis = _constant(scope, f"{node.name}/axis", np.array(batch_dims, np.int32), like=node)
        # Through this edge the constant is in the same loop as the read, if it is in
        # one.
        axis.input.append(f"^{read.name}")
        node.input.insert(2, scope.output(axis, "output", 0))
        node.attr["Taxis"].type = types_pb2.DT_INT32
        node.attr["batch_dims"].i = batch_dims


def _constant(
    scope: Scope, name: str, value: np.ndarray[Any, Any], like: node_def_pb2.NodeDef
) -> node_def_pb2.NodeDef:
    node = scope.add(name, "Const", like=like)
    tensor = to_proto(value)
    node.attr["dtype"].type = tensor.dtype
    node.attr["value"].tensor.CopyFrom(tensor)
    return node


def _chain(uses: Iterable[Use]) -> Iterator[str]:
    """The operations that produce what these assignments assign."""
    for use in uses:
        pending = [use.node.input[1]]
        while pending:
            source = use.scope.producer(pending.pop())
            if source is not None and source[0].op in ("Identity", "RestoreV2", "Const"):
                yield source[0].name
                pending.extend(name for name in source[0].input if not name.startswith("^"))


def _sweep(scope: Scope, chain: set[str]) -> None:
    """Stop restoring what nothing takes any more."""
    _remove_idle(scope, chain)
    for name in chain & scope.nodes.keys():
        if scope.nodes[name].op == "RestoreV2":
            _shrink(scope, scope.nodes[name])
    _remove_idle(scope, chain)


def _remove_idle(scope: Scope, candidates: set[str]) -> None:
    while idle := (candidates & scope.nodes.keys()) - scope.referenced():
        scope.remove(idle)


def _shrink(scope: Scope, restore: node_def_pb2.NodeDef) -> None:
    """Let a ``RestoreV2`` restore only those of its outputs that something takes."""
    dtypes = list(restore.attr["dtypes"].list.type)
    outputs = [scope.output(restore, "tensors", index) for index in range(len(dtypes))]
    names, slices = (restore_strings(scope, restore, position) for position in (1, 2))
    if names is None or slices is None or any(scope.returned(tensor) for tensor in outputs):
        return
    kept = [index for index, tensor in enumerate(outputs) if scope.uses(tensor)]
    for new, old in enumerate(kept):
        for use in scope.uses(outputs[old]):
            use.node.input[use.position] = scope.output(restore, "tensors", new)
    restore.attr.pop("_output_shapes", None)
    restore.attr["dtypes"].list.type[:] = [dtypes[index] for index in kept]
    for position, strings in enumerate((names, slices), start=1):
        selected = np.array(
            [strings[index].encode("utf-8", "surrogateescape") for index in kept], dtype=object
        )
        constant = _constant(scope, restore.input[position].partition(":")[0], selected, like=restore)
        restore.input[position] = scope.output(constant, "output", 0)
    scope.forget()


def _drop_unused_arguments(program: Program, function: function_pb2.FunctionDef) -> None:
    """Remove the handles of dropped variables from a restore function and its calls."""
    signature = function.signature
    calls = program.callers(signature.name)
    if any(node.op not in ("PartitionedCall", "StatefulPartitionedCall") for _, node in calls):
        return
    referenced = Scope(signature.name, function).referenced()
    kept = [
        index
        for index, arg in enumerate(signature.input_arg)
        if arg.type != types_pb2.DT_RESOURCE or arg.name in referenced
    ]
    if len(kept) == len(signature.input_arg):
        return
    shapes = attribute(function, "_input_shapes").list.shape
    if len(shapes) == len(signature.input_arg):
        replace(shapes, [shapes[index] for index in kept])
    replace(signature.input_arg, [signature.input_arg[index] for index in kept])
    attributes = {new: function.arg_attr[old] for new, old in enumerate(kept) if old in function.arg_attr}
    attributes = {new: type(value).FromString(value.SerializeToString()) for new, value in attributes.items()}
    function.arg_attr.clear()
    for new, value in attributes.items():
        function.arg_attr[new].CopyFrom(value)
    ids = function.resource_arg_unique_id
    renumbered = {new: ids[old] for new, old in enumerate(kept) if old in ids}
    ids.clear()
    ids.update(renumbered)
    for scope, caller in calls:
        node = scope.nodes[caller.name]
        controls = [name for name in node.input if name.startswith("^")]
        node.input[:] = [node.input[index] for index in kept] + controls
        node.attr["Tin"].list.type[:] = [arg.type for arg in signature.input_arg]
        scope.forget()
