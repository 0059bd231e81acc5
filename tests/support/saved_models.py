"""Small real SavedModels for tests, built by TensorFlow in a process of its own.

In: nothing. Out: the session fixture ``saved_models``, a directory with one SavedModel
for each function of ``BUILDERS``; copy one before changing it. As a script, it builds
them: ``python saved_models.py DIRECTORY``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Signature keys of ``dtypes`` are these; each takes ``x`` of that type, [?, 2], and
#: returns it as ``y``.
DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("bool", "string"),
)


def build_signatures(path: str) -> None:
    """Predict signatures of many shapes; by default x [?, 4] to scores [?, 2]."""
    import tensorflow as tf

    class Model(tf.Module):
        def __init__(self) -> None:
            self.weights = tf.Variable(tf.reshape(tf.range(8, dtype=tf.float32), [4, 2]), name="weights")
            self.table = tf.Variable(tf.range(10, dtype=tf.float32), name="table")

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, "x")])
        def score(self, x: Any) -> Any:
            return {"scores": tf.matmul(x, self.weights)}

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.int64, "ids"),
                tf.TensorSpec([None], tf.string, "name"),
                tf.TensorSpec([None, 1], tf.bool, "flag"),
                tf.TensorSpec([None, 3], tf.float64, "weight"),
            ]
        )
        def mixed(self, ids: Any, name: Any, flag: Any, weight: Any) -> Any:
            total = tf.reduce_sum(tf.where(flag, weight, -weight), 1) + tf.cast(ids, tf.float64)
            return {"total": total, "text": tf.strings.join([name, tf.strings.as_string(ids)], "-")}

        @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32, "tokens")])
        def sequence(self, tokens: Any) -> Any:
            return {"length": tf.reduce_sum(tf.ones_like(tokens), 1)}

        @tf.function(
            input_signature=[tf.TensorSpec([None], tf.float32, "x"), tf.TensorSpec([], tf.float32, "rate")]
        )
        def scaled(self, x: Any, rate: Any) -> Any:
            return {"y": x * rate}

        @tf.function(input_signature=[tf.TensorSpec([2, 3], tf.float32, "x")])
        def fixed(self, x: Any) -> Any:
            return {"sum": tf.reduce_sum(x)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "ids")])
        def gather(self, ids: Any) -> Any:
            """Fails for ids that are not in 0..9."""
            return {"values": tf.gather(self.table, ids)}

        @tf.function(input_signature=[tf.TensorSpec(None, tf.float32, "x")])
        def any_rank(self, x: Any) -> Any:
            return {"y": x + 1.0}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
        def parsed(self, examples: Any) -> Any:
            """Serialized tf.Examples in a Predict signature."""
            features = tf.io.parse_example(
                examples,
                {
                    "x": tf.io.FixedLenFeature([4], tf.float32),
                    "tag": tf.io.FixedLenFeature([], tf.string),
                    "ids": tf.io.VarLenFeature(tf.int64),
                },
            )
            count = tf.sparse.reduce_sum(tf.sparse.map_values(tf.ones_like, features["ids"]), 1)
            return {
                "scores": tf.matmul(features["x"], self.weights),
                "tag": features["tag"],
                "count": tf.reshape(count, [-1]),
            }

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "inputs")])
        def classes(self, inputs: Any) -> Any:
            """Shaped like a Classify signature; TensorFlow 2 calls it Predict."""
            features = tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([4], tf.float32)})
            return {"scores": tf.matmul(features["x"], self.weights)}

    model = Model()
    tf.saved_model.save(
        model,
        path,
        signatures={
            "serving_default": model.score,
            "mixed": model.mixed,
            "sequence": model.sequence,
            "scaled": model.scaled,
            "fixed": model.fixed,
            "gather": model.gather,
            "any_rank": model.any_rank,
            "parsed": model.parsed,
            "classes": model.classes,
        },
    )


def build_dtypes(path: str) -> None:
    """An identity signature for each of ``DTYPES``."""
    import tensorflow as tf

    def identity(dtype: str) -> Any:
        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.as_dtype(dtype), "x")])
        def function(x: Any) -> Any:
            return {"y": tf.identity(x)}

        return function

    module = tf.Module()
    signatures = {dtype: identity(dtype) for dtype in DTYPES}
    module.functions = signatures
    tf.saved_model.save(module, path, signatures=signatures)


def build_examples(path: str) -> None:
    """Classify, Regress and Predict signatures on one ``tf.Example`` placeholder.

    The features are x: float32 [4] (required), bias: float32 [] (default 0).
    ``classify`` gives classes and scores [?, 2], ``regress`` and ``regress_other`` give
    outputs [?]; ``elsewhere`` is a Regress signature with a placeholder of its own,
    which MultiInference cannot join. ``serving_default`` takes x.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:

        def parse(name: str) -> Any:
            serialized = v1.placeholder(tf.string, [None], name=name)
            return serialized, v1.io.parse_example(
                serialized,
                {
                    "x": tf.io.FixedLenFeature([4], tf.float32),
                    "bias": tf.io.FixedLenFeature([], tf.float32, default_value=0.0),
                },
            )

        weights = v1.get_variable("weights", initializer=tf.ones([4, 2]), use_resource=True)
        serialized, features = parse("examples")
        product = tf.matmul(features["x"], weights)
        scores = product + features["bias"][:, None]
        classes = tf.tile(tf.constant([["no", "yes"]]), [tf.shape(serialized)[0], 1])
        elsewhere, other = parse("other_examples")
        session.run(v1.global_variables_initializer())

        info = v1.saved_model.build_tensor_info

        def signature(method: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> Any:
            return v1.saved_model.build_signature_def(
                {alias: info(tensor) for alias, tensor in inputs.items()},
                {alias: info(tensor) for alias, tensor in outputs.items()},
                f"tensorflow/serving/{method}",
            )

        builder = v1.saved_model.Builder(path)
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {
                "serving_default": signature("predict", {"x": features["x"]}, {"scores": product}),
                "classify": signature(
                    "classify", {"inputs": serialized}, {"classes": classes, "scores": scores}
                ),
                "regress": signature("regress", {"inputs": serialized}, {"outputs": scores[:, 0]}),
                "regress_other": signature("regress", {"inputs": serialized}, {"outputs": scores[:, 1]}),
                "elsewhere": signature("regress", {"inputs": elsewhere}, {"outputs": other["x"][:, 0]}),
            },
        )
        builder.save()


def build_times(path: str, factor: float) -> None:
    """Answers ``y = x * factor`` for x: float32 [?]; ``spin`` is slow."""
    import tensorflow as tf

    class Model(tf.Module):
        def __init__(self) -> None:
            self.factor = tf.Variable(factor, name="factor")

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
        def times(self, x: Any) -> Any:
            return {"y": x * self.factor}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, "steps")])
        def spin(self, steps: Any) -> Any:
            """About a millisecond for each step."""
            square = tf.ones([200, 200])
            body = lambda step, value: (step + 1, tf.matmul(value, square) / 200.0)  # noqa: E731
            return {"y": tf.while_loop(lambda step, _: step < steps, body, (0, square))[1][0, 0]}

    model = Model()
    tf.saved_model.save(model, path, signatures={"serving_default": model.times, "spin": model.spin})


def build_times_one(path: str) -> None:
    build_times(path, 1.0)


def build_times_two(path: str) -> None:
    build_times(path, 2.0)


BUILDERS = {
    "times_one": build_times_one,
    "times_two": build_times_two,
    "signatures": build_signatures,
    "dtypes": build_dtypes,
    "examples": build_examples,
}


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with all models, each under its name in ``BUILDERS``."""
    directory = tmp_path_factory.mktemp("saved_models")
    result = subprocess.run(
        [sys.executable, __file__, str(directory)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return directory


if __name__ == "__main__":
    for name, build in BUILDERS.items():
        build(f"{sys.argv[1]}/{name}")
