"""Gates: what a version has to pass before anything of it is visible.

In: a staged version (`publishing.stage`) and the stable version that it is to follow. Out: nothing, or an
error that names the gate, the numbers and the remedy; and what was found, for the journal.

``signatures``     callers of the stable version can go on: no signature, input or output is lost or changed
``load``           TensorFlow loads it
``warmup``         every warmup record runs
``golden``         golden requests get their expected answers
``first request``  the first request after load and warmup is quick enough
``memory``         there is memory for it beside what is loaded now
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from spikeless.disk import atomic
from spikeless.errors import SpikelessError
from spikeless.formats import savedmodel
from spikeless.formats.savedmodel import Signature, TensorSpec
from spikeless.formats.tensors import dtype_name, shape_text
from spikeless.repository import golden, models_config, publishing, trial
from spikeless.repository.checks import check_warmup
from spikeless.repository.golden import Tolerance
from spikeless.repository.journal import Journal
from spikeless.repository.publishing import CHECK_FILES, Candidate, Step
from spikeless.repository.trial import Findings, GateError


@dataclass(frozen=True)
class GateSettings:
    """What a version has to pass.

    allow_breaking: callers of the stable version may fail.
    golden: a file of golden requests, which becomes part of the version; None for none.
    tolerance: how far answers to them may be off.
    memory: bytes that servers have for it; by default what is available on this machine now.
    max_first_request: seconds that the first request may take.
    """

    allow_breaking: bool = False
    golden: Path | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)
    memory: int | None = None
    max_first_request: float = 1.0


class Gates:
    """The steps of publishing one version (`publishing.publish`), and what they found."""

    def __init__(self, models: str | os.PathLike[str], name: str, settings: GateSettings) -> None:
        self._models = Path(models)
        self._name = name
        self._settings = settings
        self._golden = (
            golden.read_file(settings.golden, settings.tolerance) if settings.golden is not None else None
        )
        self.stable = stable_version(models, name)
        self.findings = Findings()

    @property
    def steps(self) -> Sequence[Step]:
        return (
            CHECK_FILES,
            Step("checking warmup", lambda candidate: _check_warmup(candidate.path), _check_warmup),
            Step("comparing signatures", self._check_signatures),
            Step("loading and asking it", self._try),
        )

    def record(self, version: Path) -> None:
        """Write into the journal that ``version`` has passed."""
        Journal(self._models / self._name / publishing.STATE_DIRECTORY).append(
            "publish",
            version=int(version.name),
            bytes=atomic.size_of(version),
            stable=None if self.stable is None else int(self.stable.name),
            allow_breaking=self._settings.allow_breaking,
            findings=asdict(self.findings),
        )

    def _check_signatures(self, candidate: Candidate) -> None:
        if self._golden is not None:
            golden.write_to_version(self._golden, candidate.path)
        if self.stable is None or self._settings.allow_breaking:
            return
        problems = breaking_changes(
            savedmodel.read(self.stable).meta_graph(), savedmodel.read(candidate.path).meta_graph()
        )
        if problems:
            raise GateError(
                "signatures",
                f"callers of {self.stable} would fail: {'; '.join(problems)}; keep what they use, or say "
                "--allow-breaking",
            )

    def _try(self, candidate: Candidate) -> None:
        stable = None if self._settings.allow_breaking else self.stable
        self.findings = found = trial.run(candidate.path, stable)
        limit = self._settings.max_first_request
        if found.first is not None and found.steady is not None and found.first > limit:
            raise GateError(
                "first request",
                f"it takes {1000 * found.first:.0f} ms after load and {found.warmup} warmup records, later "
                f"ones {1000 * found.steady:.1f} ms, and the limit is {1000 * limit:.0f} ms; warm up what it "
                "uses with `spikeless warmup build`, or raise --max-first-request",
            )
        self._check_memory(found.memory)

    def _check_memory(self, needed: int) -> None:
        budget = self._settings.memory
        available = psutil.virtual_memory().available if budget is None else budget
        if needed > available:
            where = "this machine has available" if budget is None else "--memory allows"
            raise GateError(
                "memory",
                f"it takes {needed / 1e6:.0f} MB of memory beside the versions that are loaded, and "
                f"{available / 1e6:.0f} MB is what {where}; make room, map its parameters, or say what "
                "servers elsewhere have with --memory",
            )


def _check_warmup(version: Path) -> None:
    try:
        check_warmup(version)
    except SpikelessError as error:
        raise GateError("warmup", f"{error}; build it again with `spikeless warmup build`") from None


def stable_version(models: str | os.PathLike[str], name: str) -> Path | None:
    """The directory of the version that callers get now; of the latest one where nothing is configured."""
    versions = publishing.versions(models, name)
    model = models_config.read(models).model(name) if Path(models).is_dir() else None
    if model is not None:
        served = model.model_version_policy.specific.versions
        number = model.version_labels.get(models_config.STABLE, max(served, default=None))
        if number in versions:
            return versions[number]
    return versions[max(versions)] if versions else None


def breaking_changes(old: Any, new: Any) -> list[str]:
    """Why callers of one meta graph's signatures may fail with another's, in words; empty when they do not.

    They send all inputs of a signature and read any of its outputs. A new input breaks them, unless the
    signature has a default for it; a wider input and a narrower output do not.
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
            if not _contains(wide, narrow):
                problems.append(
                    f"{kind} {alias} had shape {shape_text(spec.shape)} and has {shape_text(other.shape)}"
                )
    return problems


def _contains(wide: TensorSpec, narrow: TensorSpec) -> bool:
    """Whether every shape that ``narrow`` allows is one that ``wide`` allows."""
    if wide.shape is None:
        return True
    if narrow.shape is None or len(narrow.shape) != len(wide.shape):
        return False
    return all(one is None or one == other for one, other in zip(wide.shape, narrow.shape, strict=True))
