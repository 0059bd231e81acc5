"""``models.config``: which versions of which models are served, and their labels.

In: the file, a ``ModelServerConfig`` in text format (a server's
``--model_config_file``). Out: the same file with one model's versions and labels
changed, and everything else as it was: comments, layout, other models, and fields that
this program does not know.

It is replaced by one rename, so a server never reads half of it. An edit holds an
exclusive lock, and sending it to servers a shared one: all servers get the newest
content.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from google.protobuf import text_encoding, text_format

from spikeless.disk import locks
from spikeless.disk.atomic import atomic_writer
from spikeless.errors import FailedPrecondition, Internal, InvalidArgument, SpikelessError
from spikeless.formats.protos import model_server_config_pb2
from spikeless.repository import textproto

FILE_NAME = "models.config"
#: The label of the version that most callers get.
STABLE = "stable"
#: The name of a model -> the text of its ``config { ... }``, None where it has none.
Blocks = Mapping[str, str | None]
_LIST, _MODEL = "model_config_list", "config"
_POLICY, _LABELS = "model_version_policy", "version_labels"


@dataclass(frozen=True)
class ModelsConfig:
    """The content of a ``models.config``. It never changes; an edit makes a new one."""

    text: str = ""

    @cached_property
    def message(self) -> model_server_config_pb2.ModelServerConfig:
        """The message to send to a server, without fields that are unknown here."""
        return _parsed(self.text, model_server_config_pb2.ModelServerConfig())

    @property
    def names(self) -> list[str]:
        """The names of the models, in the order of the file."""
        return [model.name for model in self.message.model_config_list.config]

    def model(self, name: str) -> model_server_config_pb2.ModelConfig | None:
        """What is configured for a model, or None."""
        return next((model for model in self.message.model_config_list.config if model.name == name), None)

    def block(self, name: str) -> str | None:
        """The text of a model's ``config { ... }``, or None."""
        for field in self._models():
            if _name_in(self._text_of(field)) == name:
                return self._text_of(field)
        return None

    def with_block(self, name: str, block: str | None) -> ModelsConfig:
        """The same with another ``config { ... }`` for a model; None removes the model.

        Raises:
            InvalidArgument: ``block`` configures another model.
        """
        if block is not None and _name_in(block) != name:
            raise InvalidArgument(f"this configures {_name_in(block)!r}, not {name!r}: {block}")
        for field in self._models():
            if _name_in(self._text_of(field)) == name:
                edited = self._replaced(field, block)
                break
        else:
            edited = self if block is None else self._appended(block)
        return edited._checked(self, name)

    def _text_of(self, field: textproto.TextField) -> str:
        return self.text[field.start : field.end]

    def _models(self) -> Iterator[textproto.TextField]:
        for models in textproto.parse(self.text).all(_LIST):
            for message in models.messages:
                yield from message.all(_MODEL)

    def _replaced(self, field: textproto.TextField, block: str | None) -> ModelsConfig:
        start, end = field.start, field.end
        if block is None:
            start, end = _whole_lines(self.text, start, end)
        return ModelsConfig(self.text[:start] + (block or "") + self.text[end:])

    def _appended(self, block: str) -> ModelsConfig:
        lists = [message for field in textproto.parse(self.text).all(_LIST) for message in field.messages]
        if not lists:
            gap = "\n" if self.text and not self.text.endswith("\n") else ""
            return ModelsConfig(f"{self.text}{gap}{_LIST} {{\n  {block}\n}}\n")
        closing = lists[-1].end - 1
        line = self.text.rfind("\n", 0, closing) + 1
        if self.text[line:closing].isspace() or line == closing:
            return ModelsConfig(f"{self.text[:line]}  {block}\n{self.text[line:]}")
        return ModelsConfig(f"{self.text[:closing]}\n  {block}\n{self.text[closing:]}")

    def _checked(self, old: ModelsConfig, name: str) -> ModelsConfig:
        """An edit of one model must not change what another one means."""
        if [model for model in old.message.model_config_list.config if model.name != name] != [
            model for model in self.message.model_config_list.config if model.name != name
        ]:
            raise Internal(
                f"editing {name} in {FILE_NAME} would have changed another model; nothing is written"
            )
        return self


def new_block(name: str, base_path: str) -> str:
    """A ``config { ... }`` for a new model, of which the latest version is served."""
    return (
        f"{_MODEL} {{\n"
        f"    name: {_quoted(name)}\n"
        f"    base_path: {_quoted(base_path)}\n"
        f'    model_platform: "tensorflow"\n'
        "  }"
    )


def with_versions(block: str, versions: Collection[int], labels: Mapping[str, int]) -> str:
    """The text of a ``config { ... }`` with other specific versions and labels.

    Raises:
        InvalidArgument: a label points at a version that would not be served, or there
            are no versions.
    """
    wanted = model_server_config_pb2.ModelConfig()
    wanted.model_version_policy.specific.versions.extend(sorted(versions))
    for label, version in labels.items():
        wanted.version_labels[label] = version
    stray = {label: version for label, version in labels.items() if version not in versions}
    if stray or not versions:
        raise InvalidArgument(f"labels {stray} point at versions that are not served: {sorted(versions)}")

    model = model_in(block)
    if model.model_version_policy != wanted.model_version_policy:
        numbers = " ".join(f"versions: {version}" for version in sorted(versions))
        block = _with_field(block, _POLICY, [f"{_POLICY} {{ specific {{ {numbers} }} }}"])
    if dict(model.version_labels) != dict(labels):
        lines = [f"{_LABELS} {{ key: {_quoted(label)} value: {labels[label]} }}" for label in sorted(labels)]
        block = _with_field(block, _LABELS, lines)
    return block


def model_in(block: str) -> model_server_config_pb2.ModelConfig:
    """What the text of a ``config { ... }`` means."""
    models: model_server_config_pb2.ModelConfigList = _parsed(
        block, model_server_config_pb2.ModelConfigList()
    )
    return models.config[0]


def _with_field(block: str, name: str, lines: list[str]) -> str:
    """A ``config { ... }`` with ``lines`` in the place of all fields ``name``."""
    old = list(_body(block).all(name))
    for field in reversed(old[1:] if lines else old):
        start, end = _whole_lines(block, field.start, field.end)
        block = block[:start] + block[end:]
    if not lines:
        return block
    if old:
        indent = block[block.rfind("\n", 0, old[0].start) + 1 : old[0].start]
        between = f"\n{indent}" if indent.isspace() else " "
        return block[: old[0].start] + between.join(lines) + block[old[0].end :]
    closing = _body(block).end - 1
    line = block.rfind("\n", 0, closing) + 1
    indent = block[line:closing]
    if line and not indent.strip():
        return block[:line] + "".join(f"{indent}  {text}\n" for text in lines) + block[line:]
    return block[:closing] + "".join(f" {text}" for text in lines) + " " + block[closing:]


def _body(block: str) -> textproto.Message:
    return textproto.parse(block).fields[0].messages[0]


def _whole_lines(text: str, start: int, end: int) -> tuple[int, int]:
    """A span, or the whole lines that it fills alone."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", end)
    last = len(text) if last < 0 else last + 1
    alone = not text[first:start].strip() and not text[end:last].strip()
    return (first, last) if alone and last > end else (start, end)


def _name_in(block: str) -> str:
    return str(model_in(block).name)


def _quoted(value: str) -> str:
    return f'"{text_encoding.CEscape(value.encode(), as_utf8=True)}"'


def _parsed(text: str, message: Any) -> Any:
    try:
        return text_format.Parse(text, message, allow_unknown_field=True)
    except (text_format.ParseError, RecursionError) as error:
        raise InvalidArgument(f"{FILE_NAME} is not in protocol buffer text format: {error}") from None


# --- the file ------------------------------------------------------------------------


def parse(text: str) -> ModelsConfig:
    """The content of a ``models.config``.

    Raises:
        InvalidArgument: it cannot be read as a ``ModelServerConfig``.
    """
    config = ModelsConfig(_without_lists(text))
    config.message  # noqa: B018 (raises where it is no ModelServerConfig)
    return config


def read(models: str | os.PathLike[str]) -> ModelsConfig:
    """The ``models.config`` of a repository; an empty one where there is none.

    Raises:
        InvalidArgument: it cannot be read as a ``ModelServerConfig``.
    """
    path = Path(models, FILE_NAME)
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ModelsConfig()
    except (SpikelessError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}; correct it by hand") from None
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def sending(models: str | os.PathLike[str]) -> Iterator[ModelsConfig]:
    """The file's content, which stays what it is for as long as this lasts."""
    with _lock(Path(models), shared=True):
        yield read(models)


def edit(models: str | os.PathLike[str], blocks: Blocks) -> ModelsConfig:
    """Give models another text (`ModelsConfig.with_block`), all in one step.

    Raises:
        FailedPrecondition: the file cannot be written; it is as it was.
    """
    path = Path(models, FILE_NAME)
    with _lock(Path(models)):
        old = config = read(models)
        for name, block in blocks.items():
            config = config.with_block(name, block)
        if config != old:
            _write(path, config.text)
    return config


def _write(path: Path, text: str) -> None:
    # A link stays one: its target is what gets replaced.
    target = path.resolve()
    try:
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644
        with atomic_writer(target) as file:
            os.fchmod(file.fileno(), mode)
            file.write(text.encode())
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be written ({error.strerror}) and is as it was; make room or allow it, and repeat"
        ) from error


def _lock(models: Path, *, shared: bool = False) -> IO[str]:
    try:
        return locks.acquire(models / f".{FILE_NAME}.lock", shared=shared)
    except OSError as error:
        raise FailedPrecondition(f"cannot lock {models / FILE_NAME}: {error.strerror}") from None


def _without_lists(text: str) -> str:
    """The text with ``config {...} config {...}`` for ``config: [{...}, {...}]``."""
    lists = [
        field
        for models in textproto.parse(text).all(_LIST)
        for message in models.messages
        for field in message.all(_MODEL)
        if field.is_list
    ]
    for field in reversed(lists):
        singles = (f"{_MODEL} {text[message.start : message.end]}" for message in field.messages)
        text = text[: field.start] + "\n  ".join(singles) + text[field.end :]
    return text
