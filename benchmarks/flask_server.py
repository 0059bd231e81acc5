"""The server that people write first: Flask, and a SavedModel that TensorFlow loaded.

``python benchmarks/flask_server.py SAVED_MODEL PORT`` answers ``POST /predict`` with
``{"instances": [...]}`` for its body. The benchmark compares the embedded engine with
it.
"""

from __future__ import annotations

import logging
import sys

import tensorflow as tf
from flask import Flask, Response, jsonify, request

app = Flask(__name__)
predict = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
((_, inputs),) = [predict.structured_input_signature]
((name, spec),) = inputs.items()
# One line for each request would be most of the work.
logging.getLogger("werkzeug").setLevel(logging.ERROR)


@app.post("/predict")
def answer() -> Response:
    outputs = predict(**{name: tf.constant(request.get_json()["instances"], spec.dtype)})
    return jsonify(predictions={alias: value.numpy().tolist() for alias, value in outputs.items()})


if __name__ == "__main__":
    app.run(host="127.0.0.1", port=int(sys.argv[2]), threaded=True)
