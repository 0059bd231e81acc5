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
      | (?P<mark>[{}<>\[\]:,;/])""",
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


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def parse(text: str) -> Message:
    """The message that ``text`` holds; its start and end are those of the text.

    Raises:
        InvalidArgument: it is not in text format; the message says in which line.
    """
    parser = _Parser(text)
    return Message(0, len(text), parser.fields(""))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._tokenize())
        self._next = 0

    def _tokenize(self) -> Iterator[_Token]:
        at = 0
        while at < len(self._text):
            match = _TOKEN.match(self._text, at)
            if match is None:
                raise self._error(at)
            kind = match.lastgroup or ""
            if kind != "space":
                yield _Token(kind, match[0], at, match.end())
            at = match.end()
        yield _Token("end", "", at, at)

    def _error(self, at: int) -> InvalidArgument:
        line = self._text.count("\n", 0, at) + 1
        found = self._text[at : at + 20].split("\n")[0] or "the end"
        return InvalidArgument(f"line {line}: cannot make sense of {found!r}")

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _advance(self) -> _Token:
        token = self._tokens[self._next]
        self._next += 1
        return token

    def _expect(self, text: str) -> _Token:
        token = self._advance()
        if token.text != text or token.kind == "string":
            raise self._error(token.start)
        return token

    def fields(self, closing: str) -> tuple[TextField, ...]:
        """Fields up to the token ``closing``, which stays."""
        found = []
        while not (self._peek().kind in ("mark", "end") and self._peek().text == closing):
            found.append(self._field())
        return tuple(found)

    def _field(self) -> TextField:
        name = self._advance()
        if name.text == "[" and name.kind == "mark":
            # An extension, or the type of an Any: [example.com/package.Type].
            while self._peek().kind == "word" or self._peek().text in ("/", "."):
                self._advance()
            self._expect("]")
        elif name.kind != "word":
            raise self._error(name.start)
        if self._peek().text == ":":
            self._advance()
        elif self._peek().text not in _CLOSING:
            raise self._error(self._peek().start)
        is_list = self._peek().kind == "mark" and self._peek().text == "["
        messages = self._value()
        if self._peek().text in (",", ";") and self._peek().kind == "mark":
            self._advance()
        return TextField(name.text, name.start, self._tokens[self._next - 1].end, messages, is_list)

    def _value(self) -> tuple[Message, ...]:
        token = self._peek()
        if token.text in _CLOSING and token.kind == "mark":
            return (self._message(),)
        if token.text == "[" and token.kind == "mark":
            return self._list()
        self._scalar()
        return ()

    def _message(self) -> Message:
        opening = self._advance()
        fields = self.fields(_CLOSING[opening.text])
        closing = self._expect(_CLOSING[opening.text])
        return Message(opening.start, closing.end, fields)

    def _list(self) -> tuple[Message, ...]:
        self._expect("[")
        found: list[Message] = []
        while self._peek().text != "]":
            if self._peek().text in _CLOSING and self._peek().kind == "mark":
                found.append(self._message())
            else:
                self._scalar()
            if self._peek().text != "]":
                self._expect(",")
        self._expect("]")
        return tuple(found)

    def _scalar(self) -> None:
        token = self._advance()
        if token.kind == "string":
            while self._peek().kind == "string":
                self._advance()
        elif token.kind != "word":
            raise self._error(token.start)
        elif token.text == "-":
            self._advance()
