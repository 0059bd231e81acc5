"""The situation of a model: what is on disk, configured, served, and unfinished.

In: a repository, its ``models.config``, a model's journal, and the servers. Out: a
`Situation`, or an error that says why the model cannot be changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from spikeless.errors import FailedPrecondition, NotFound
from spikeless.formats.states import State, VersionStatus
from spikeless.repository import layout, models_config
from spikeless.repository.journal import ChangeBegun, Journal
from spikeless.repository.models_config import Blocks, ModelsConfig, model_in, new_block
from spikeless.rollout import local_servers, plans
from spikeless.rollout.fleet import Fleet
from spikeless.rollout.plans import CANARY_SUFFIX, ServedModel


@dataclass(frozen=True)
class Situation:
    """A model, locked against other changes."""

    models: Path
    name: str
    fleet: Fleet
    #: Where servers see the repository; by default where other models in
    #: ``models.config`` are, or where it is here.
    serving_root: str | None
    #: The versions on disk.
    versions: Mapping[int, Path]
    #: What ``models.config`` says now of the model and its canary.
    current: Blocks
    #: The change that was cut short, when ``models.config`` is where that left it.
    unfinished: ChangeBegun | None

    @property
    def journal(self) -> Journal:
        return Journal(self.models, self.name)

    def was_cut_short(self, action: str) -> bool:
        """Whether a change of that kind is unfinished."""
        return self.unfinished is not None and self.unfinished.action == action

    def before(self, unfinished: bool) -> ServedModel:
        """The model as configured now, or before the ``unfinished`` change."""
        undone = self.unfinished if unfinished else None
        blocks = self.current if undone is None else undone.states[0]
        return ServedModel(self.name, blocks, self._served(blocks), self._base_path(self.name))

    def without_failed(self, model: ServedModel) -> ServedModel:
        """The model with what servers have instead of versions that failed on all.

        A server that started with less serves another version, and has labels there.
        """
        everywhere = self.fleet.statuses(self.name).values()
        failed = frozenset.intersection(
            *(frozenset(one.version for one in statuses if one.error is not None) for statuses in everywhere)
        )
        served = (model.served | _available(everywhere)) - failed
        return replace(model, served=served) if model.served & failed and served else model

    def _served(self, blocks: Blocks) -> frozenset[int]:
        block = blocks[self.name]
        if block is None:
            return frozenset()
        policy = model_in(block).model_version_policy
        if policy.HasField("specific"):
            return frozenset(policy.specific.versions)
        # The policy is to serve the latest: servers know which that is.
        return _available(self.fleet.statuses(self.name).values())

    def _base_path(self, name: str) -> str:
        root = self.serving_root
        if root is None:
            for model in models_config.read(self.models).message.model_config_list.config:
                if Path(model.base_path).name == model.name:
                    root = str(Path(model.base_path).parent)
                    break
        return f"{root or self.models.resolve()}/{name}"

    def version_before(self, label: str, now: int) -> int:
        """The version to roll ``label`` back to, which points at ``now``.

        Raises:
            NotFound: there is none.
        """
        known = plans.version_before(self.journal.entries(), label, now)
        if known is not None:
            return known
        lower = [number for number in self.versions if number < now]
        if not lower:
            raise NotFound(f"{self.name} has no version before {now}")
        return max(lower)

    def check_servers(self) -> None:
        """Check that every server answers, and that a reload unloads no model.

        Raises:
            Unavailable: a server does not answer.
            FailedPrecondition: a server serves a model that ``models.config`` does not
                list. Where that file is not there yet, `listed` lists them all.
        """
        self.fleet.statuses(self.name)
        if not (self.models / models_config.FILE_NAME).exists():
            return
        known = set(layout.model_names(self.models)) - {self.name}
        for name in sorted(known - set(models_config.read(self.models).names)):
            for target, statuses in self.fleet.statuses(name).items():
                if any(status.state is State.AVAILABLE for status in statuses):
                    entry = ModelsConfig().with_block(name, new_block(name, self._base_path(name))).text
                    raise FailedPrecondition(
                        f"{target} serves {name}, but {self.models / models_config.FILE_NAME} does not list "
                        f"it, and a reload would unload it: start servers with --model_config_file, or add\n"
                        f"{entry}"
                    )

    def check_paths(self, version: int | None = None) -> None:
        """Check that servers on this machine find the model where they will be sent.

        Where the process of a server cannot be seen, nothing is checked.

        Raises:
            FailedPrecondition: a server has the model from another directory than
                ``models.config`` says, or does not see the version there.
        """
        file = self.models / models_config.FILE_NAME
        block = self.current[self.name]
        path = self._base_path(self.name) if block is None else model_in(block).base_path
        remedy = (
            "say where servers see the repository with --serving-root"
            if block is None
            else f"correct base_path in {file}, or remove the entry of {self.name} from it"
        )
        for target in self.fleet.clients:
            server = local_servers.find(target)
            if server is None:
                continue
            told = server.base_path(self.name)
            if told is not None and not server.same(told, path):
                raise FailedPrecondition(
                    f"{target} serves {self.name} from {told}, and would be sent to {path}; nothing was "
                    f"changed: {remedy}"
                )
            if version is not None and not server.sees(f"{path}/{version}"):
                raise FailedPrecondition(
                    f"{target} does not see version {version} of {self.name} in {path}, where it would be "
                    f"sent; nothing was changed: {remedy}"
                )

    def listed(self, *, write: bool = True) -> Situation:
        """The same with what servers have already in ``models.config``.

        So a server of one model, or of all folders, can be promoted on: without an
        entry to put back, a promotion that fails would unload the model. Where there is
        no ``models.config`` yet, that goes for every model of the repository.

        Raises:
            FailedPrecondition: where a server sees the repository is not known, or it
                serves another model of that name.
        """
        first = not (self.models / models_config.FILE_NAME).exists()
        names = layout.model_names(self.models) if first else [self.name]
        blocks: dict[str, str] = {}
        for name in names:
            if name not in self.current or self.current[name] is None:
                serving = self._serving(name)
                self._check_place(name, serving)
                if serving:
                    blocks[name] = new_block(name, self._base_path(name))
        if not blocks:
            return self
        if write:
            models_config.edit(self.models, blocks)
            listed = ", ".join(blocks)
            self.fleet.progress(f"{self.models / models_config.FILE_NAME} lists {listed} from now on")
        mine = {name: block for name, block in blocks.items() if name in self.current}
        return replace(self, current={**self.current, **mine})

    def _serving(self, name: str) -> dict[str, set[int]]:
        """The servers that serve a model, and which versions of it."""
        found = {
            target: {status.version for status in statuses if status.state is State.AVAILABLE}
            for target, statuses in self.fleet.statuses(name).items()
        }
        return {target: versions for target, versions in found.items() if versions}

    def _check_place(self, name: str, serving: Mapping[str, set[int]]) -> None:
        """Check that servers have a model from here, and where they see it."""
        for target, versions in serving.items():
            if name != self.name and versions.difference(layout.versions(self.models, name)):
                raise FailedPrecondition(
                    f"{target} serves another {name} than {self.models / name}, which a reload would unload; "
                    f"nothing was changed: write an entry of it to {self.models / models_config.FILE_NAME}"
                )
            if (
                self.serving_root is None
                and local_servers.on_loopback(target)
                and local_servers.find(target) is None
            ):
                raise FailedPrecondition(
                    f"{target} serves {self.name}, and where it sees {self.models} cannot be told from here; "
                    "nothing was changed: give that path with --serving-root, which is /models in our "
                    "containers"
                )


def find(models: Path, name: str, fleet: Fleet, serving_root: str | None) -> Situation:
    """The situation of one model.

    Raises:
        FailedPrecondition: another model has the name that candidates of this one need.
        SpikelessError: ``models.config`` or the journal cannot be read.
    """
    config = models_config.read(models)
    _check_canary_name(models, name, config)
    current: Blocks = {name: config.block(name) for name in (name, name + CANARY_SUFFIX)}
    unfinished = Journal(models, name).unfinished()
    if unfinished is not None:
        what = f"a {unfinished.action} to version {unfinished.version} was cut short"
        if current in unfinished.states:
            fleet.progress(f"{what}: going on from there")
        else:
            fleet.progress(f"{what}, but models.config was edited since: that counts")
            unfinished = None
    return Situation(models, name, fleet, serving_root, layout.versions(models, name), current, unfinished)


def _check_canary_name(models: Path, name: str, config: ModelsConfig) -> None:
    canary = name + CANARY_SUFFIX
    configured = (config.model(name), config.model(canary))
    paths = {model.base_path for model in configured if model is not None}
    if (models / canary).exists() or len(paths) > 1:
        raise FailedPrecondition(f"{canary} is another model, but candidates of {name} need its name")


def _available(everywhere: Iterable[Iterable[VersionStatus]]) -> frozenset[int]:
    return frozenset(
        status.version for statuses in everywhere for status in statuses if status.state is State.AVAILABLE
    )
