"""What the peers' servers share: the newest version of a model, and its function.

In: the folder of a model's versions, as TensorFlow Serving has them, in the variable
``PEER_MODELS``. Out: the newest version and a function of NumPy arrays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Function = Callable[[Any], dict[str, Any]]


def newest() -> Path:
    """The folder with the highest number."""
    return max(
        (path for path in models().iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)
    )


def models() -> Path:
    return Path(os.environ["PEER_MODELS"])


def load(path: Path) -> Function:
    """The function of a SavedModel, of int64 ids of shape ``[rows, 32]``."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    function = loaded.signatures["serving_default"]

    def predict(ids: Any) -> dict[str, Any]:
        outputs = function(ids=tf.constant(np.asarray(ids, np.int64)))
        return {name: value.numpy().tolist() for name, value in outputs.items()}

    # The first call traces nothing, but makes kernels and threads.
    predict(np.zeros((1, 32), np.int64))
    predict.keep = loaded  # type: ignore[attr-defined]
    return predict
