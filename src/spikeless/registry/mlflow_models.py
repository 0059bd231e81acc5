"""The SavedModel in a model of MLflow.

In: the folder of an MLflow model, or of a SavedModel that was logged as it is. Out: a
SavedModel's folder. What is taken:

- a SavedModel, logged with ``mlflow.log_artifacts``;
- ``mlflow.tensorflow`` with a ``tf.Module``;
- ``mlflow.tensorflow`` with a Keras model, as SavedModel or as ``.keras``, which is
  exported in a process of its own.

Nothing is unpickled, and no code that came with a model is run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spikeless.disk import children
from spikeless.errors import DataLoss, InvalidArgument, NotFound, SpikelessError, Unimplemented
from spikeless.formats.savedmodel import SAVED_MODEL_FILE
from spikeless.warmup import BuildSettings, SampleFile, build
from spikeless.warmup.records import warmup_file

MODELS, RUNS = "models:/", "runs:/"
_DESCRIPTION = "MLmodel"
_INPUT_EXAMPLE = "serving_input_example.json"
_FLAVOUR = "tensorflow"
_REMEDY = (
    "log a SavedModel with mlflow.log_artifacts(FOLDER, 'model'), or a tf.Module or Keras model with "
    "mlflow.tensorflow.log_model"
)


def is_uri(text: str) -> bool:
    """Whether it is a model URI of MLflow, and no path."""
    return text.startswith((MODELS, RUNS))


def saved_model_in(folder: Path, progress: Callable[[str], None] = lambda title: None) -> Path:
    """The SavedModel of what was fetched to ``folder``.

    Raises:
        NotFound: there is no model in it.
        Unimplemented: the model is of another kind; the message has the remedy.
        DataLoss: its description is damaged.
        InvalidArgument: Keras cannot export it.
    """
    if (folder / SAVED_MODEL_FILE).is_file():
        return folder
    flavours = _flavours(folder)
    if _FLAVOUR not in flavours:
        raise Unimplemented(f"its flavours are {', '.join(flavours) or 'none'}, not {_FLAVOUR}: {_REMEDY}")
    flavour = flavours[_FLAVOUR]
    if "saved_model_dir" in flavour:
        return _within(folder, flavour["saved_model_dir"])
    data = _within(folder, flavour.get("data", "data"))
    if pickles := sorted(path.name for path in data.glob("*.cloudpickle")):
        raise Unimplemented(
            f"it needs {', '.join(pickles)}, and nothing is unpickled: export the model with model.export, "
            "and log that folder with mlflow.log_artifacts"
        )
    if (data / "model" / SAVED_MODEL_FILE).is_file():
        return data / "model"
    if (data / "model.keras").is_file():
        progress("exporting the Keras model")
        return _exported(data / "model.keras", folder / "exported")
    found = ", ".join(sorted(path.name for path in data.glob("model*"))) or "no model"
    raise Unimplemented(f"{data.name} has {found}, neither a SavedModel nor model.keras: {_REMEDY}")


def _flavours(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / _DESCRIPTION).is_file():
        raise NotFound(f"it has neither {SAVED_MODEL_FILE} nor {_DESCRIPTION}: {_REMEDY}")
    from mlflow.models import Model

    try:
        flavours = Model.load(str(folder)).flavors
    except Exception as error:  # of MLflow, or of whatever reads YAML for it
        raise DataLoss(f"its {_DESCRIPTION} cannot be read: {error}; log the model again") from None
    return dict(flavours)


def _within(folder: Path, name: Any) -> Path:
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataLoss(f"its {_DESCRIPTION} names {name}, which is outside the model: log the model again")
    if not path.is_dir():
        raise NotFound(f"{name} is missing, which its {_DESCRIPTION} names: log the model again")
    return path


def _exported(file: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "spikeless.registry.keras_export", str(file), str(target)]
    done = children.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise InvalidArgument(
            f"Keras cannot export it: {reason[:500]}; export it where it is trained, with model.export, and "
            "log that folder with mlflow.log_artifacts"
        )
    return target


def warm(
    saved_model: Path,
    folder: Path,
    samples: tuple[SampleFile, ...],
    progress: Callable[[str], None] = lambda title: None,
) -> None:
    """Build a warmup file where the SavedModel brings none.

    It is built from ``samples``, else from the input example that MLflow keeps with a
    model.

    Raises:
        SpikelessError: ``samples`` do not fit.
    """
    if warmup_file(saved_model).exists():
        return
    if samples:
        progress("building warmup from the samples")
        build(saved_model, BuildSettings(samples=samples))
    elif (example := folder / _INPUT_EXAMPLE).is_file():
        progress("building warmup from the input example")
        try:
            build(saved_model, BuildSettings(samples=(SampleFile(example),)))
        except SpikelessError as error:
            reason = str(error).replace(f"{folder}/", "")
            progress(f"warning: the input example makes no warmup: {reason}")
