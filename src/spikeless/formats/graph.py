"""A SavedModel's graph as one program: the main graph and the functions that it calls.

In: a ``GraphDef``. Out: who reads which tensor, where a tensor ends up when it is
followed through function calls, loops and branches, and a smaller graph.

A tensor is named as in its scope: ``node:0`` in the main graph; ``node:output:0`` or
the name of an argument inside a function
(``tensorflow/core/framework/function.proto``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spikeless.formats.protos import attr_value_pb2, function_pb2, graph_pb2, node_def_pb2
from spikeless.formats.tensors import to_numpy

#: The main graph's name as a scope.
MAIN = ""

#: Operation -> the attributes that name the functions it calls, and how many inputs
#: come before theirs.
_CALLS: dict[str, tuple[tuple[str, ...], int]] = {
    "PartitionedCall": (("f",), 0),
    "StatefulPartitionedCall": (("f",), 0),
    "While": (("cond", "body"), 0),
    "StatelessWhile": (("cond", "body"), 0),
    "If": (("then_branch", "else_branch"), 1),
    "StatelessIf": (("then_branch", "else_branch"), 1),
    "Case": (("branches",), 1),
    "StatelessCase": (("branches",), 1),
    "BatchFunction": (("f",), 0),
}
_LOOPS = frozenset({"While", "StatelessWhile"})

#: Operations that hand an input on unchanged, with the names of their outputs.
_FORWARDS: dict[str, tuple[str, ...]] = {
    "Identity": ("output",),
    "Enter": ("output",),
    "Exit": ("output",),
    "NextIteration": ("output",),
    "Merge": ("output",),
    "Switch": ("output_false", "output_true"),
}

Library = Mapping[str, function_pb2.FunctionDef]


@dataclass(frozen=True)
class Use:
    """An operation that takes a tensor, at this position of its inputs."""

    scope: Scope
    node: node_def_pb2.NodeDef
    position: int


class Scope:
    """The main graph or the body of a function; a view that edits what it shows."""

    def __init__(self, name: str, definition: graph_pb2.GraphDef | function_pb2.FunctionDef) -> None:
        self.name = name
        self.function = definition if isinstance(definition, function_pb2.FunctionDef) else None
        self._nodes = definition.node if self.function is None else definition.node_def

    def __str__(self) -> str:
        return f"function {self.name}" if self.function is not None else "the main graph"

    @property
    def arguments(self) -> list[str]:
        return [] if self.function is None else [arg.name for arg in self.function.signature.input_arg]

    @functools.cached_property
    def nodes(self) -> dict[str, node_def_pb2.NodeDef]:
        """The operations by name."""
        return {node.name: node for node in self._nodes}

    @functools.cached_property
    def _uses(self) -> dict[str, list[tuple[node_def_pb2.NodeDef, int]]]:
        uses: dict[str, list[tuple[node_def_pb2.NodeDef, int]]] = {}
        for node in self.nodes.values():
            for position, reference in enumerate(node.input):
                if not reference.startswith("^"):
                    uses.setdefault(self.canonical(reference), []).append((node, position))
        return uses

    def uses(self, tensor: str) -> list[Use]:
        return [Use(self, node, position) for node, position in self._uses.get(tensor, [])]

    def referenced(self) -> set[str]:
        """The operations and arguments that something here takes or waits for."""
        names = {operation_name(reference) for node in self.nodes.values() for reference in node.input}
        if self.function is not None:
            names |= {operation_name(reference) for reference in self.function.ret.values()}
            names |= set(self.function.control_ret.values())
        return names

    def canonical(self, reference: str) -> str:
        """A reference as the tensor's one name; the main graph may leave ``:0`` out."""
        return reference if self.function is not None or ":" in reference else f"{reference}:0"

    def output(self, node: node_def_pb2.NodeDef, argument: str, index: int, before: int = 0) -> str:
        """Tensor ``index`` of an output argument, behind ``before`` other outputs."""
        return f"{node.name}:{before + index}" if self.function is None else f"{node.name}:{argument}:{index}"

    def producer(self, reference: str) -> tuple[node_def_pb2.NodeDef, int] | None:
        """The operation and the output that a data input is; None for an argument."""
        tensor = self.canonical(reference)
        node = self.nodes.get(operation_name(tensor)) if ":" in tensor else None
        return None if node is None else (node, int(tensor.rpartition(":")[2]))

    def constant(self, reference: str) -> np.ndarray[Any, Any] | None:
        """The value of a data input that is a constant, else None."""
        source = self.producer(reference)
        if source is None or source[0].op != "Const":
            return None
        return to_numpy(attribute(source[0], "value").tensor)

    def returned(self, tensor: str) -> list[int]:
        """The outputs of this function that are this tensor."""
        if self.function is None:
            return []
        outputs = self.function.signature.output_arg
        return [index for index, arg in enumerate(outputs) if self.function.ret[arg.name] == tensor]

    def add(self, name: str, op: str, like: node_def_pb2.NodeDef) -> node_def_pb2.NodeDef:
        """A new operation with a free name, on the same device as ``like``."""
        taken, number = name, 0
        while taken in self.nodes or taken in self.arguments:
            number += 1
            taken = f"{name}_{number}"
        node = self.nodes[taken] = self._nodes.add(name=taken, op=op, device=like.device)
        return node

    def remove(self, names: Collection[str]) -> None:
        """Remove operations, with their control edges and control outputs."""
        if not names:
            return
        kept = [node for node in self._nodes if node.name not in names]
        for node in kept:
            inputs = [name for name in node.input if not (name.startswith("^") and name[1:] in names)]
            if len(inputs) < len(node.input):
                node.input[:] = inputs
        replace(self._nodes, kept)
        if self.function is not None:
            gone = {key for key, name in self.function.control_ret.items() if name in names}
            for key in gone:
                del self.function.control_ret[key]
            outputs = self.function.signature.control_output
            outputs[:] = [key for key in outputs if key not in gone]
        self.forget()

    def forget(self) -> None:
        """Look anew: inputs were changed."""
        for cached in ("nodes", "_uses"):
            self.__dict__.pop(cached, None)


class Program:
    """The main graph and the functions it leads to."""

    def __init__(self, graph: graph_pb2.GraphDef) -> None:
        self.library = library_of(graph)
        self.main = Scope(MAIN, graph)
        self.scopes = {MAIN: self.main}
        for name in closure(self.library, called(self.library, graph.node)):
            self.scopes[name] = Scope(name, self.library[name])
        self._callers: dict[str, list[tuple[Scope, node_def_pb2.NodeDef, str]]] = {}
        for scope, node in self.nodes():
            for through, name in _functions(self.library, node):
                self._callers.setdefault(name, []).append((scope, node, through))

    def nodes(self) -> Iterator[tuple[Scope, node_def_pb2.NodeDef]]:
        """Every operation, with where it is."""
        return ((scope, node) for scope in self.scopes.values() for node in scope.nodes.values())

    def callers(self, function: str) -> list[tuple[Scope, node_def_pb2.NodeDef]]:
        return [(scope, node) for scope, node, _ in self._callers.get(function, [])]

    def follow(self, scope: Scope, tensor: str) -> Iterator[Use]:
        """The operations that a tensor reaches unchanged, through calls and loops."""
        pending, seen = [(scope, tensor)], {(scope.name, tensor)}
        while pending:
            scope, tensor = pending.pop()
            further = [*self._returned_to(scope, tensor)]
            for use in scope.uses(tensor):
                passed = [*self._passed_to(use)]
                further.extend(passed)
                if not passed:
                    yield use
            for target, name in further:
                if (target.name, name) not in seen:
                    seen.add((target.name, name))
                    pending.append((target, name))

    def _passed_to(self, use: Use) -> Iterator[tuple[Scope, str]]:
        node, scope = use.node, use.scope
        if node.op == "IdentityN":
            yield scope, scope.output(node, "output", use.position)
        elif node.op in _FORWARDS:
            for before, name in enumerate(_FORWARDS[node.op]):
                yield scope, scope.output(node, name, 0, before)
        elif node.op in self.library:
            yield self._argument(node.op, use.position)
        elif node.op in _CALLS:
            attributes, before = _CALLS[node.op]
            if use.position >= before:
                for through, name in _functions(self.library, node):
                    if through in attributes:
                        yield self._argument(name, use.position - before)
            if node.op in _LOOPS:  # with no iteration at all
                yield scope, scope.output(node, "output", use.position)

    def _returned_to(self, scope: Scope, tensor: str) -> Iterator[tuple[Scope, str]]:
        for index in scope.returned(tensor):
            for caller, node, through in self._callers.get(scope.name, []):
                if node.op in self.library:
                    name = self.library[node.op].signature.output_arg[index].name
                    yield caller, caller.output(node, name, 0, index)
                elif node.op in _CALLS:
                    argument = "out_tensors" if node.op == "BatchFunction" else "output"
                    yield caller, caller.output(node, argument, index)
                if node.op in _LOOPS and through == "body":  # the next iteration
                    for _, name in _functions(self.library, node):
                        yield self._argument(name, index)

    def _argument(self, function: str, index: int) -> tuple[Scope, str]:
        scope = self.scopes[function]
        return scope, scope.arguments[index]


def library_of(graph: graph_pb2.GraphDef) -> Library:
    return {function.signature.name: function for function in graph.library.function}


def _functions(library: Library, node: node_def_pb2.NodeDef) -> Iterator[tuple[str, str]]:
    """(attribute, function) for each function that an operation names.

    A call in the old style is an operation with the function's name.
    """
    if node.op in library:
        yield "", node.op
    for name, value in node.attr.items():
        for function in (value.func, *value.list.func):
            if function.name in library:
                yield name, function.name


def called(library: Library, nodes: Iterable[node_def_pb2.NodeDef]) -> set[str]:
    """The functions that these operations call, or name for any other purpose."""
    return {name for node in nodes for _, name in _functions(library, node)}


def closure(library: Library, functions: Iterable[str]) -> set[str]:
    """These functions and all that they call."""
    return _reachable(functions, library, lambda name: called(library, library[name].node_def))


def ancestors(graph: graph_pb2.GraphDef, roots: Iterable[str]) -> set[str]:
    """The operations of the main graph that these need, themselves included."""
    inputs = {node.name: node.input for node in graph.node}
    return _reachable(map(operation_name, roots), inputs, lambda name: map(operation_name, inputs[name]))


def _reachable(
    start: Iterable[str], known: Collection[str], following: Callable[[str], Iterable[str]]
) -> set[str]:
    """All of ``known`` that some names lead to, themselves included."""
    found: set[str] = set()
    pending = list(start)
    while pending:
        name = pending.pop()
        if name not in found and name in known:
            found.add(name)
            pending.extend(following(name))
    return found


def needed(graph: graph_pb2.GraphDef, roots: Iterable[str]) -> Iterator[tuple[Scope, node_def_pb2.NodeDef]]:
    """The main graph's operations that these need, and all of the functions called."""
    main, library = Scope(MAIN, graph), library_of(graph)
    nodes = [main.nodes[name] for name in sorted(ancestors(graph, roots))]
    yield from ((main, node) for node in nodes)
    for name in sorted(closure(library, called(library, nodes))):
        scope = Scope(name, library[name])
        yield from ((scope, node) for node in scope.nodes.values())


def all_nodes(graph: graph_pb2.GraphDef) -> Iterator[node_def_pb2.NodeDef]:
    """Every operation of the main graph and of all functions."""
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def prune(graph: graph_pb2.GraphDef, roots: Iterable[str], functions: Iterable[str]) -> None:
    """Remove operations that ``roots`` do not need, and functions only called there.

    Args:
        graph: is changed.
        roots: operations or tensors.
        functions: are kept, with all that they call, even if the main graph does not
            call them any more.
    """
    library = library_of(graph)
    before = closure(library, called(library, graph.node))
    alive = ancestors(graph, roots)
    replace(graph.node, [node for node in graph.node if node.name in alive])
    dead = before - closure(library, {*called(library, graph.node), *functions})
    if dead:
        replace(
            graph.library.function,
            [function for function in graph.library.function if function.signature.name not in dead],
        )


def replace(repeated: Any, kept: Sequence[Any]) -> None:
    """Let a repeated field hold copies of these messages and nothing else."""
    copies = [type(message).FromString(message.SerializeToString()) for message in kept]
    del repeated[:]
    repeated.extend(copies)


def attribute(node: node_def_pb2.NodeDef | function_pb2.FunctionDef, name: str) -> attr_value_pb2.AttrValue:
    """An attribute, or an empty value. (Indexing ``node.attr`` would add it.)"""
    value = node.attr.get(name)
    return attr_value_pb2.AttrValue() if value is None else value


def operation_name(reference: str) -> str:
    """The operation or argument in a reference: ``dense/MatMul:0``, ``^init``."""
    return reference.removeprefix("^").partition(":")[0]
