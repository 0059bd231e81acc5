"""Status: what is on disk, configured and served, side by side.

In: a repository, its ``models.config`` and its servers. Out: for each model the
versions on disk, what servers have loaded, what labels mean, and where any of these
disagree.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spikeless.client import Client
from spikeless.disk import atomic
from spikeless.errors import Code, DataLoss, InvalidArgument, NotFound, SpikelessError, nearest
from spikeless.formats.savedmodel import EXTRA_DIRECTORY
from spikeless.formats.states import State, VersionStatus
from spikeless.mapping import is_mapped
from spikeless.repository import checks, golden, layout, models_config
from spikeless.repository.journal import Journal, outcomes
from spikeless.repository.models_config import ModelsConfig
from spikeless.rollout.fleet import states
from spikeless.rollout.plans import CANARY_SUFFIX
from spikeless.rollout.prune import configured
from spikeless.warmup.records import read, warmup_file

_CALL_SECONDS = 3.0


@dataclass(frozen=True)
class VersionReport:
    """One version."""

    version: int
    #: False where only servers or ``models.config`` know it.
    on_disk: bool
    #: Bytes.
    size: int = 0
    #: Seconds.
    age: float = 0.0
    mapped: bool = False
    #: Its warmup records; None when the file is damaged.
    warmup: int | None = 0
    #: Whether it carries golden requests.
    golden: bool = False
    #: What the journal says last of it.
    checks: str = ""
    #: What ``models.config`` says of it.
    configured: str = ""
    labels: tuple[str, ...] = ()
    #: Server -> state, with the error where there is one.
    servers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelReport:
    """One model: its versions, its labels as configured, and what does not agree."""

    name: str
    versions: tuple[VersionReport, ...]
    labels: Mapping[str, int]
    disagreements: tuple[str, ...]


def status(models: str | os.PathLike[str], name: str | None, targets: tuple[str, ...]) -> list[ModelReport]:
    """Report on one model, or on all.

    Servers that do not answer are a disagreement, not an error.

    Raises:
        NotFound: neither the repository nor ``models.config`` knows the model.
    """
    models = Path(models)
    layout.require_repository(models)
    config = models_config.read(models)
    known = _known(models, config)
    if name is not None and name not in known:
        there = nearest(name, known) or f"; there is: {', '.join(known) or 'none'}"
        raise NotFound(f"{models} has no model {name}{there}")
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(target, _CALL_SECONDS)) for target in targets]
        return [_report(models, config, one, clients) for one in ([name] if name else known)]


def changes(before: Sequence[ModelReport], after: Sequence[ModelReport]) -> list[str]:
    """What is another state in the second report: ``boston 2 AVAILABLE on HOST:PORT``.

    A version that a server no longer lists is ``gone``.
    """
    old, new = _states(before), _states(after)
    found = [
        f"{what} {state} on {server}"
        for (what, server), state in new.items()
        if old.get((what, server)) != state
    ]
    return found + [f"{what} gone on {server}" for what, server in old if (what, server) not in new]


def _states(reports: Sequence[ModelReport]) -> dict[tuple[str, str], str]:
    """Model and version, and server -> state."""
    return {
        (f"{report.name} {version.version}", server): state
        for report in reports
        for version in report.versions
        for server, state in version.servers.items()
    }


def _known(models: Path, config: ModelsConfig) -> list[str]:
    on_disk = set(layout.model_names(models))
    canaries = {name + CANARY_SUFFIX for name in (on_disk | set(config.names))}
    return sorted(on_disk | (set(config.names) - canaries))


def _report(models: Path, config: ModelsConfig, name: str, clients: list[Client]) -> ModelReport:
    on_disk = layout.versions(models, name)
    wanted = configured(config, name)
    model = config.model(name)
    labels = dict(model.version_labels) if model is not None else {}
    problems: list[str] = []
    seen: dict[int, dict[str, str]] = {}
    for client in clients:
        _ask(client, name, config, seen, problems)
    if model is None and on_disk and config.names:
        problems.append(f"models.config does not list {name}")
    problems += [
        f"version {version} is {reason}, but not on disk"
        for version, reason in wanted.items()
        if version not in on_disk
    ]
    problems += [
        f"version {version} is not whole: {problem}"
        for version, path in on_disk.items()
        if (version in wanted or not wanted) and (problem := checks.missing_part(path))
    ]
    journal = Journal(models, name)
    unfinished = journal.unfinished()
    if unfinished is not None:
        problems.append(
            f"a {unfinished.action} to version {unfinished.version} was cut short, or is running: "
            "repeat it, or roll back"
        )
    results = {one.version: result for one, result in outcomes(journal.entries())}
    reports = []
    for version in sorted({*on_disk, *seen, *wanted}):
        facts = _on_disk(on_disk[version]) if version in on_disk else {}
        reports.append(
            VersionReport(
                version,
                version in on_disk,
                checks=results.get(version, ""),
                configured=wanted.get(version, ""),
                labels=tuple(label for label, number in sorted(labels.items()) if number == version),
                servers=seen.get(version, {}),
                **facts,
            )
        )
    return ModelReport(name, tuple(reports), labels, tuple(problems))


def _ask(
    client: Client, name: str, config: ModelsConfig, seen: dict[int, dict[str, str]], problems: list[str]
) -> None:
    """Ask one server about a model and its canary; note what is not as configured."""
    for servable in (name, name + CANARY_SUFFIX):
        model = config.model(servable)
        try:
            found = states(client, servable)
        except SpikelessError as error:
            problems.append(str(error))
            return
        available = {status.version for status in found if status.state is State.AVAILABLE}
        for one in found:
            if servable == name or one.state is not State.END:
                text = _state(one) if servable == name else f"{_state(one)} as {servable}"
                states_here = seen.setdefault(one.version, {})
                states_here[client.target] = ", ".join(filter(None, [states_here.get(client.target), text]))
        if model is None:
            if available and config.names:  # Without a file, servers serve what they find.
                problems.append(f"{client.target} serves {servable}, which is not configured")
            continue
        wanted = set(model.model_version_policy.specific.versions)
        if not wanted:
            continue  # It serves the latest versions that it finds.
        for version in sorted(wanted - available):
            problems.append(f"{client.target} should serve version {version} as {servable}, and does not")
        for version in sorted(available - wanted):
            problems.append(f"{client.target} serves version {version} as {servable}, unlike models.config")
        problems += _label_problems(client, servable, dict(model.version_labels), available)


def _label_problems(client: Client, name: str, labels: Mapping[str, int], available: set[int]) -> list[str]:
    problems = []
    for label, version in sorted(labels.items()):
        try:
            found: int | None = client.version_of(name, label)
        except SpikelessError as error:
            found = None
            if error.code not in (Code.INVALID_ARGUMENT, Code.NOT_FOUND):
                problems.append(str(error))
                continue
        if found != version:
            meaning = "does not know it" if found is None else f"takes it for version {found}"
            problems.append(f"label {label} of {name} is version {version}, {client.target} {meaning}")
    return problems


def _state(status: VersionStatus) -> str:
    return status.state.name + (f" ({status.error})" if status.error is not None else "")


def _on_disk(path: Path) -> dict[str, Any]:
    records: int | None
    try:
        records = sum(1 for _ in read(warmup_file(path))) if warmup_file(path).exists() else 0
    except (DataLoss, InvalidArgument):
        records = None
    return {
        "size": atomic.size_of(path),
        "age": max(0.0, time.time() - path.stat().st_mtime),
        "mapped": is_mapped(path),
        "warmup": records,
        "golden": (path / EXTRA_DIRECTORY / golden.REQUESTS_FILE).exists(),
    }
