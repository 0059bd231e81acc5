"""Calls on the loop of the gRPC server are answered as on other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from spikeless.client import model_spec
from spikeless.engine.grpc_api import (
    InferenceServicer,
    PredictionServicer,
    add_inference_service,
    add_prediction_service,
)
from spikeless.engine.handlers import Calls
from spikeless.engine.open_inference import OpenInference
from spikeless.engine.served_models import ServedModels
from spikeless.engine.transport import FastServer
from spikeless.formats.kinds import PREDICT, SERVICE
from spikeless.formats.open_inference_messages import SERVICE as INFERENCE_SERVICE
from spikeless.formats.open_inference_messages import message_class
from spikeless.formats.protos import model_server_config_pb2, predict_pb2
from spikeless.formats.states import VersionStatus
from spikeless.formats.tensors import to_numpy, to_proto
from spikeless.runtime import Session
from spikeless.runtime.model import Model

#: Each is smaller than the smallest normal number, also times the rate.
DENORMAL = np.array([5e-39, -5e-39, 1e-45], np.float32)
RATE = np.array(1.5, np.float32)
#: Beside them one that stays.
X = np.array([*DENORMAL, 2.0], np.float32)
Ask = Callable[[grpc.Channel], np.ndarray[Any, Any]]


class OneModel(ServedModels):
    """A model whose every version is the same one."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def available(self, name: str) -> list[int]:
        return [1]

    def version_statuses(self, name: str) -> list[VersionStatus]:
        return []

    def add_listener(self, listener: Callable[[str, VersionStatus], None]) -> None:
        pass

    def reload_config(self, config: model_server_config_pb2.ModelServerConfig) -> None:
        pass

    def stop(self) -> None:
        self.model.close()

    def _lend(self, name: str, version: int | None) -> AbstractContextManager[Model]:
        return nullcontext(self.model)


@pytest.fixture
def served(saved_models: Path) -> Iterator[tuple[str, list[str]]]:
    """A server's address, and the names of the threads that ran the model."""
    threads: list[str] = []
    with Session.load(saved_models / "signatures") as session, ThreadPoolExecutor(2, "pool") as pool:
        model = Model(session, 1, on_run=lambda *_: threads.append(threading.current_thread().name))
        calls = Calls(OneModel(model), "GRPC")
        server = FastServer(pool, 2, {}, failed=lambda error: None)
        add_prediction_service(PredictionServicer(calls), server)
        add_inference_service(InferenceServicer(OpenInference(calls, lambda: True)), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", threads
        server.stop(0).wait()


def predict(channel: grpc.Channel) -> np.ndarray[Any, Any]:
    request = predict_pb2.PredictRequest(model_spec=model_spec("m", signature="scaled"))
    request.inputs["x"].CopyFrom(to_proto(X))
    request.inputs["rate"].CopyFrom(to_proto(RATE))
    call: Any = channel.unary_unary(
        f"/{SERVICE}/{PREDICT.name}",
        predict_pb2.PredictRequest.SerializeToString,
        predict_pb2.PredictResponse.FromString,
    )
    return to_numpy(call(request, timeout=60).outputs["y"])


def infer(channel: grpc.Channel) -> np.ndarray[Any, Any]:
    request = message_class("ModelInferRequest")(
        model_name="m",
        parameters={"signature_name": message_class("InferParameter")(string_param="scaled")},
        inputs=[
            {"name": name, "datatype": "FP32", "shape": values.shape}
            for name, values in (("x", X), ("rate", RATE))
        ],
        raw_input_contents=[X.tobytes(), RATE.tobytes()],
    )
    call: Any = channel.unary_unary(
        f"/{INFERENCE_SERVICE}/ModelInfer",
        message_class("ModelInferRequest").SerializeToString,
        message_class("ModelInferResponse").FromString,
    )
    return np.frombuffer(call(request, timeout=60).raw_output_contents[0], np.float32)


@pytest.mark.parametrize("ask", [predict, infer])
def test_denormal_numbers_are_zero_on_any_thread(served: tuple[str, list[str]], ask: Ask) -> None:
    assert (DENORMAL * RATE != 0).all()
    address, threads = served
    deadline = time.monotonic() + 60
    with grpc.insecure_channel(address) as channel:
        while not {"pool", "grpc"} <= {name.partition("_")[0].partition("-")[0] for name in threads}:
            assert time.monotonic() < deadline, set(threads)
            assert ask(channel).tolist() == [0, 0, 0, 3]
