"""Edit a message in protocol buffer text format without losing its comments and layout.

In: text. Out: its fields and their positions, at which the text can be edited. The
syntax is that of https://protobuf.dev/reference/protobuf/textformat-spec/. Values are
not interpreted: what the text means is `google.protobuf.text_format`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from spikeless.errors import InvalidArgument

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<word>[A-Za-z0-9_+\-.]+)
      | (?P<mark>[{}<>\[\]:,;/])
      | (?P<end>\Z)
      | (?P<unknown>.)""",
    re.VERBOSE,
)
_CLOSING = {"{": "}", "<": ">"}


@dataclass(frozen=True)
class Message:
    """A message value; ``text[start:end]`` includes its braces."""

    start: int
    end: int
    fields: tuple[TextField, ...]

    def all(self, name: str) -> Iterator[TextField]:
        """The fields of that name, in the order of the text."""
        return (field for field in self.fields if field.name == name)


@dataclass(frozen=True)
class TextField:
    """One field with its name, value and trailing separator, at ``text[start:end]``."""

    name: str
    start: int
    end: int
    #: The messages that are its value: one, or any number where the value is a list;
    #: none for a scalar.
    messages: tuple[Message, ...]
    #: Whether the value is a list: ``name: [...]``.
    is_list: bool


def parse(text: str) -> Message:
    """The message that ``text`` holds; its start and end are those of the text.

    Raises:
        InvalidArgument: it is not in text format; the message says in which line.
    """
    parser = _Parser(text)
    try:
        return Message(0, len(text), parser.fields(""))
    except RecursionError:
        raise InvalidArgument("its messages are nested too deeply") from None


class _Parser:
    """Looks one token ahead. No string equals a mark: its text includes the quotes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = (token for token in _TOKEN.finditer(text) if token.lastgroup != "space")
        self._next = next(self._tokens)
        #: Behind the last token that was taken.
        self._end = 0

    def _error(self, token: re.Match[str]) -> InvalidArgument:
        at = token.start()
        line = self._text.count("\n", 0, at) + 1
        found = self._text[at : at + 20].split("\n")[0] or "the end"
        return InvalidArgument(f"line {line}: cannot make sense of {found!r}")

    def _advance(self) -> re.Match[str]:
        token = self._next
        self._next, self._end = next(self._tokens, token), token.end()
        return token

    def _skip(self, *texts: str) -> bool:
        """Take the next token if it is one of these."""
        return self._next[0] in texts and bool(self._advance())

    def _expect(self, text: str) -> None:
        if not self._skip(text):
            raise self._error(self._next)

    def fields(self, closing: str) -> tuple[TextField, ...]:
        """Fields up to the token ``closing``, which stays."""
        found = []
        while self._next[0] != closing:
            found.append(self._field())
        return tuple(found)

    def _field(self) -> TextField:
        name = self._advance()
        if name[0] == "[":
            # An extension, or the type of an Any: [example.com/package.Type].
            while self._next.lastgroup == "word" or self._next[0] == "/":
                self._advance()
            self._expect("]")
        elif name.lastgroup != "word":
            raise self._error(name)
        if not self._skip(":") and self._next[0] not in _CLOSING:
            raise self._error(self._next)
        is_list = self._skip("[")
        messages = tuple(self._list() if is_list else self._value())
        self._skip(",", ";")
        return TextField(name[0], name.start(), self._end, messages, is_list)

    def _list(self) -> Iterator[Message]:
        while not self._skip("]"):
            yield from self._value()
            if self._next[0] != "]":
                self._expect(",")

    def _value(self) -> Iterator[Message]:
        """Its message, where the value is one."""
        token = self._advance()
        if token[0] in _CLOSING:
            closing = _CLOSING[token[0]]
            fields = self.fields(closing)
            self._expect(closing)
            yield Message(token.start(), self._end, fields)
        elif token.lastgroup == "string":
            while self._next.lastgroup == "string":
                self._advance()
        elif token.lastgroup != "word":
            raise self._error(token)
        elif token[0] == "-":
            yield from self._value()
