#!/usr/bin/env python3
"""A gRPC server that answers as a model server does, without a model.

It takes the flags of a model server and serves the newest version. ``--behaviour``
makes it misbehave: ``exit`` at once, ``broken`` (no version can be loaded), ``deaf``
(ignores SIGTERM). ``--stall FROM,SECONDS`` stalls once, FROM seconds after the first
request: answers due in the stall come at its end.
"""

import argparse
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from spikeless.formats.protos import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

State = get_model_status_pb2.ModelVersionStatus.State


class StandIn(
    prediction_service_pb2_grpc.PredictionServiceServicer,
    model_service_pb2_grpc.ModelServiceServicer,
):
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.first: float | None = None

    def versions(self) -> list[int]:
        base = Path(self.options.model_base_path)
        return sorted(int(path.name) for path in base.iterdir() if path.name.isdigit())

    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> get_model_status_pb2.GetModelStatusResponse:
        if request.model_spec.name != self.options.model_name:
            context.abort(grpc.StatusCode.NOT_FOUND, "Could not find any versions of the model")
        answer = get_model_status_pb2.GetModelStatusResponse()
        versions = self.versions()
        for version in versions:
            status = answer.model_version_status.add(version=version)
            status.state = State.AVAILABLE if version == versions[-1] else State.END
            if self.options.behaviour == "broken":
                status.state = State.END
                status.status.error_code = 5
                status.status.error_message = "no such file: saved_model.pb"
        return answer

    def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        name = request.model_spec.name
        if name != self.options.model_name:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({name})")
        if self.options.stall:
            start, seconds = (float(part) for part in self.options.stall.split(","))
            now = time.monotonic()
            self.first = self.first or now
            left = self.first + start + seconds - now
            if 0 < left < seconds:
                time.sleep(left)
        answer = predict_pb2.PredictResponse()
        answer.model_spec.name = name
        answer.model_spec.version.value = self.versions()[-1]
        return answer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model_name")
    parser.add_argument("--model_base_path")
    parser.add_argument("--behaviour", default="")
    parser.add_argument("--stall", default="")
    parser.add_argument("--num_load_threads")
    parser.add_argument("--platform_config_file")
    parser.add_argument("--version", action="store_true")
    options = parser.parse_args()
    if options.version:
        print("TensorFlow ModelServer: 0.0.0-stand-in")
        return
    if options.behaviour == "exit":
        print("cannot open the model directory", file=sys.stderr)
        sys.exit(3)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if options.behaviour == "deaf" else stopped.set())
    server = grpc.server(ThreadPoolExecutor(max_workers=64))
    stand_in = StandIn(options)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(stand_in, server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(stand_in, server)
    server.add_insecure_port(f"127.0.0.1:{options.port}")
    server.start()
    print("serving", flush=True)
    stopped.wait()
    server.stop(1).wait()


if __name__ == "__main__":
    main()
