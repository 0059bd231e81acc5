"""MLServer: a custom runtime with ``tf.saved_model.load``.

MLServer has no runtime for TensorFlow; its documentation ("Custom Inference Runtimes")
says how to write one, and "Parallel Inference" to run it in several processes, here one
for each processor.

A version is changed as the documentation says ("Model Repository API"): the settings
name the new files, and ``POST /v2/repository/models/peer/load`` loads them in place.
The settings give no version number: MLServer keeps the old model until the new one of
the same version is loaded, but answers 400 while one with a higher number is loading.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import versions
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Peer(MLModel):
    """The runtime."""

    async def load(self) -> bool:
        assert self.settings.parameters is not None
        assert self.settings.parameters.uri is not None
        self._predict = versions.load(Path(self.settings.parameters.uri))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        outputs = self._predict(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(
            model_name=self.name,
            outputs=[NumpyCodec.encode_output(name, np.array(value)) for name, value in outputs.items()],
        )
