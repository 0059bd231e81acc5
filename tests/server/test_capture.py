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
from spikeless.formats.protos import predict_pb2, prediction_log_pb2
from spikeless.formats.tensors import to_numpy, to_proto
from spikeless.repository import golden, layout
from spikeless.sidecars.capture import Capture, CaptureSettings
from spikeless.sidecars.recording import MAX_PENDING_BYTES, Recorder, RecorderSettings
from spikeless.warmup.records import read

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
        with Client(f"127.0.0.1:{port}") as client:
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
    with Client(address) as client:
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
    with Client(target) as direct, capturing(target, tmp_path / "out") as (relayed, capture):
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
                return method(channel, "/no.such.Service/Method")(b"", timeout=10)

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
        recorder.offer(PREDICT_METHOD, content, b"")
    held = MAX_PENDING_BYTES // len(content)
    assert 40 - held - 1 <= recorder.counts.dropped <= 40 - held
    recorder.offer(PREDICT_METHOD, b"\xff\xff", b"")
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
    recorder.offer(PREDICT_METHOD.replace("Predict", "Nothing"), b"", b"")
    recorder.offer("/tensorflow.serving.PredictionService/Classify", request.SerializeToString(), b"")
    recorder.close()
    (record,) = read(tmp_path / "out")
    given = record.request.input.example_list_with_context
    for holder in (given.context, given.examples[0]):
        assert list(holder.features.feature["secret"].bytes_list.value) == [b"", b""]
        assert list(holder.features.feature["age"].int64_list.value) == [0]
        assert list(holder.features.feature["x"].float_list.value) == [1.5]
