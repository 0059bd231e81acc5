"""ONNX Runtime with the model that tf2onnx converted, in FastAPI behind uvicorn.

ONNX Runtime's own server is deprecated, and its documentation ("Build a web application
with ONNX Runtime") leaves the server to its users. Configured as the peer ``fastapi``,
with the session's defaults. Conversion is not part of any time measured here:
``model.onnx`` is a version's file.

A version is changed as for ``fastapi``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import versions
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()
session = onnxruntime.InferenceSession(versions.newest() / "model.onnx", providers=["CPUExecutionProvider"])
names = [output.name for output in session.get_outputs()]


class Question(BaseModel):
    """The body of a request."""

    inputs: dict[str, Any]


@app.post("/predict")
def answer(question: Question) -> dict[str, Any]:
    values = session.run(names, {"ids": np.asarray(question.inputs["ids"], np.int64)})
    return {"outputs": {name: value.tolist() for name, value in zip(names, values, strict=True)}}
