"""Flask with ``tf.saved_model.load``, behind gunicorn.

Flask's documentation ("Deploying to Production") asks for a WSGI server; gunicorn is
among those that it describes. Gunicorn's ("Design") has workers with threads, and for
a start twice as many workers as processors, and one. Here: one worker for each
processor with four threads, so that a restart leaves one that answers. The model is
loaded by each worker: TensorFlow does not survive a fork, which ``--preload`` would
need.

A version is changed as gunicorn's FAQ says ("How do I reload my application in
Gunicorn?"): HUP to the master, which starts new workers and ends the old ones
gracefully.
"""

from __future__ import annotations

import versions
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
predict = versions.load(versions.newest())


@app.post("/predict")
def answer() -> Response:
    return jsonify(outputs=predict(request.get_json()["inputs"]["ids"]))
