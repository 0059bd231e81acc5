"""FastAPI with ``tf.saved_model.load``, behind uvicorn.

FastAPI's documentation ("Server Workers") runs several worker processes with
``--workers``, here one for each processor; "Concurrency and async / await" has
functions that block without ``async``, so that they run in threads.

A version is changed by uvicorn itself: HUP to the parent replaces the workers one after
the other, each when its successor is ready. A worker that needs more than five seconds,
as with TensorFlow, ends that, so ``--timeout-worker-healthcheck`` is longer.
"""

from __future__ import annotations

from typing import Any

import versions
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()
predict = versions.load(versions.newest())


class Question(BaseModel):
    """The body of a request."""

    inputs: dict[str, Any]


@app.post("/predict")
def answer(question: Question) -> dict[str, Any]:
    return {"outputs": predict(question.inputs["ids"])}
