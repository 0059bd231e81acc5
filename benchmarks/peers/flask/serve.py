"""Flask with ``tf.saved_model.load``, behind gunicorn.

Flask's documentation ("Deploying to Production", gunicorn) asks for a WSGI server and
names gunicorn first. Gunicorn's ("Design") has threads for what waits and one worker
for each processor or more. Here: one worker for each processor with four threads, so
that a restart leaves one that answers. The model is loaded by each worker: TensorFlow
does not survive a fork, which ``--preload`` would need.

A version is changed as gunicorn's FAQ says ("How do I reload my application?"): HUP to
the master, which starts new workers and ends the old ones gracefully.
"""

from __future__ import annotations

import versions
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
predict = versions.load(versions.newest())


@app.post("/predict")
def answer() -> Response:
    return jsonify(outputs=predict(request.get_json()["inputs"]["ids"]))
