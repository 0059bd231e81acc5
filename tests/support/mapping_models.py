"""Small SavedModels of every kind that can be mapped, exported by TensorFlow itself.

In: as a script, ``python mapping_models.py DIRECTORY``. Out: one SavedModel for each of
``BUILDERS``. Their large variables have ``BIG`` rows or columns and thus 8 KiB or more,
the small ones 2 KiB or less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.training.saving import saveable_object

v1 = tf.compat.v1
BIG = 512
WIDTH = 16

Builder = Callable[[Path], None]
BUILDERS: dict[str, Builder] = {}


def builder(function: Builder) -> Builder:
    BUILDERS[function.__name__] = function
    return function


def values(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    if np.issubdtype(np.dtype(dtype), np.floating) or np.dtype(dtype).kind == "V":
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2 if dtype == np.bool_ else 100, shape).astype(dtype)


def _ids(name: str = "ids", *shape: int | None) -> tf.TensorSpec:
    return tf.TensorSpec(shape or [None, 4], tf.int32, name)


# TensorFlow 2.


@builder
def keras3(path: Path) -> None:
    import keras

    ids = keras.Input((8,), dtype="int32", name="ids")
    x = keras.layers.Flatten()(keras.layers.Embedding(BIG, WIDTH)(ids))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(64, activation="relu")(x))
    model = keras.Model(ids, keras.layers.Dense(1)(x))
    model.compile("adam", "mse")
    model.fit(np.zeros((4, 8), np.int32), np.zeros((4, 1)), verbose=0)
    model.export(path, verbose=False)


@builder
def keras3_shared(path: Path) -> None:
    """Two inputs that share an embedding, which is also the output layer."""
    import keras

    class Transposed(keras.layers.Layer):
        def __init__(self, embedding: Any) -> None:
            super().__init__()
            self.embedding = embedding

        def call(self, x: Any) -> Any:
            return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))

    shared = keras.layers.Embedding(BIG, WIDTH)
    left, right = (keras.Input((4,), dtype="int32", name=name) for name in ("left", "right"))
    x = keras.layers.Concatenate(axis=1)([shared(left), shared(right)])
    scores = Transposed(shared)(keras.layers.GlobalAveragePooling1D()(x))
    keras.Model([left, right], scores).export(path, verbose=False)


@builder
def never_restored(path: Path) -> None:
    """A Keras 3 model saved by ``tf.saved_model.save``, which cannot be served.

    Its signature reads variables that nothing restores.
    """
    import keras

    ids = keras.Input((4,), dtype="int32", name="ids")
    x = keras.layers.Flatten()(keras.layers.Embedding(BIG, WIDTH)(ids))
    tf.saved_model.save(keras.Model(ids, keras.layers.Dense(3)(x)), str(path))


@builder
def clock(path: Path) -> None:
    """Never answers twice the same."""
    model = tf.Module()
    model.table = tf.Variable(values(BIG, WIDTH), name="table")

    @tf.function(input_signature=[_ids("ids", None)])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"rows": tf.gather(model.table, ids) + tf.cast(tf.timestamp() % 1, tf.float32)}

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


@builder
def no_variables(path: Path) -> None:
    model = tf.Module()
    model.double = tf.function(
        lambda x: {"y": x * 2}, input_signature=[tf.TensorSpec([None], tf.float32, "x")]
    )
    tf.saved_model.save(model, str(path), {"serving_default": model.double})


class _Embedding(tf.Module):
    """Every way to look something up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = tf.Variable(values(BIG, WIDTH), name="table")
        self.kernel = tf.Variable(values(WIDTH, BIG, seed=1), name="kernel")
        self.scale = tf.Variable(0.5, name="scale")
        self.unused = tf.Variable(values(BIG, WIDTH, seed=2), name="unused")

    @tf.function(input_signature=[_ids()])
    def dense(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.gather(tf.convert_to_tensor(self.table), ids)
        return {"scores": tf.reduce_sum(rows, 1) @ self.kernel * self.scale}

    @tf.function(input_signature=[_ids()])
    def sparse(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"rows": tf.nn.embedding_lookup(self.table, ids), "transposed": self.table[:2] @ self.kernel}

    @tf.function(input_signature=[_ids()])
    def looped(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        total = tf.zeros([WIDTH])
        for step in tf.range(tf.shape(ids)[1]):
            rows = tf.raw_ops.ResourceGather(
                resource=self.table.handle, indices=ids[:, step], dtype=tf.float32
            )
            if tf.reduce_sum(rows) > 0:
                total += tf.reduce_sum(self.looked_up(ids[:, step]), 0)
            else:
                total -= tf.reduce_sum(rows, 0)
        return {"total": total}

    @tf.function(input_signature=[_ids("ids", None)])
    def looked_up(self, ids: tf.Tensor) -> tf.Tensor:
        pairs = tf.raw_ops.ResourceGatherNd(
            resource=self.table.handle, indices=ids[:, None], dtype=tf.float32
        )
        return pairs + tf.raw_ops.ResourceGather(resource=self.table.handle, indices=ids, dtype=tf.float32)

    @tf.function(input_signature=[_ids("ids", None, 1)])
    def batched(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        ids = tf.ensure_shape(tf.tile(ids[:1], [BIG, 1]) % WIDTH, [BIG, 1])
        return {
            "cells": tf.raw_ops.ResourceGather(
                resource=self.table.handle, indices=ids, dtype=tf.float32, batch_dims=1
            )
        }

    @tf.function(input_signature=[_ids()])
    def branched(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "rows": tf.switch_case(
                ids[0, 0] % 3,
                [
                    lambda: tf.gather(self.table, ids[:, 0]),
                    lambda: tf.transpose(self.kernel)[:1] + tf.zeros([tf.shape(ids)[0], 1]),
                    lambda: tf.map_fn(
                        lambda i: tf.gather(self.table, i), ids[:, 1], fn_output_signature=tf.float32
                    ),
                ],
            )
        }

    @tf.function(input_signature=[_ids()])
    def combined(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        sparse = tf.sparse.from_dense(ids + 1)
        return {"rows": tf.nn.embedding_lookup_sparse(self.table, sparse, None, combiner="mean")}


@builder
def module(path: Path) -> None:
    model = _Embedding()
    names = ("dense", "sparse", "looped", "batched", "branched", "combined")
    signatures = {name: getattr(model, name) for name in names}
    tf.saved_model.save(model, str(path), {"serving_default": model.dense, **signatures})


@builder
def dtypes(path: Path) -> None:
    model = tf.Module()
    kinds = {
        tf.float32: np.float32,
        tf.float64: np.float64,
        tf.float16: np.float16,
        tf.bfloat16: tf.bfloat16.as_numpy_dtype,
        tf.int8: np.int8,
        tf.uint8: np.uint8,
        tf.int16: np.int16,
        tf.int32: np.int32,
        tf.int64: np.int64,
        tf.bool: np.bool_,
        tf.complex64: np.complex64,
    }
    model.tables = [
        tf.Variable(values(BIG, WIDTH, dtype=dtype, seed=number), name=f"table_{kind.name}")
        for number, (kind, dtype) in enumerate(kinds.items())
    ]
    model.empty = tf.Variable(np.zeros((0, WIDTH), np.float32), name="empty")
    model.scalar = tf.Variable(np.float32(2), name="scalar")
    model.text = tf.Variable(np.array([f"word {i}" for i in range(BIG)]), name="text")
    model.changing_shape = tf.Variable(values(BIG, WIDTH), shape=[None, WIDTH], name="changing_shape")

    @tf.function(input_signature=[_ids("ids", None)])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = {table.name.partition(":")[0]: tf.gather(table, ids) for table in model.tables}
        rows["empty"] = tf.shape(model.empty)
        rows["text"] = tf.gather(model.text, ids)
        rows["changing_shape"] = tf.gather(model.changing_shape, ids) * model.scalar
        return rows

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


@builder
def written_to(path: Path) -> None:
    """A signature that changes variables: these must stay on the heap."""
    model = tf.Module()
    model.counts = tf.Variable(np.zeros((BIG, WIDTH), np.float32), name="counts")
    model.scattered = tf.Variable(np.zeros((BIG, WIDTH), np.float32), name="scattered")
    model.fixed = tf.Variable(values(BIG, WIDTH), name="fixed")

    @tf.function(input_signature=[_ids("ids", None)])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        for _ in tf.range(2):
            model.counts.assign_add(tf.ones([BIG, WIDTH]))
        model.scattered.scatter_add(tf.IndexedSlices(tf.ones([tf.shape(ids)[0], WIDTH]), ids))
        return {
            "rows": tf.gather(model.fixed, ids)
            + tf.gather(model.counts, ids)
            + tf.gather(model.scattered, ids)
        }

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


@builder
def written_in_place(path: Path) -> None:
    """An old operation that writes into its input, here a variable's value."""
    model = tf.Module()
    model.table = tf.Variable(values(BIG, WIDTH), name="table")

    @tf.function(input_signature=[_ids("ids", None)])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        ones = tf.ones([tf.shape(ids)[0], WIDTH])
        return {"rows": tf.raw_ops.InplaceUpdate(x=tf.convert_to_tensor(model.table), i=ids, v=ones)}

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


@builder
def tables_and_assets(path: Path) -> None:
    vocabulary = path.with_name(f"{path.name}-vocabulary.txt")
    vocabulary.write_text("".join(f"word{i}\n" for i in range(50)))
    model = tf.Module()
    model.static = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(
            str(vocabulary),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        ),
        -1,
    )
    model.mutable = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    model.mutable.insert(tf.constant([f"word{i}" for i in range(50)]), tf.range(50, dtype=tf.int64))
    model.table = tf.Variable(values(BIG, WIDTH), name="table")

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "words")])
    def serve(words: tf.Tensor) -> dict[str, tf.Tensor]:
        ids = tf.nn.relu(model.static.lookup(words) + model.mutable.lookup(words))
        return {"rows": tf.gather(model.table, ids)}

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


@builder
def sharded(path: Path) -> None:
    model = _Embedding()
    options = tf.saved_model.SaveOptions(
        experimental_sharding_callback=tf.train.experimental.ShardByTaskPolicy()
    )
    tf.saved_model.save(model, str(path), {"serving_default": model.dense}, options)


@builder
def sharded_by_size(path: Path) -> None:
    """Tensors larger than a shard are cut into slices."""
    model = _Embedding()
    options = tf.saved_model.SaveOptions(
        experimental_sharding_callback=tf.train.experimental.MaxShardSizePolicy(max_shard_size=20_000)
    )
    tf.saved_model.save(model, str(path), {"serving_default": model.sparse}, options)


@builder
def looked_up(path: Path) -> None:
    """Variables of which rows are read, columns, or everything."""
    model = tf.Module()
    for seed, name in enumerate(["one_way", "other_ways", "in_segments", "by_column", "also_whole", "whole"]):
        setattr(model, name, tf.Variable(values(BIG, WIDTH, seed=seed), name=name))

    @tf.function(input_signature=[_ids("ids", None)])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.gather(model.one_way, ids) + tf.gather_nd(model.other_ways, ids[:, None])
        rows += tf.nn.embedding_lookup(model.other_ways, ids) + tf.gather(model.also_whole, ids)
        segments = tf.sparse.segment_sum(model.in_segments.read_value(), ids, tf.zeros_like(ids))
        columns = tf.gather(model.by_column, ids % WIDTH, axis=1)
        whole = tf.matmul(model.also_whole, model.whole, transpose_a=True)
        known = tf.cast(tf.shape(model.one_way.read_value())[0], tf.float32)
        return {"rows": rows * known, "segments": segments, "columns": columns, "whole": whole}

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


# TensorFlow 1.


def _simple_save(
    path: Path, graph: Callable[[], tuple[dict[str, Any], dict[str, Any]]], **saver: Any
) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        inputs, outputs = graph()
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(path))
        signature = v1.saved_model.predict_signature_def(inputs, outputs)
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {"serving_default": signature},
            saver=v1.train.Saver(**saver) if saver else None,
        )
        builder.save()


def _v1_graph(**arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = v1.placeholder(tf.int32, [None, 4], name="ids")
    table = v1.get_variable("table", initializer=values(BIG, WIDTH), **arguments)
    kernel = v1.get_variable("kernel", initializer=values(WIDTH, BIG, seed=1), **arguments)
    bias = v1.get_variable("bias", [BIG], initializer=v1.ones_initializer(), **arguments)
    rows = tf.reduce_sum(tf.nn.embedding_lookup(table, ids), 1)
    scores = tf.matmul(rows, kernel) + bias
    loss = tf.reduce_mean(scores)
    v1.train.AdamOptimizer().minimize(loss)
    looped = v1.while_loop(
        lambda step, _: step < 4,
        lambda step, total: (step + 1, total + tf.reduce_sum(tf.nn.embedding_lookup(table, ids[:, step]), 0)),
        (0, tf.zeros([WIDTH])),
    )[1]
    branched = v1.cond(tf.reduce_sum(looped) > 0, lambda: tf.gather(table, ids[:, 0]), lambda: table[:1] + 1)
    return {"ids": ids}, {"scores": scores, "looped": looped, "branched": branched}


@builder
def v1_references(path: Path) -> None:
    with _variables(resource=False):
        _simple_save(path, lambda: _v1_graph(use_resource=False))


@builder
def v1_resources(path: Path) -> None:
    _simple_save(path, lambda: _v1_graph(use_resource=True))


@builder
def v1_control_flow_in_functions(path: Path) -> None:
    v1.enable_control_flow_v2()
    try:
        _simple_save(path, lambda: _v1_graph(use_resource=True))
    finally:
        v1.disable_control_flow_v2()


@builder
def v1_sharded(path: Path) -> None:
    _simple_save(path, lambda: _v1_graph(use_resource=False), sharded=True)


def _partitioned_graph(use_resource: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    ids = v1.placeholder(tf.int32, [None], name="ids")
    table = v1.get_variable(
        "table",
        [BIG, WIDTH],
        initializer=v1.random_normal_initializer(seed=3),
        partitioner=v1.fixed_size_partitioner(3),
        use_resource=use_resource,
    )
    return {"ids": ids}, {
        "rows": tf.nn.embedding_lookup(table, ids),
        "whole": tf.reduce_sum(tf.convert_to_tensor(table), 0),
    }


@builder
def v1_partitioned_references(path: Path) -> None:
    _simple_save(path, lambda: _partitioned_graph(False))


@builder
def v1_partitioned_resources(path: Path) -> None:
    _simple_save(path, lambda: _partitioned_graph(True))


@builder
def v1_several_graphs(path: Path) -> None:
    """Two meta graphs for CPUs, which share their variables, and one for GPUs."""
    builder = v1.saved_model.Builder(str(path))
    for tags in (["serve"], ["serve", "quick"], ["serve", "gpu"]):
        with tf.Graph().as_default(), v1.Session() as session:
            ids = v1.placeholder(tf.int32, [None], name="ids")
            table = v1.get_variable("table", initializer=values(BIG, WIDTH), use_resource=True)
            kernel = v1.get_variable("kernel", initializer=values(WIDTH, BIG, seed=1), use_resource=True)
            rows = tf.gather(table, ids) if "quick" in tags else tf.nn.embedding_lookup(table, ids) @ kernel
            signatures = {
                "serving_default": v1.saved_model.predict_signature_def({"ids": ids}, {"rows": rows})
            }
            if tags == ["serve"]:
                session.run(v1.global_variables_initializer())
                builder.add_meta_graph_and_variables(session, tags, signatures)
            else:
                builder.add_meta_graph(tags, signatures)
    builder.save()


class _Doubled(saveable_object.SaveableObject):
    """Restores twice what was saved."""

    def __init__(self, variable: Any) -> None:
        self._variable = variable
        spec = saveable_object.SaveSpec(variable / 2, "", "doubled")
        super().__init__(variable, [spec], "doubled")

    def restore(self, restored_tensors: Any, restored_shapes: Any) -> Any:
        return self._variable.assign(restored_tensors[0] * 2)


@builder
def v1_unusual(path: Path) -> None:
    """Variables that are used or restored as few are."""
    with tf.Graph().as_default(), v1.Session() as session:
        ids = v1.placeholder(tf.int32, [None], name="ids")
        doubled, shared, plain = (
            v1.get_variable(name, initializer=values(BIG, WIDTH, seed=seed), use_resource=True)
            for seed, name in enumerate(("doubled", "shared", "plain"), start=1)
        )

        def read(name: str) -> Any:
            handle = tf.raw_ops.VarHandleOp(
                dtype=tf.float32, shape=[BIG, WIDTH], shared_name="shared", name=name
            )
            return tf.gather(tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32), ids)

        inside = tf.function(lambda: read("inside"))()
        outputs = {
            "rows": tf.gather(doubled, ids) + tf.gather(shared, ids) + tf.gather(plain, ids),
            "again": read("again"),
            "inside": inside,
        }
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(path))
        signature = v1.saved_model.predict_signature_def({"ids": ids}, outputs)
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {"serving_default": signature},
            saver=v1.train.Saver([shared, plain, _Doubled(doubled)]),
        )
        builder.save()


@builder
def estimator_like(path: Path) -> None:
    """As an Estimator exports.

    Example parsing, vocabulary assets, several signatures, global step, and a training
    meta graph beside the serving one.
    """
    vocabulary = path.with_name(f"{path.name}-vocabulary.txt")
    vocabulary.write_text("".join(f"word{i}\n" for i in range(50)))
    builder = v1.saved_model.Builder(str(path))

    def model(features: dict[str, Any]) -> tuple[Any, Any]:
        v1.train.create_global_step()
        words = tf.lookup.TextFileInitializer(
            str(vocabulary),
            tf.string,
            tf.lookup.TextFileIndex.WHOLE_LINE,
            tf.int64,
            tf.lookup.TextFileIndex.LINE_NUMBER,
        )
        index = tf.lookup.StaticVocabularyTable(words, num_oov_buckets=1)
        with v1.variable_scope("linear/input_layer"):
            table = v1.get_variable("embedding_weights", initializer=values(BIG, WIDTH), use_resource=False)
            embedded = tf.nn.safe_embedding_lookup_sparse(
                table, index.lookup(features["words"]), combiner="mean"
            )
        kernel = v1.get_variable("dense/kernel", initializer=values(WIDTH, BIG, seed=1), use_resource=False)
        scores = tf.nn.softmax(tf.matmul(embedded, kernel) + features["age"])
        classes = tf.tile(tf.constant([[f"class{i}" for i in range(BIG)]]), [tf.shape(scores)[0], 1])
        return scores, classes

    for mode in ("train", "serve"):
        with tf.Graph().as_default(), v1.Session() as session:
            serialized = v1.placeholder(tf.string, [None], name="input_example_tensor")
            features = tf.io.parse_example(
                serialized,
                {
                    "words": tf.io.VarLenFeature(tf.string),
                    "age": tf.io.FixedLenFeature([1], tf.float32, [0.0]),
                },
            )
            scores, classes = model(features)
            if mode == "train":
                loss = tf.reduce_mean(scores)
                v1.train.AdagradOptimizer(0.1).minimize(loss, v1.train.get_global_step())
                session.run([v1.global_variables_initializer(), v1.tables_initializer()])
                builder.add_meta_graph_and_variables(session, ["train"], {})
                continue
            signatures = {
                "serving_default": v1.saved_model.classification_signature_def(serialized, classes, scores),
                "regression": v1.saved_model.regression_signature_def(serialized, scores[:, :1]),
                "predict": v1.saved_model.predict_signature_def(
                    {"examples": serialized}, {"scores": scores, "classes": classes}
                ),
            }
            builder.add_meta_graph(["serve"], signatures, main_op=v1.tables_initializer())
    builder.save()


class _variables:
    """Whether v1.get_variable makes resource variables by default."""

    def __init__(self, resource: bool) -> None:
        self._resource = resource

    def __enter__(self) -> None:
        self._before = v1.resource_variables_enabled()
        (v1.enable_resource_variables if self._resource else v1.disable_resource_variables)()

    def __exit__(self, *_: object) -> None:
        (v1.enable_resource_variables if self._before else v1.disable_resource_variables)()


def large(kind: str, path: Path) -> None:
    """64 MiB of parameters, read sparsely and densely; or in a reference variable."""
    table = values(1 << 18, 64)
    if kind == "references":

        def graph() -> tuple[dict[str, Any], dict[str, Any]]:
            ids = v1.placeholder(tf.int32, [None, 4], name="ids")
            variable = v1.get_variable("table", table.shape, initializer=v1.zeros_initializer())
            return {"ids": ids}, {"rows": tf.nn.embedding_lookup(variable, ids), "first": variable[:1]}

        with _variables(resource=False):
            _simple_save(path, graph)
        return
    model = tf.Module()
    model.table = tf.Variable(table, name="table")

    @tf.function(input_signature=[_ids()])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        total = tf.zeros([64])
        for step in tf.range(4):
            total += tf.reduce_sum(tf.nn.embedding_lookup(model.table, ids[:, step]), 0)
        return {"total": total, "first": tf.convert_to_tensor(model.table)[:1]}

    model.serve = serve
    tf.saved_model.save(model, str(path), {"serving_default": serve})


if __name__ == "__main__":
    if sys.argv[1] == "--large":
        large(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    for name, build in BUILDERS.items():
        tf.keras.utils.set_random_seed(0)
        build(Path(sys.argv[1]) / name)
