"""The journal: appended to, never broken by what a crash left."""

from __future__ import annotations

import json

import pytest

from spikeless.errors import FailedPrecondition
from spikeless.repository.journal import Journal


def test_records_come_back_in_order_with_who_and_when(tmp_path):
    journal = Journal(tmp_path / "state")
    assert journal.records() == []
    assert journal.unfinished() is None
    journal.append("begin", id="1", version=2)
    journal.append("end", id="1", result="promoted")
    first, second = journal.records()
    assert (first["event"], first["version"], second["result"]) == ("begin", 2, "promoted")
    assert {"time", "user", "host", "pid"} <= set(first)
    assert [json.loads(line) for line in journal.path.read_text().splitlines()] == [first, second]


def test_a_line_that_was_cut_short_is_left_alone(tmp_path):
    journal = Journal(tmp_path)
    journal.append("begin", id="1")
    whole = journal.path.read_bytes()
    for cut in range(1, len(whole)):
        journal.path.write_bytes(whole + whole[:cut])
        journal.append("end", id="1", result="promoted")
        events = [record["event"] for record in journal.records()]
        # The last byte is the line's end: without it, the record is whole all the same.
        assert events in (["begin", "end"], ["begin", "begin", "end"])
        assert journal.unfinished() is None


def test_unfinished_is_the_last_change_without_an_end(tmp_path):
    journal = Journal(tmp_path)
    journal.append("begin", id="1")
    journal.append("begin", id="2")
    journal.append("end", id="1", result="promoted")
    assert journal.unfinished()["id"] == "2"
    journal.append("end", id="2", result="put back")
    assert journal.unfinished() is None
    journal.append("prune", version=1)
    assert journal.unfinished() is None


def test_a_journal_that_cannot_be_written_names_itself(tmp_path):
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(FailedPrecondition, match=str(tmp_path / "journal.jsonl")):
        Journal(tmp_path).append("begin")
    with pytest.raises(FailedPrecondition, match="cannot read"):
        Journal(tmp_path).records()
