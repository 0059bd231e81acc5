"""The model that all peers serve: versions that differ, and say which they are.

In: a size. Out: ``OUT/1``, ``OUT/2``, ...: SavedModels of one function, int64 ``ids``
``[rows, 32]`` to float32 ``scores`` ``[rows, 1]`` and int64 ``version`` ``[rows]``;
``OUT/requests``, records to replay; and ``OUT/expected.npz``, what TensorFlow answers
to the first of them for each version.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from make_embedding_model import HIDDEN, IDS, WIDTH

from spikeless import warmup
from spikeless.disk import atomic
from spikeless.formats import tfrecord
from spikeless.warmup.requests import predict

CHECKED, WARMUP_REQUESTS, REQUESTS = 20, 20, 2_000


def make(out: Path, size: int, versions: int) -> None:
    """Write the versions, with an embedding of `size` bytes, and the requests.

    `out` appears whole or not at all.
    """
    rows = size // (4 * WIDTH)
    ids = np.random.default_rng(0).integers(0, rows, (REQUESTS, 1, IDS))
    records = [predict("", {"ids": one}).SerializeToString() for one in ids]
    with atomic.staging(out.absolute().parent / ".staging") as staging:
        made = staging / "peer"
        expected = {}
        for version in range(1, versions + 1):
            expected[str(version)] = _export(made / str(version), rows, version, ids[:CHECKED, 0])
            own = warmup.warmup_file(made / str(version))
            own.parent.mkdir()
            tfrecord.write(own, records[:WARMUP_REQUESTS])
        tfrecord.write(made / "requests", records)
        np.savez(made / "expected.npz", ids=ids[:CHECKED, 0], **expected)
        atomic.sync_tree(made)
        os.rename(made, out)


def _export(path: Path, rows: int, version: int, ids: Any) -> Any:
    """Write a version; returns its scores of `ids`, of shape ``[ids, 1]``."""
    import tensorflow as tf

    model = tf.Module()
    model.table = tf.Variable(tf.random.stateless_normal([rows, WIDTH], [version, 1]), name="table")
    shapes = [[WIDTH, HIDDEN], [HIDDEN, HIDDEN], [HIDDEN, 1]]
    model.kernels = [
        tf.Variable(tf.random.stateless_normal(shape, [version, 2 + number]) / 8, name=f"kernel_{number}")
        for number, shape in enumerate(shapes)
    ]

    @tf.function(input_signature=[tf.TensorSpec([None, IDS], tf.int64, "ids")])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        x = tf.reduce_mean(tf.nn.embedding_lookup(tf.convert_to_tensor(model.table), ids), 1)
        for kernel in model.kernels[:-1]:
            x = tf.nn.relu(x @ kernel)
        served = tf.fill([tf.shape(ids)[0]], tf.constant(version, tf.int64))
        return {"scores": tf.sigmoid(x @ model.kernels[-1]), "version": served}

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})
    return serve(tf.constant(ids))["scores"].numpy()
