"""Capturing real requests through the relay, from a real server."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from promotion_models import NAME, X, start_server
from trained_models import spikeless

from spikeless.client import Client, model_spec
from spikeless.errors import Code, FailedPrecondition, InvalidArgument, SpikelessError
from spikeless.formats import captures, tfrecord
from spikeless.formats.protos import predict_pb2, prediction_log_pb2
from spikeless.formats.tensors import to_numpy, to_proto
from spikeless.repository import golden, layout
from spikeless.sidecars import recording
from spikeless.sidecars.capture import Capture, CaptureSettings
from spikeless.sidecars.captured_files import Rotation
from spikeless.sidecars.recording import MAX_PENDING_BYTES, Recorder, RecorderSettings, RelayedCall
from spikeless.warmup.records import read, warmup_file

PREDICT_METHOD = "/tensorflow.serving.PredictionService/Predict"


@pytest.fixture(scope="module")
def target(scales: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    models = tmp_path_factory.mktemp("capture") / "models"
    shutil.copytree(scales / "2", models / NAME / "1")
    config = f'name: "{NAME}" base_path: "{models / NAME}" model_platform: "tensorflow"'
    (models / "models.config").write_text(f"model_config_list {{ config {{ {config} }} }}")
    with start_server(models, "--enable_grpc_healthcheck_service=true") as server:
        yield server.target


@contextmanager
def capturing(target: str, out: Path, sample: float = 1.0, **more: Any) -> Iterator[tuple[Client, Capture]]:
    capture = Capture(CaptureSettings(target, "127.0.0.1:0", RecorderSettings(out, **more), sample))
    port = capture.start()
    try:
        with Client(f"127.0.0.1:{port}", timeout=60.0) as client:
            yield client, capture
    finally:
        capture.stop()


def test_records_become_warmup_and_golden_requests(target: str, scales: Path, tmp_path: Path) -> None:
    """The command, as a user runs it."""
    out = tmp_path / "samples.tfrecord"
    command = [sys.executable, "-m", "spikeless", "capture", "--server", target, "--listen=127.0.0.1:0"]
    command += ["--out", str(out), "--sample=1"]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    address = relay.stdout.readline().split()[1]
    with Client(address, timeout=60.0) as client:
        for rows in (1, 2, 4, 2, 1):
            x = np.full((rows, 2), rows, np.float32)
            np.testing.assert_array_equal(client.predict(NAME, {"x": x})["y"], 2 * x)
        assert client.statuses(NAME)[0].version == 1
    relay.send_signal(signal.SIGTERM)
    _, errors = relay.communicate(timeout=60)
    assert relay.returncode == 0
    assert f"relayed 6 calls; recorded 3 in {out}, 2 more were alike, 0 did not fit" in errors

    records = list(read(out))
    assert [record.kind and record.kind.name for record in records] == ["Predict"] * 3
    assert [record.request.inputs["x"].tensor_shape.dim[0].size for record in records] == [1, 2, 4]
    response = records[1].log.predict_log.response
    np.testing.assert_array_equal(to_numpy(response.outputs["y"]), np.full((2, 2), 4, np.float32))

    copy = shutil.copytree(scales / "2", tmp_path / "model")
    done = spikeless("warmup", "build", copy, "--samples", out)
    assert done.returncode == 0, done.stdout + done.stderr
    arguments = [NAME, "--models", tmp_path / "published", "--golden", out]
    done = spikeless("publish", copy, *arguments)
    assert done.returncode == 0, done.stderr
    (version,) = layout.versions(tmp_path / "published", NAME).values()
    assert len(golden.of_version(version).records) == 3
    done = spikeless("publish", scales / "3", *arguments)
    assert done.returncode == 1
    assert "gate golden: golden request 1 of 3: y is 3 at [0, 0] instead of 2" in done.stderr


def test_the_relay_changes_nothing(target: str, tmp_path: Path) -> None:
    """Error codes, deadlines, metadata and unknown methods come through unchanged."""
    with Client(target, timeout=60.0) as direct, capturing(target, tmp_path / "out") as (relayed, capture):
        calls: tuple[Callable[[Client], object], ...] = (
            lambda client: client.predict(NAME, {"x": X}),
            lambda client: client.predict("unknown", {"x": X}),
            lambda client: client.predict(NAME, {"x": X.astype(np.float64)}),
            lambda client: client.predict(NAME, {"x": X}, label="none"),
            lambda client: client.statuses(NAME),
            lambda client: client.signatures(NAME),
            lambda client: client.is_serving(),
        )
        for call in calls:
            assert outcome(call, relayed) == outcome(call, direct)

        def unknown(client: Client) -> Any:
            with grpc.insecure_channel(client.target) as channel:
                return method(channel, "/no.such.Service/Method")(b"", timeout=60)

        for client in (relayed, direct):
            with pytest.raises(grpc.RpcError) as refused:
                unknown(client)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with grpc.insecure_channel(relayed.target) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
            watching.cancel()
        big = np.zeros((2_000_000, 2), np.float32)
        np.testing.assert_array_equal(relayed.predict(NAME, {"x": big})["y"], big)
        assert capture.relayed > 8
    assert [record.request.model_spec.name for record in read(tmp_path / "out")] == [NAME, NAME]
    with capturing("127.0.0.1:1", tmp_path / "none") as (client, _), pytest.raises(SpikelessError) as caught:
        client.predict(NAME, {"x": X})
    assert caught.value.code is Code.UNAVAILABLE


def method(channel: grpc.Channel, name: str) -> Any:
    """A call of bytes; the stubs of grpc want functions where None will do."""
    return channel.unary_unary(name)  # type: ignore[call-arg]


def outcome(call: Callable[[Client], object], client: Client) -> object:
    try:
        return repr(call(client))
    except SpikelessError as error:
        return error.code, str(error)


def test_deadlines_and_cancellations_are_passed_on(target: str, tmp_path: Path) -> None:
    """A server that never answers sees the caller's deadline and its leaving."""
    seen: list[Any] = []
    left = threading.Event()

    class Never(grpc.GenericRpcHandler):  # type: ignore[type-arg]
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            def answer(request: bytes, context: Any) -> bytes:
                seen.append((context.time_remaining(), dict(context.invocation_metadata()).get("trace")))
                context.add_callback(left.set)
                left.wait(60)
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Never(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        relay = capturing(f"127.0.0.1:{port}", tmp_path / "out")
        with relay as (client, _), grpc.insecure_channel(client.target) as channel:
            call = method(channel, PREDICT_METHOD).future(b"", timeout=1000, metadata=[("trace", "7")])
            deadline = time.monotonic() + 60
            while not seen:
                assert time.monotonic() < deadline
                assert not call.done()
                time.sleep(0.01)
            call.cancel()
            assert left.wait(60), "the server was told that the caller left"
        (remaining, trace) = seen[0]
        assert 900 < remaining < 1100, "rounded on the way"
        assert trace == "7"
    finally:
        server.stop(0)


def test_limits_redaction_and_going_on(target: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with capturing(target, out, limit=2, redact=["x"]) as (client, capture):
        for rows in range(1, 5):
            client.predict(NAME, {"x": np.full((rows, 2), 7, np.float32)})
    first, second = read(out)
    assert not to_numpy(first.request.inputs["x"]).any()
    assert to_numpy(second.request.inputs["x"]).shape == (2, 2)
    assert not first.log.predict_log.HasField("response")
    assert capture.recorder.full

    whole = out.read_bytes()
    out.write_bytes(whole + whole[:30])  # as a kill may leave it
    with capturing(target, out, limit=3) as (client, capture):
        for rows in (1, 2, 3, 4):
            client.predict(NAME, {"x": np.ones((rows, 2), np.float32)})
    assert (capture.recorder.counts.alike, capture.recorder.counts.recorded) == (2, 1)
    assert out.read_bytes().startswith(whole)
    assert len(list(read(out))) == 3

    size = out.stat().st_size
    with capturing(target, out, limit=99, max_bytes=size + 10) as (client, capture):
        client.predict(NAME, {"x": np.ones((9, 2), np.float32)})
    assert (capture.recorder.counts.dropped, out.stat().st_size) == (1, size)
    with capturing(target, tmp_path / "rare", sample=1e-9) as (client, _):
        client.predict(NAME, {"x": X})
    assert list(read(tmp_path / "rare")) == []


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--sample 2"):
        CaptureSettings("a:1", "b:1", RecorderSettings(tmp_path / "out"), 2.0)
    with pytest.raises(InvalidArgument, match="--limit"):
        RecorderSettings(tmp_path / "out", limit=0)
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        Recorder(RecorderSettings(tmp_path / "no" / "where"))
    (tmp_path / "other").write_bytes(b"no records at all")
    with pytest.raises(FailedPrecondition, match="name another file with --out"):
        Recorder(RecorderSettings(tmp_path / "other"))
    assert (tmp_path / "other").read_bytes() == b"no records at all"
    with pytest.raises(SpikelessError, match=r"cannot listen on 256\.0\.0\.1:1"):
        Capture(CaptureSettings("a:1", "256.0.0.1:1", RecorderSettings(tmp_path / "out"))).start()
    assert not (tmp_path / "out").exists()


def test_a_full_disk_loses_records_but_no_call(target: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with capturing(target, small / "out", per_shape=1000) as (client, capture):
            x = np.arange(1200, dtype=np.float32).reshape(-1, 2)
            for _ in range(20):
                np.testing.assert_array_equal(client.predict(NAME, {"x": x})["y"], 2 * x)
        counts = capture.recorder.counts
        assert counts.recorded >= 1
        assert counts.unwritten >= 1
        assert counts.recorded + counts.unwritten == 20
        assert len(list(read(small / "out"))) == counts.recorded, "what fitted half is cut off"
    finally:
        subprocess.run(["umount", small], check=True)


def test_memory_is_bounded_while_the_disk_is_slow(tmp_path: Path) -> None:
    recorder = Recorder(RecorderSettings(tmp_path / "out", per_shape=1000))
    gate = threading.Event()
    write = recorder._write
    slow: Any = recorder
    slow._write = lambda call: (gate.wait(60), write(call))
    request = predict_pb2.PredictRequest(model_spec=model_spec(NAME))
    request.inputs["x"].CopyFrom(to_proto(np.zeros(1 << 20, np.float32)))
    content = request.SerializeToString()
    for _ in range(40):
        recorder.offer(RelayedCall(PREDICT_METHOD, content, b"", 1))
    held = MAX_PENDING_BYTES // len(content)
    assert 40 - held - 1 <= recorder.counts.dropped <= 40 - held
    recorder.offer(RelayedCall(PREDICT_METHOD, b"\xff\xff", b"", 1))
    gate.set()
    recorder.close()
    assert recorder.counts.recorded in (held, held + 1)


def test_examples_are_redacted_by_feature(tmp_path: Path) -> None:
    log = prediction_log_pb2.PredictionLog()
    request = log.classify_log.request
    for holder in (
        request.input.example_list_with_context.context,
        request.input.example_list_with_context.examples.add(),
    ):
        holder.features.feature["secret"].bytes_list.value.extend([b"a", b"b"])
        holder.features.feature["age"].int64_list.value.append(41)
        holder.features.feature["x"].float_list.value.append(1.5)
    recorder = Recorder(RecorderSettings(tmp_path / "out", redact=["secret", "age"]))
    recorder.offer(RelayedCall(PREDICT_METHOD.replace("Predict", "Nothing"), b"", b"", 1))
    classify = "/tensorflow.serving.PredictionService/Classify"
    recorder.offer(RelayedCall(classify, request.SerializeToString(), b"", 1))
    recorder.close()
    (record,) = read(tmp_path / "out")
    given = record.request.input.example_list_with_context
    for holder in (given.context, given.examples[0]):
        assert list(holder.features.feature["secret"].bytes_list.value) == [b"", b""]
        assert list(holder.features.feature["age"].int64_list.value) == [0]
        assert list(holder.features.feature["x"].float_list.value) == [1.5]


def call_of(rows: int, arrived: int = 1_700_000_000_123_456_789) -> RelayedCall:
    request = predict_pb2.PredictRequest(model_spec=model_spec(NAME))
    request.inputs["x"].CopyFrom(to_proto(np.full((rows, 2), rows, np.float32)))
    response = predict_pb2.PredictResponse(model_spec=model_spec(NAME, 3))
    return RelayedCall(PREDICT_METHOD, request.SerializeToString(), response.SerializeToString(), arrived)


def test_records_say_when_their_requests_arrived(target: str, tmp_path: Path) -> None:
    """At the relay, before the answer; to the second for readers of public fields."""
    out = tmp_path / "out"
    with capturing(target, out, per_shape=None) as (client, _):
        moments = [time.time_ns()]
        for _ in range(3):
            client.predict(NAME, {"x": X})
            moments.append(time.time_ns())
    records = list(read(out))
    for record, before, after in zip(records, moments, moments[1:], strict=False):
        arrived = captures.arrived(record.log)
        assert arrived is not None
        assert before <= arrived <= after
        assert record.log.log_metadata.timestamp_secs == arrived // 10**9
        assert record.log.log_metadata.model_spec.version.value == 1
        assert record.log.log_metadata.sampling_config.sampling_rate == 1.0
    assert len(records) == 3

    # A record that TensorFlow Serving logged, and one that says nothing.
    log = prediction_log_pb2.PredictionLog()
    assert captures.arrived(log) is None
    log.log_metadata.timestamp_secs = 1_700_000_000
    assert captures.arrived(log) == 1_700_000_000 * 10**9
    captures.stamp(log, 1_700_000_000_123_456_789)
    copy = prediction_log_pb2.PredictionLog.FromString(log.SerializeToString())
    assert captures.arrived(copy) == 1_700_000_000_123_456_789


def streaming(folder: Path, file_bytes: int = 1 << 20, max_bytes: int = 1 << 30, **more: Any) -> Recorder:
    rotation = Rotation(file_bytes, more.pop("file_seconds", 3600.0))
    more = {"limit": None, "per_shape": None, "max_bytes": max_bytes, "rotation": rotation, **more}
    return Recorder(RecorderSettings(folder, **more))


def rows_of(folder: Path) -> list[int]:
    records = [record for file in captures.files(folder) for record in read(file)]
    return [record.request.inputs["x"].tensor_shape.dim[0].size for record in records]


def test_a_stream_fills_one_file_after_another(tmp_path: Path) -> None:
    folder = tmp_path / "captures"
    size = len(tfrecord.frame(recording_log(call_of(1))))
    recorder = streaming(folder, file_bytes=3 * size)
    for _ in range(7):
        recorder.offer(call_of(1))
    recorder.close()
    assert [len(list(read(file))) for file in captures.files(folder)] == [3, 3, 1]
    assert recorder.counts.recorded == 7

    # The folder is bounded: the oldest go.
    recorder = streaming(folder, file_bytes=3 * size, max_bytes=9 * size)
    for _ in range(9):
        recorder.offer(call_of(1))
    recorder.close()
    assert [len(list(read(file))) for file in captures.files(folder)] == [3, 3, 3]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 9 * size


def recording_log(call: RelayedCall) -> bytes:
    return bytes(recording._prediction_log(call, 1.0).SerializeToString())


def test_a_file_appears_when_its_time_is_over(tmp_path: Path) -> None:
    """Without any more calls."""
    folder = tmp_path / "captures"
    recorder = streaming(folder, file_seconds=0.2)
    recorder.offer(call_of(1))
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.tfrecord")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    recorder.offer(call_of(2))
    recorder.close()
    assert rows_of(folder) == [1, 2]
    assert len(captures.files(folder)) == 2


def test_alike_requests_of_a_stream_are_counted_in_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "captures"
    size = len(tfrecord.frame(recording_log(call_of(1))))
    recorder = streaming(folder, file_bytes=size, per_shape=1)
    for rows in (1, 1, 2, 2, 1):
        recorder.offer(call_of(rows))
    recorder.close()
    assert rows_of(folder) == [1, 2, 1]
    assert recorder.counts.alike == 2


def test_a_stream_outlives_its_kill(tmp_path: Path) -> None:
    """What a killed capture had written appears, but for half a record."""
    folder = tmp_path / "captures"
    folder.mkdir()
    whole = tfrecord.frame(recording_log(call_of(1, 5)))
    (folder / ".20260101T000000.000000Z.unfinished").write_bytes(whole + whole[:-1])
    (folder / ".20260101T000001.000000Z.unfinished").write_bytes(whole[:9])
    recorder = streaming(folder)
    (first,) = captures.files(folder)
    assert first.name == "20260101T000000.000000Z.tfrecord"
    assert [captures.arrived(record.log) for record in read(first)] == [5]
    with pytest.raises(FailedPrecondition, match="another capture writes to"):
        streaming(folder)
    recorder.offer(call_of(2))
    recorder.close()
    assert rows_of(folder) == [1, 2]
    assert len(list(folder.glob(".*unfinished"))) == 0


def test_a_full_disk_does_not_end_a_stream(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        recorder = streaming(small / "captures", file_bytes=2048)
        for _ in range(40):
            recorder.offer(call_of(100))
        recorder.close()
        counts = recorder.counts
        assert counts.unwritten >= 1
        assert counts.recorded + counts.unwritten == 40
        assert rows_of(small / "captures") == [100] * counts.recorded
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_command_streams_while_warmup_is_built(target: str, scales: Path, tmp_path: Path) -> None:
    """Every call is answered and recorded; what is there is read all the while."""
    folder = tmp_path / "captures"
    command = [sys.executable, "-m", "spikeless", "capture", "--server", target, "--listen=127.0.0.1:0"]
    command += ["--out", str(folder), "--sample=1", "--stream", "--file-bytes=8KiB", "--file-time=100ms"]
    relay = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert relay.stdout is not None
    address = relay.stdout.readline().split()[1]
    copy = shutil.copytree(scales / "2", tmp_path / "model")
    done = threading.Event()
    sent: list[int] = []

    def call() -> None:
        with Client(address, timeout=60.0) as client:
            while not done.is_set() or len(sent) < 50:
                x = np.full((1 + len(sent) % 3, 2), 7, np.float32)
                np.testing.assert_array_equal(client.predict(NAME, {"x": x})["y"], 2 * x)
                sent.append(len(x))

    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(call)
        try:
            deadline = time.monotonic() + 60
            while len(list(folder.glob("*.tfrecord"))) < 3:
                assert time.monotonic() < deadline
                assert not caller.done(), caller.result()
                time.sleep(0.01)
            built = spikeless("warmup", "build", copy, "--samples", folder)
            assert built.returncode == 0, built.stdout + built.stderr
            assert len(list(read(warmup_file(copy)))) == 3, "one of each shape"
        finally:
            done.set()
        caller.result()
    relay.send_signal(signal.SIGTERM)
    _, errors = relay.communicate(timeout=60)
    assert relay.returncode == 0
    assert f"recorded {len(sent)} in {folder}, 0 more were alike, 0 did not fit, 0 could not" in errors
    assert rows_of(folder) == sent

    for wrong, message in (
        (["--stream", "--limit=5"], "--limit has no meaning with --stream"),
        (["--file-time=5s"], "no meaning without --stream"),
        (["--stream", "--max-bytes=1KiB", "--file-bytes=2KiB"], "--max-bytes of the folder"),
    ):
        refused = spikeless("capture", "--out", tmp_path / "none", *wrong)
        assert refused.returncode != 0
        assert message in refused.stderr
    assert not (tmp_path / "none").exists()
