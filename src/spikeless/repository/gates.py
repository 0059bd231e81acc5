"""Gates: what a version has to pass before anything of it is visible.

In: a staged version (`Candidate`). Out: nothing, or an error that names the gate, the
numbers and the remedy; and what was found, for the journal.

``files``       everything that the graph names is there
``target``      servers have the flags and the TensorFlow that it needs
``warmup``      every warmup record fits its signature
``cold``        it has a signature that answers; without a warmup file, it warns
``golden``      (a rewrite) golden requests become part of the version
``signatures``  no signature, input or output that callers use now is lost or changed
``mapping``     (a rewrite) parameters are mapped from files
``trial``       it is loaded, warmed and asked in a process of its own; errors name the
                part that failed: ``ops``, ``load``, ``warmup``, ``golden``,
                ``first request``, ``signatures`` or ``memory``; without a trial, it
                warns of operations that TensorFlow has not
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from spikeless.errors import SpikelessError
from spikeless.formats import savedmodel
from spikeless.formats.savedmodel import Signature
from spikeless.formats.tensors import dtype_name, shape_text
from spikeless.mapping import MapSettings, is_mapped, map_in_place
from spikeless.repository import golden, trial
from spikeless.repository.candidate import SIGNATURES, Candidate
from spikeless.repository.checks import check_files, check_warmup
from spikeless.repository.golden import Golden, Tolerance
from spikeless.repository.target import ServerTarget, needs_xla, newer_than
from spikeless.repository.trial import GateError
from spikeless.warmup.records import warmup_file


@dataclass(frozen=True)
class Gate:
    """One step of publishing: a check that raises, or a rewrite of the version."""

    #: Its name, for errors and the journal.
    name: str
    #: What it does, for progress messages.
    title: str
    run: Callable[[Candidate], None]
    #: The part of it that needs only the source: it runs before gigabytes are copied
    #: and anything is created.
    early: Callable[[Path], None] = lambda source: None


@dataclass(frozen=True)
class GateSettings:
    """What a version has to pass."""

    #: Callers of the stable version may fail.
    allow_breaking: bool = False
    #: A file of golden requests, which becomes part of the version; None for none.
    golden: Path | None = None
    #: How far answers to them may be off.
    tolerance: Tolerance = field(default_factory=Tolerance)
    #: Map its parameters from files, unless they are mapped already; None leaves them
    #: as they are.
    mapping: MapSettings | None = None
    #: It may have no warmup file, and no signature that answers.
    allow_cold: bool = False
    #: Load it and ask it, as a test.
    load: bool = True
    #: The servers that are to load it.
    target: ServerTarget = field(default_factory=ServerTarget)
    #: Bytes that servers have for it; by default what is available on this machine now.
    memory: int | None = None
    #: Seconds that the first request may take.
    max_first_request: float = 1.0

    def pipeline(self) -> tuple[Gate, ...]:
        """The gates in their order.

        Raises:
            SpikelessError: ``golden`` cannot be used (`golden.read_file`).
        """
        gates = [FILES, Gate("target", "comparing with servers", partial(_check_target, self)), WARMUP]
        if not self.allow_cold:
            gates.append(COLD)
        if self.golden is not None:
            given = golden.read_file(self.golden, self.tolerance)
            gates.append(Gate("golden", "adding golden requests", partial(_add_golden, given)))
        if not self.allow_breaking:
            gates.append(Gate(SIGNATURES, "comparing signatures", _check_signatures))
        if self.mapping is not None:
            gates.append(Gate("mapping", "mapping parameters", partial(_map, self.mapping)))
        if self.load:
            gates.append(Gate("trial", "loading and asking it", partial(_try, self)))
        return tuple(gates)


def _check_target(settings: GateSettings, candidate: Candidate) -> None:
    meta_graph = savedmodel.read(candidate.path).meta_graph()
    wanted = settings.target
    if needs_xla(meta_graph.graph_def) and not wanted.xla:
        problem = (
            "XLA compiles a part of it (jit_compile=True), which TensorFlow Serving refuses on a CPU: start "
            "servers with --xla_cpu_compilation_enabled, or export it without"
        )
        if wanted.xla is False:
            raise GateError("target", problem)
        candidate.warnings.append(problem)
    if newer := newer_than(meta_graph, wanted.version or importlib.metadata.version("tensorflow")):
        candidate.warnings.append(newer)
    if not settings.load:
        try:
            trial.run(candidate.path, load=False)
        except GateError as error:
            candidate.warnings.append(error.problem)


def _check_warmup(version: Path) -> None:
    try:
        check_warmup(version)
    except SpikelessError as error:
        raise GateError("warmup", f"{error}; build it again with `spikeless warmup build`") from None


def _check_answers(version: Path) -> None:
    if not savedmodel.read(version).signatures():
        raise GateError(
            "cold",
            f"{version} has no signature, so nobody can ask it: export it with signatures, or say "
            "--allow-cold",
        )


def _check_cold(candidate: Candidate) -> None:
    if not warmup_file(candidate.path).exists():
        candidate.warnings.append(
            "it has no warmup file, so the first callers of each server will wait: write one with `spikeless "
            "warmup build` before publishing, or say --allow-cold"
        )


def _add_golden(given: Golden, candidate: Candidate) -> None:
    golden.write_to_version(given, candidate.path)


def _check_signatures(candidate: Candidate) -> None:
    if candidate.stable is None:
        return
    problems = breaking_changes(
        savedmodel.read(candidate.stable).meta_graph(), savedmodel.read(candidate.path).meta_graph()
    )
    if problems:
        raise GateError(
            "signatures",
            f"callers of {candidate.stable} would fail: {'; '.join(problems)}; keep what they use, or say "
            "--allow-breaking",
        )


def _map(settings: MapSettings, candidate: Candidate) -> None:
    if not is_mapped(candidate.path):
        map_in_place(candidate.path, settings)


def _try(settings: GateSettings, candidate: Candidate) -> None:
    stable = None if settings.allow_breaking else candidate.stable
    candidate.findings = found = trial.run(candidate.path, stable)
    limit = settings.max_first_request
    if found.first is not None and found.steady is not None and found.first > limit:
        raise GateError(
            "first request",
            f"it takes {1000 * found.first:.0f} ms after load and {found.warmup} warmup records, later "
            f"ones {1000 * found.steady:.1f} ms, and the limit is {1000 * limit:.0f} ms; warm up what it "
            "uses with `spikeless warmup build`, or raise --max-first-request",
        )
    _check_memory(found.memory, settings.memory)


def _check_memory(needed: int, budget: int | None) -> None:
    available = psutil.virtual_memory().available if budget is None else budget
    if needed > available:
        where = "this machine has available" if budget is None else "--memory allows"
        raise GateError(
            "memory",
            f"it takes {needed / 1e6:.0f} MB of memory beside the versions that are loaded, and "
            f"{available / 1e6:.0f} MB is what {where}; make room, map its parameters, or say what "
            "servers elsewhere have with --memory",
        )


FILES = Gate("files", "checking files", lambda candidate: check_files(candidate.path))
COLD = Gate("cold", "looking for warmup", _check_cold, _check_answers)
WARMUP = Gate("warmup", "checking warmup", lambda candidate: _check_warmup(candidate.path), _check_warmup)
#: The gates of a version that is published without further wishes.
GATES = GateSettings().pipeline()


def breaking_changes(old: Any, new: Any) -> list[str]:
    """Why callers of one meta graph fail with another, in words; empty if none does.

    They send all inputs of a signature and read any of its outputs. A new input breaks
    them, unless the signature has a default for it; a wider input and a narrower output
    do not.
    """
    before, after = savedmodel.signatures_of(old), savedmodel.signatures_of(new)
    problems = []
    for key, signature in before.items():
        if key not in after:
            problems.append(f"signature {key} is gone")
            continue
        defaults = new.signature_def[key].defaults
        problems += [f"{key}: {text}" for text in _signature_problems(signature, after[key], defaults)]
    return problems


def _signature_problems(old: Signature, new: Signature, defaults: Mapping[str, Any]) -> list[str]:
    problems = []
    if old.method_name != new.method_name:
        problems.append(f"its method was {old.method_name} and is {new.method_name}")
    problems += [
        f"input {alias} is new, and callers do not send it"
        for alias in new.inputs
        if alias not in old.inputs and alias not in defaults
    ]
    for kind, before, after in (
        ("input", old.inputs, new.inputs),
        ("output", old.outputs, new.outputs),
    ):
        for alias, spec in before.items():
            if alias not in after:
                problems.append(f"{kind} {alias} is gone")
                continue
            other = after[alias]
            if spec.dtype != other.dtype:
                problems.append(
                    f"{kind} {alias} was {dtype_name(spec.dtype)} and is {dtype_name(other.dtype)}"
                )
            wide, narrow = (other, spec) if kind == "input" else (spec, other)
            if not wide.allows(narrow.shape):
                problems.append(
                    f"{kind} {alias} had shape {shape_text(spec.shape)} and has {shape_text(other.shape)}"
                )
    return problems
