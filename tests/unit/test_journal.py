"""The journal: appended to, never broken by what a crash left, read across releases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spikeless.errors import FailedPrecondition
from spikeless.repository.journal import (
    SCHEMA,
    ChangeBegun,
    ChangeEnded,
    Checked,
    Entry,
    Findings,
    Journal,
    Latencies,
    Published,
    Removed,
    Requests,
    Soaked,
    Step,
)

BLOCKS = {"m": 'config { name: "m" }', "m-canary": None}
ENTRIES: list[Entry] = [
    Published(2, 1000, 1, gates=("files", "trial"), findings=Findings(load=0.5, warmup=3, first=0.1)),
    ChangeBegun("1", "promote", 2, "stable", 1, "better", ("a:1",), (Step("as it was", BLOCKS),)),
    Checked("1", "a:1", "m-canary", 3),
    Checked("1", "a:1", "m", 3, candidate=Latencies(3, 0, 1.0, 2.0), stable=Latencies(3, 3)),
    Soaked("1", "a:1", Latencies(), Latencies(), Requests(7, 1)),
    ChangeEnded("1", "promoted"),
    Removed(1, 900),
]


def begun(identity: str) -> ChangeBegun:
    return ChangeBegun(identity, "promote", 2, "stable", 1)


def write_lines(journal: Journal, *lines: object) -> None:
    journal.path.parent.mkdir(parents=True, exist_ok=True)
    journal.path.write_text("".join(f"{json.dumps(entry)}\n" for entry in lines))


def test_the_operator_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container everybody is root, or a number."""
    journal = Journal(tmp_path, "m")
    journal.append(ENTRIES[0])
    monkeypatch.setenv("SPIKELESS_OPERATOR", "ada")
    journal.append(ENTRIES[0])
    before, named = (json.loads(line)["user"] for line in journal.path.read_text().splitlines())
    assert (before != "ada", named) == (True, "ada")


def test_entries_come_back_in_order_with_who_and_when(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    assert journal.entries() == []
    assert journal.unfinished() is None
    for entry in ENTRIES:
        journal.append(entry)
    assert journal.entries() == ENTRIES
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["publish", "begin", "check", "check", "soak", "end", "prune"]
    assert all(line.keys() >= {"schema", "time", "user", "host", "pid"} for line in lines)
    assert lines[1]["steps"][0]["blocks"] == BLOCKS


def test_a_line_that_was_cut_short_is_left_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    begin, end = begun("1"), ChangeEnded("1", "promoted")
    journal.append(begin)
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole)):
        journal.path.write_bytes(whole + whole[:cut])
        journal.append(end)
        # The last byte is the line's end: without it, the record is whole all the same.
        assert journal.entries() in ([begin, end], [begin, begin, end])
        assert journal.unfinished() is None


def test_unfinished_is_the_last_change_without_an_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    journal.append(begun("1"))
    journal.append(begun("2"))
    journal.append(ChangeEnded("1", "promoted"))
    assert journal.unfinished() == begun("2")
    journal.append(ChangeEnded("2", "put back"))
    assert journal.unfinished() is None
    journal.append(Removed(1, 0))
    assert journal.unfinished() is None


def test_lines_of_older_releases_are_read(tmp_path: Path) -> None:
    """As they were written before lines had a schema."""
    journal = Journal(tmp_path, "m")
    who = {"time": "2025-11-25T12:00:00.000+00:00", "user": "root", "host": "here", "pid": 7}
    steps = [{"title": "as it was", "blocks": BLOCKS, "loads": False, "ask": "", "compare": False}]
    change = {"action": "promote", "version": 2, "label": "stable", "previous": None, "reason": ""}
    sent = {"requests": 3, "errors": 0, "p50_ms": 1.0, "p99_ms": None}
    write_lines(
        journal,
        {"event": "publish", **who, "version": 2, "bytes": 5, "stable": None, "allow_breaking": True}
        | {"findings": {"load": 0.5, "memory": 1, "warmup": 0, "golden": 0, "stable_requests": 0}},
        {"event": "begin", **who, "id": "1", **change, "servers": ["a:1"], "steps": steps},
        {"event": "check", **who, "id": "1", "server": "a:1", "servable": "m", "requests": 3},
        {"event": "soak", **who, "id": "1", "server": "a:1", "candidate": sent, "stable": sent}
        | {"traffic": {"requests": 1.0, "errors": 0.0}},
        {"event": "end", **who, "id": "1", "result": "put back", "error": "why"},
        {"event": "prune", **who, "version": 1, "bytes": 9},
    )
    assert journal.entries() == [
        Published(2, 5, allow_breaking=True, findings=Findings(load=0.5, memory=1)),
        ChangeBegun("1", "promote", 2, "stable", None, "", ("a:1",), (Step("as it was", BLOCKS),)),
        Checked("1", "a:1", "m", 3),
        Soaked("1", "a:1", Latencies(3, 0, 1.0), Latencies(3, 0, 1.0), Requests(1, 0)),
        ChangeEnded("1", "put back", "why"),
        Removed(1, 9),
    ]


def test_unknown_events_and_fields_are_kept_and_skipped(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    end = {"schema": SCHEMA, "event": "end", "id": "1", "result": "promoted", "mood": "good"}
    write_lines(journal, {"schema": SCHEMA, "event": "moved", "to": "elsewhere"}, end)
    journal.append(Removed(1, 0))
    assert journal.entries() == [ChangeEnded("1", "promoted"), Removed(1, 0)]
    assert "elsewhere" in journal.path.read_text()


def test_lines_that_cannot_be_understood_name_the_file_and_the_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    journal.append(Removed(1, 0))
    with journal.path.open("a") as file:
        file.write('{"schema":2,"event":"end"}\n')
    with pytest.raises(FailedPrecondition, match=r"journal.jsonl: line 2 has schema 2, .*update Spikeless"):
        journal.unfinished()
    write_lines(journal, {"event": "end", "id": "1"})
    with pytest.raises(FailedPrecondition, match=r"journal.jsonl: line 1 cannot be read: .*'result'"):
        journal.entries()


def test_a_journal_that_cannot_be_written_names_itself(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "m")
    journal.path.mkdir(parents=True)
    with pytest.raises(FailedPrecondition, match=str(journal.path)):
        journal.append(begun("1"))
    with pytest.raises(FailedPrecondition, match="cannot read"):
        journal.entries()
