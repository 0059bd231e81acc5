"""Recorded load: what a capture says of when its requests arrived."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spikeless import bench
from spikeless.bench.recorded import planned
from spikeless.errors import InvalidArgument, NotFound
from spikeless.formats import captures, tfrecord
from spikeless.formats.protos import prediction_log_pb2

#: 2026, in nanoseconds.
START = 1_767_225_600 * 10**9


def write_capture(path: Path, *calls: tuple[str, float | None]) -> Path:
    """A capture of these calls: model, and seconds after the start; None: unknown."""
    records = []
    for number, (model, second) in enumerate(calls):
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.model_spec.name = model
        log.predict_log.request.inputs["x"].int64_val.append(number)
        if second is not None:
            captures.stamp(log, START + round(second * 1e9))
        records.append(log.SerializeToString())
    tfrecord.write(path, records)
    return path


def settings(path: Path, speed: float = 1.0, seconds: float = 60.0) -> bench.Settings:
    return bench.Settings("a", str(path), seconds=seconds, arrivals="recorded", speed=speed, warm_seconds=0)


def test_requests_leave_as_they_arrived(tmp_path: Path) -> None:
    """In the order of arrival, which is not that of the file; other models stay out."""
    path = write_capture(tmp_path / "one", ("a", 2.5), ("b", 0.1), ("a", 0.25), ("a", 1.0))
    recording = bench.read_recording(path, "a")
    assert recording.offsets == pytest.approx([0.0, 0.75, 2.25])
    assert recording.numbers.tolist() == [2, 3, 0]
    assert recording.others == 1
    assert recording.rate == pytest.approx(2 / 2.25)
    assert recording.seconds == pytest.approx(2.25 * 3 / 2)
    plan = planned(settings(path, speed=2.0))
    assert plan.offsets == pytest.approx([0.0, 0.375, 1.125])
    sent = [plan.requests[number].message for number in plan.numbers]
    assert [bytes([1, number]) in message for number, message in zip((2, 3, 0), sent, strict=True)]
    assert planned(settings(path, seconds=0.9)).offsets == pytest.approx([0.0, 0.75])


def test_a_folder_of_captures_is_one_recording(tmp_path: Path) -> None:
    write_capture(tmp_path / "1.tfrecord", ("a", 0.0), ("a", 2.0))
    write_capture(tmp_path / "2.tfrecord", ("a", 1.0), ("a", 3.0))
    recording = bench.read_recording(tmp_path, "a")
    assert recording.offsets.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert recording.numbers.tolist() == [0, 2, 1, 3]
    assert len(planned(settings(tmp_path)).requests) == 4


def test_whole_seconds_are_spread(tmp_path: Path) -> None:
    """As the request logs of TensorFlow Serving have them."""
    path = write_capture(tmp_path / "log", ("a", 5.0), ("a", 5.0), ("a", 6.0), ("a", 6.0), ("a", 6.0))
    found = bench.read_recording(path, "a").offsets
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 4 / 3, 5 / 3])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([("a", 0.0), ("a", None)], "record 2 does not say when its request arrived: record it with"),
        ([("b", 0.0), ("c", 1.0)], "0 requests for a, .* it has requests for b, c"),
        ([("a", 1.0), ("a", 1.0)], "2 requests for a, .*fewer than two moments"),
    ],
)
def test_what_cannot_be_replayed(tmp_path: Path, calls: list[tuple[str, float | None]], message: str) -> None:
    path = write_capture(tmp_path / "calls", *calls)
    with pytest.raises(InvalidArgument, match=message):
        bench.read_recording(path, "a")


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        bench.read_recording(tmp_path / "nowhere", "a")


def test_settings_of_a_recording() -> None:
    with pytest.raises(InvalidArgument, match="a speed is positive, and of a recording"):
        bench.Settings("a", "requests", speed=2.0)
    with pytest.raises(InvalidArgument, match="its own batch sizes"):
        bench.Settings("a", "requests", arrivals="recorded", batch_sizes="1:1")
