"""The server as a process: threads, deadlines, message sizes, health, SIGTERM."""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import psutil
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from harness import IS_EMBEDDED, Running, ServerFactory, in_progress, put_version, refused

from spikeless.client import Client, model_spec
from spikeless.errors import Code, SpikelessError
from spikeless.formats.protos import predict_pb2, prediction_service_pb2_grpc
from spikeless.formats.states import State
from spikeless.formats.tensors import to_numpy, to_proto

X = {"x": np.array([1.0], np.float32)}


@pytest.fixture
def models(saved_models: Path, tmp_path: Path) -> Path:
    put_version(saved_models / "times_one", tmp_path / "times", 1)
    return tmp_path / "times"


def spin_request(steps: int) -> predict_pb2.PredictRequest:
    """A request that runs for about a millisecond a step."""
    request = predict_pb2.PredictRequest(model_spec=model_spec("times", signature="spin"))
    request.inputs["steps"].CopyFrom(to_proto(np.int32(steps)))
    return request


@pytest.mark.parametrize("ending", ["deadline", "cancelled"])
def test_calls_that_nobody_waits_for_free_their_places(
    models: Path, serve: ServerFactory, ending: str
) -> None:
    def is_served(running: Running) -> bool:
        try:
            return bool(running.client.predict("times", X)["y"] == [1])
        except SpikelessError as error:
            if error.code is not Code.RESOURCE_EXHAUSTED:
                raise
            return False

    with (
        serve("--grpc_max_threads=3", model_name="times", model_base_path=models) as running,
        grpc.insecure_channel(running.server.target) as channel,
    ):
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        refusals = 1 if IS_EMBEDDED else 2
        exhausted, late = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED
        if ending == "cancelled":
            # They end by themselves after a while.
            calls = [stub.Predict.future(spin_request(10**4)) for _ in range(4)]
            running.server.wait_for(
                lambda: sum(call.done() for call in calls) >= refusals, "calls to be refused"
            )
            assert [call.code() for call in calls if call.done()] == refusals * [exhausted]
            for call in calls:
                call.cancel()
        else:
            # On a slow machine, a deadline may be over before all calls have come.
            for seconds in (2.0, 10.0, 50.0):
                calls = [stub.Predict.future(spin_request(10**9), timeout=seconds) for _ in range(4)]
                codes = Counter(call.code() for call in calls)
                if codes[exhausted] == refusals:
                    break
            assert codes == {exhausted: refusals, late: 4 - refusals}
        running.server.wait_for(lambda: is_served(running), "the places to be free again")


def test_calls_can_run_on_their_own_threads(models: Path, serve: ServerFactory) -> None:
    flag = "--tensorflow_inter_op_parallelism=-1"
    with serve(flag, model_name="times", model_base_path=models) as running:
        assert running.client.predict("times", X)["y"] == [1]
        # Denormal numbers are zero there, as on TensorFlow's own threads.
        values = np.array([6e-39, -6e-39, 1.2e-38], np.float32)
        assert running.client.predict("times", {"x": values})["y"].tolist() == [0, 0, values[2]]


def test_answers_can_be_packed(saved_models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    put_version(saved_models / "dtypes", tmp_path / "dtypes", 1)
    flag = "--enable_serialization_as_tensor_content=true"
    with serve(flag, model_name="dtypes", model_base_path=tmp_path / "dtypes") as running:
        for signature, values in (
            ("float32", np.array([[1.5, 2.5]], np.float32)),
            ("string", np.array([[b"", b"abc", 300 * b"x"]], object)),
        ):
            request = predict_pb2.PredictRequest(model_spec=model_spec("dtypes", signature=signature))
            (alias,) = running.client.signatures("dtypes")[signature].inputs
            request.inputs[alias].CopyFrom(to_proto(values))
            (output,) = running.client.call(running.client.prediction.Predict, request).outputs.values()
            assert output.tensor_content
            assert not output.string_val
            np.testing.assert_array_equal(to_numpy(output), values)


def test_messages_over_the_limit(models: Path, serve: ServerFactory) -> None:
    flag = "--grpc_channel_arguments=grpc.max_receive_message_length=100000"
    with serve(flag, model_name="times", model_base_path=models) as running:
        small, large = np.ones(1000, np.float32), np.ones(100_000, np.float32)
        assert running.client.predict("times", {"x": small})["y"].size == 1000
        if IS_EMBEDDED:
            with refused(Code.RESOURCE_EXHAUSTED, r"larger than max"):
                running.client.predict("times", {"x": large})
        assert running.client.predict("times", {"x": small})["y"].size == 1000


def test_large_tensors_pass(shared: Running) -> None:
    """16 MB each way, four times what gRPC takes by default."""
    values = np.arange(4_000_000, dtype=np.float32)
    np.testing.assert_array_equal(shared.client.predict("times", {"x": values}, version=2)["y"], 2 * values)


def test_many_clients_at_once(shared: Running) -> None:
    def ask(number: int) -> bool:
        x = np.full(10, number, np.float32)
        with Client(shared.server.target, timeout=60) as client:
            return all(
                bool((client.predict("times", {"x": x}, version=2)["y"] == 2 * x).all()) for _ in range(20)
            )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))


@pytest.mark.parametrize(("flags", "idle"), [((), 0), (("--load_threads_yield",), 2)])
def test_loading_threads_can_give_way(
    embedded: None,
    saved_models: Path,
    tmp_path: Path,
    serve: ServerFactory,
    flags: tuple[str, ...],
    idle: int,
) -> None:
    def threads(policy: int) -> int:
        found = psutil.Process(running.server.pid).threads()
        count = 0
        for thread in found:
            with contextlib.suppress(ProcessLookupError):  # It has ended meanwhile.
                count += os.sched_getscheduler(thread.id) == policy
        return count

    models = tmp_path / "times"
    put_version(saved_models / "times_one", models, 1)
    flags = (*flags, "--num_load_threads=1", "--num_unload_threads=1", "--file_system_poll_wait_seconds=1")
    with serve(*flags, model_name="times", model_base_path=models) as running:
        running.client.predict("times", {"x": np.ones(1, np.float32)})
        assert threads(os.SCHED_IDLE) == 0, "the first load starts the threads that requests run on"
        ordinary = threads(os.SCHED_OTHER)
        put_version(saved_models / "times_two", models, 2)
        running.wait("times", {2: State.AVAILABLE, 1: State.END})
        assert threads(os.SCHED_IDLE) == idle
        assert threads(os.SCHED_OTHER) >= ordinary - idle


def test_a_unix_socket(models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    path = tmp_path / "socket"
    with (
        serve(f"--grpc_socket_path={path}", model_name="times", model_base_path=models) as running,
        Client(f"unix:{path}") as client,
    ):
        assert client.predict("times", X)["y"] == running.client.predict("times", X)["y"] == [1]


def test_port_0_is_a_free_one(embedded: None, models: Path) -> None:
    command = [sys.executable, "-m", "spikeless", "serve", "--port=0"]
    command += ["--model_name=times", f"--model_base_path={models}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            target = process.stdout.readline().split()[-1]
            with Client(target, timeout=60.0) as client:
                assert client.predict("times", X)["y"] == [1]
        finally:
            process.terminate()


def test_packed_messages(shared: Running) -> None:
    with grpc.insecure_channel(shared.server.target, compression=grpc.Compression.Gzip) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        request = predict_pb2.PredictRequest(model_spec=model_spec("times", version=2))
        request.inputs["x"].CopyFrom(to_proto(np.ones(10_000, np.float32)))
        assert set(stub.Predict(request, timeout=60).outputs["y"].float_val) == {2.0}


def test_health(embedded: None, shared: Running) -> None:
    assert shared.client.is_serving()


def test_every_model_and_version_has_its_health(embedded: None, shared: Running) -> None:
    for service in ("times", "times/1", "times/2", "PredictionService", "ModelService"):
        assert shared.client.is_serving(service)
    for service in ("times/3", "nobody"):
        with refused(Code.NOT_FOUND):
            shared.client.is_serving(service)


def test_the_health_of_a_version_that_goes(
    embedded: None, saved_models: Path, models: Path, serve: ServerFactory
) -> None:
    flag = "--file_system_poll_wait_seconds=1"
    with (
        serve(flag, model_name="times", model_base_path=models) as running,
        grpc.insecure_channel(running.server.target) as channel,
    ):
        request = health_pb2.HealthCheckRequest(service="times/1")
        watching = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=120)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        put_version(saved_models / "times_two", models, 2)
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert running.client.is_serving("times/2")
        assert running.client.is_serving("times")


def test_the_server_tells_what_it_can_be_asked(shared: Running) -> None:
    """A client without any of its files, as grpcurl is."""
    with grpc.insecure_channel(shared.server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"} <= {
            *database.get_services()
        }
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("tensorflow.serving.PredictionService")
        method = service.methods_by_name["Predict"]
        request = message_factory.GetMessageClass(method.input_type)()
        response = message_factory.GetMessageClass(method.output_type)
        json_format.ParseDict(
            {
                "modelSpec": {"name": "times", "version": "2"},
                "inputs": {
                    "x": {"dtype": "DT_FLOAT", "tensorShape": {"dim": [{"size": "1"}]}, "floatVal": [1]}
                },
            },
            request,
            descriptor_pool=pool,
        )
        predict = channel.unary_unary(
            "/tensorflow.serving.PredictionService/Predict",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        assert list(predict(request, timeout=60).outputs["y"].float_val) == [2]


def test_it_listens_on_loopback(embedded: None, shared: Running) -> None:
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process(shared.server.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1", "127.0.0.1"]


@pytest.mark.parametrize(
    "method", ["NoSuchService/Anything", "SessionService/SessionRun", "PredictionService/PredictStreamed"]
)
def test_services_that_there_are_not(shared: Running, method: str) -> None:
    with grpc.insecure_channel(shared.server.target) as channel:
        call = channel.unary_unary(f"/tensorflow.serving.{method}", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_sigterm_lets_calls_in_progress_end(embedded: None, models: Path, serve: ServerFactory) -> None:
    monitoring = models.parent / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    flag = f"--monitoring_config_file={monitoring}"
    with serve(flag, "--grace=240", model_name="times", model_base_path=models, rest=True) as running:
        address = urlsplit(running.rest_url).netloc
        answers: dict[str, Any] = {}

        def ask_grpc() -> None:
            with Client(running.server.target, timeout=240) as client:
                steps = np.array(10_000, np.int32)
                answers["grpc"] = client.predict("times", {"steps": steps}, signature="spin")["y"]

        def ask_rest() -> None:
            connection = http.client.HTTPConnection(address, timeout=240)
            connection.request(
                "POST", "/v1/models/times:predict", b'{"signature_name": "spin", "inputs": 10000}'
            )
            answers["rest"] = connection.getresponse().status

        threads = [threading.Thread(target=ask_grpc), threading.Thread(target=ask_rest)]
        for thread in threads:
            thread.start()
        running.server.wait_for(lambda: in_progress(address) == {"GRPC": 1, "REST": 1}, "both calls")
        ended = os.pidfd_open(running.server.pid)
        os.kill(running.server.pid, signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert answers["rest"] == 200
        assert np.isfinite(answers["grpc"])
        select.select([ended], [], [], 60)
        os.close(ended)
        assert running.server.exit_code == 0
        with refused(Code.UNAVAILABLE):
            running.client.predict("times", X)


def test_a_port_that_is_taken(embedded: None, models: Path, shared: Running, serve: ServerFactory) -> None:
    with (
        pytest.raises(SpikelessError, match=r"exited with code [1-9-]"),
        serve(model_name="times", model_base_path=models, port=shared.server.port, wait_for=["nobody"]),
    ):
        pass
