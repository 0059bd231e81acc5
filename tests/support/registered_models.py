"""A real MLflow tracking server, and models in its registry.

In: nothing. Out: the session fixtures ``tracking``, the URI of a server with a database
and artifacts of its own, and ``registered``, the models that were logged there as a
user would, in a process of its own: ``python registered_models.py FOLDER`` does it,
with the SavedModel in FOLDER as one of them, and prints what it logged as JSON.

``times``     versions 1 and 2 multiply by 2 and 3; 3 takes another input; as modules
``dense``     a Keras model, with an input example
``folder``    the SavedModel, with its warmup
``old``       a Keras model in an HDF5 file
``pickled``   a Keras model with an object that is pickled
``echo``      no TensorFlow model
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spikeless.launch import free_port


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tracking server; this process and its children find it in the environment."""
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
        f"--artifacts-destination={folder}/files",
    ]
    with pytest.MonkeyPatch.context() as patch, open(folder / "log", "w") as log:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            _wait(uri, server, folder / "log")
            yield uri
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(120)


def _wait(uri: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer in 240 s:\n{log.read_text()}")


@pytest.fixture(scope="session")
def registered(tracking: str, boston_run: Path) -> dict[str, str]:
    """URIs of what was logged: by name, and ``run`` of the folder."""
    command = [sys.executable, __file__, str(boston_run / "saved_model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logged: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return logged


def _times(factor: float, name: str = "x") -> Any:
    import tensorflow as tf

    class Times(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = tf.Variable(factor)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name=name)])
        def __call__(self, x: Any) -> Any:
            return {"y": self.factor * x}

    return Times()


def _log_all(folder: str) -> dict[str, str]:
    import keras
    import mlflow
    import numpy as np

    class Echo(mlflow.pyfunc.PythonModel):
        def predict(self, model_input: list[str]) -> list[str]:
            return model_input

    def log(model: Any, name: str, **settings: Any) -> None:
        # Which packages a model needs is not asked for: that takes half a minute.
        mlflow.tensorflow.log_model(
            model, name="model", registered_model_name=name, pip_requirements=[], **settings
        )

    with mlflow.start_run() as run:
        for module in (_times(2.0), _times(3.0), _times(4.0, name="z")):
            log(module, "times", saved_model_kwargs={"signatures": module.__call__})
        dense = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
        log(dense, "dense", input_example=np.array([[1.0, 2.0]], np.float32))
        log(dense, "old", keras_model_kwargs={"save_format": "h5"})
        log(dense, "pickled", custom_objects={"anything": len})
        mlflow.pyfunc.log_model(
            name="model", python_model=Echo(), registered_model_name="echo", pip_requirements=[]
        )
        mlflow.log_artifacts(folder, "saved_model")
        client = mlflow.MlflowClient()
        client.create_registered_model("folder")
        source = f"{run.info.artifact_uri}/saved_model"
        client.create_model_version("folder", source, run_id=run.info.run_id)
        names = ("times", "dense", "folder", "old", "pickled", "echo")
        return {name: f"models:/{name}/1" for name in names} | {"run": f"runs:/{run.info.run_id}/saved_model"}


def main() -> None:
    folder = os.path.abspath(sys.argv[1])
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        logged = _log_all(folder)
    print(json.dumps(logged))


if __name__ == "__main__":
    main()
