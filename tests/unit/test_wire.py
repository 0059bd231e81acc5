"""Walking messages without parsing them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import InvalidArgument
from spikeless.formats import wire
from spikeless.formats.protos import tensor_pb2


@given(st.integers(0, 2**64 - 1))
def test_numbers_come_back(value: int) -> None:
    encoded = wire.write_varint(value)
    assert wire.read_varint(b"x" + encoded + b"y", 1) == (value, 1 + len(encoded))
    with pytest.raises(InvalidArgument, match="ends within a number"):
        wire.read_varint(encoded[:-1], 0)


def test_a_number_ends_after_ten_bytes() -> None:
    """One of a megabyte would take minutes: each byte would copy those before it."""
    assert wire.read_varint(b"\x80" * 9 + b"\x01", 0) == (1 << 63, 10)
    for content in (b"\x80" * 10, b"\xff" * (1 << 20)):
        with pytest.raises(InvalidArgument, match="number"):
            wire.read_varint(content, 0)


def test_no_more_fields_are_walked_than_are_allowed() -> None:
    content = memoryview(wire.field(1, b"a") * 3)
    allowed = wire.allowance(5)
    assert len(list(wire.fields(content, allowed))) == 3
    with pytest.raises(InvalidArgument, match="too many fields"):
        list(wire.fields(content, allowed))


@given(st.binary(max_size=300), st.lists(st.floats(width=32), max_size=50), st.integers(0, 2**31 - 1))
def test_fields_are_those_of_the_message(content: bytes, floats: list[float], version: int) -> None:
    message = tensor_pb2.TensorProto(tensor_content=content, float_val=floats, version_number=version)
    serialized = message.SerializeToString()
    found = list(wire.fields(memoryview(serialized)))
    assert b"".join(whole for _, whole, _ in found) == serialized
    values = {number: bytes(value) for number, _, value in found}
    assert values.get(4, b"") == content
    assert len(values.get(5, b"")) == 4 * len(floats)
    assert wire.field(4, content) in (serialized, *(bytes(whole) for _, whole, _ in found)) or not content


@given(st.binary(max_size=60))
def test_any_bytes_end_or_are_refused(content: bytes) -> None:
    try:
        for _, whole, value in wire.fields(memoryview(content)):
            assert len(value) <= len(whole)
    except InvalidArgument:
        pass
