"""What a store says is checked before anything of it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from spikeless.errors import DataLoss, FailedPrecondition, SpikelessError
from spikeless.store import pieces
from spikeless.store.manifest import MAX_DIFFERENCES, Stored, read_index, read_manifest

DIGEST = "0123456789abcdef" * 4


def stored(**fields: Any) -> dict[str, Any]:
    return {"sha256": DIGEST, "encoding": "zstd", "object": DIGEST, "bytes": 9, **fields}


def file(**fields: Any) -> dict[str, Any]:
    return {
        "path": "saved_model.pb",
        "mode": 0o644,
        "size": 5,
        "sha256": DIGEST,
        "pieces": [[stored()]],
        **fields,
    }


def manifest(**fields: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "tool": "test",
        "model": "ctr",
        "version": 7,
        "base": None,
        "trained": 1.5,
        "pushed": 2.5,
        "warmup": False,
        "mapped": [],
        "piece_bytes": 4096,
        "files": [file()],
        **fields,
    }


BAD_FILES: list[dict[str, Any]] = [
    {"mode": 0o4755},
    {"mode": 0o666},
    {"mode": 0o600},
    {"mode": -1},
    {"size": -1},
    {"size": 1 << 60},
    {"size": 5000},
    {"size": 0},
    {"sha256": DIGEST[:-1]},
    {"sha256": DIGEST + "\n"},
    {"sha256": DIGEST.upper()},
    {"pieces": [[]]},
    {"pieces": [[stored(encoding="xor")]]},
    {"pieces": [[stored(), stored()]]},
    {"pieces": [[stored(), *[stored(encoding="xor")] * (MAX_DIFFERENCES + 1)]]},
    {"pieces": [[stored(encoding="pickle")]]},
    {"pieces": [[stored(bytes=0)]]},
    {"pieces": [[stored(bytes=1 << 40)]]},
    {"pieces": [[stored(object="../" + DIGEST[3:])]]},
]


def read(content: dict[str, Any]) -> Any:
    return read_manifest(json.dumps(content).encode(), "store/7.json", "ctr", 7)


def test_a_manifest_is_read_and_written_the_same() -> None:
    found = read(manifest())
    assert read_manifest(found.to_json(), "again", "ctr", 7) == found
    assert found.size == 5
    assert list(found.extents(found.files[0])) == [(0, 5, found.files[0].pieces[0])]


@pytest.mark.parametrize(
    "path",
    [
        *("../../etc/passwd", "/etc/passwd", "a/../../b", "a//b", "a/", ".", "..", "a/./b", "", "a\\b"),
        *("a\0b", "a\nb", "x" * 256, "/".join("x" * 9 for _ in range(200)), "saved_model.pb/x"),
    ],
)
def test_no_path_leaves_the_version(path: str) -> None:
    with pytest.raises(DataLoss, match=r"cannot be used: .*push the version again"):
        read(manifest(files=[file(), file(path=path)]))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"version": 8},
        {"version": -1},
        {"version": 1 << 63},
        {"version": "7"},
        {"unknown": 1},
        {"files": []},
        {"files": [file(path="other")]},
        {"files": [file(), file()]},
        {"piece_bytes": 1 << 30},
        {"piece_bytes": 0},
        {"trained": -1},
        {"tool": "x" * 2000},
        *({"files": [file(**change)]} for change in BAD_FILES),
    ],
)
def test_what_no_manifest_may_say(change: dict[str, Any]) -> None:
    with pytest.raises(DataLoss, match=r"store/7\.json cannot be used: "):
        read(manifest(**change))


def test_a_newer_format_is_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"store/7\.json has format 2, .*: update Spikeless"):
        read({"format": 2, "anything": "else"})


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[" * 100_000, b"\xff", b'{"format": "1"}'])
@pytest.mark.parametrize(
    "reader",
    [lambda data: read_manifest(data, "there", "ctr", 7), lambda data: read_index(data, "there", "ctr")],
)
def test_what_is_no_json_of_ours(data: bytes, reader: Callable[[bytes], Any]) -> None:
    with pytest.raises(DataLoss, match="there cannot be used: "):
        reader(data)


def test_an_index_is_in_order_and_of_its_model() -> None:
    def entry(version: int) -> dict[str, Any]:
        return {"version": version, "manifest": DIGEST, "bytes": 9}

    def index(*versions: int, model: str = "ctr") -> bytes:
        return json.dumps(
            {"format": 1, "model": model, "versions": [entry(version) for version in versions]}
        ).encode()

    assert [found.version for found in read_index(index(1, 2), "there", "ctr").versions] == [1, 2]
    for bad in (index(2, 1), index(1, 1), index(1, model="other")):
        with pytest.raises(DataLoss):
            read_index(bad, "there", "ctr")


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for reader in (lambda: read_manifest(data, "there", "ctr", 7), lambda: read_index(data, "there", "ctr")):
        with pytest.raises(SpikelessError):
            reader()


def _applied(stored: Stored, data: bytes, size: int, base: bytes = b"") -> bytes:
    content = bytearray(base or b"\1" * size)
    pieces.apply(stored, data, memoryview(content))
    return bytes(content)


@given(st.data(), st.binary(min_size=1, max_size=3000))
def test_a_piece_comes_back(data: st.DataObject, content: bytes) -> None:
    first, packed = pieces.whole(content)
    assert _applied(first, packed, len(content)) == content
    base = data.draw(st.binary(min_size=len(content), max_size=len(content)))
    made = pieces.difference(content, base, (first,))
    if made is not None:
        assert _applied(*made, len(content), base) == content
    assert pieces.difference(content, base + b"x", (first,)) is None


def test_a_piece_of_several_steps_comes_back() -> None:
    content = np.random.default_rng(2).integers(0, 4, 3_000_001, np.uint8).tobytes()
    first, packed = pieces.whole(content)
    assert first.encoding == "zstd"
    assert _applied(first, packed, len(content)) == content
    changed = bytes(1000) + content[1000:]
    made = pieces.difference(changed, content, (first,))
    assert made is not None
    assert _applied(*made, len(content), content) == changed


def test_a_piece_is_whole_again_when_differences_would_add_up() -> None:
    random = np.random.default_rng(1)
    table = random.standard_normal((4096, 64), np.float32)
    chain = (pieces.whole(table.tobytes())[0],)
    changed = table.copy()
    changed[::100] += 1
    small = pieces.difference(changed.tobytes(), table.tobytes(), chain)
    assert small is not None
    assert small[0].bytes < 0.02 * table.nbytes
    assert pieces.difference((2 * table + 1).tobytes(), table.tobytes(), chain) is None
    often = (*chain, *[small[0]] * MAX_DIFFERENCES)
    assert pieces.difference(changed.tobytes(), table.tobytes(), often) is None
    heavy = (*chain, Stored(DIGEST, "xor", DIGEST, table.nbytes // 4))
    assert pieces.difference(changed.tobytes(), table.tobytes(), heavy) is None


def test_an_object_expands_to_its_piece_and_no_further() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    whole, data = pieces.whole(bytes(1000))
    for damaged in (bomb, endless, b"no frame", data[:-1], data + b"more", data + data):
        with pytest.raises(DataLoss, match=f"object {whole.object} "):
            _applied(whole, damaged, 1000)
    with pytest.raises(DataLoss, match="has 1 bytes instead of 1000"):
        _applied(Stored(DIGEST, "raw", DIGEST, 1), b"x", 1000)
