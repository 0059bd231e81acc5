"""Make models to measure reloads with: an embedding of a given size, a small network.

    python benchmarks/make_embedding_model.py runs/embedding --size 512MiB
    python benchmarks/make_embedding_model.py runs/large --size 8GiB --mapped-only

In: a size. Out: ``OUT/1``, ``OUT/2``, ...: SavedModels with the same graph and
different parameters, each with warmup records that look up random rows; and
``OUT/requests``, many more such records to replay. ``OUT`` appears whole or not at all.
With ``--mapped-only``, for tables that do not fit on the disk twice: ``OUT/mapped/1``
and ``OUT/optimized/1``, which share their files, and so on; three tables of that size
are the most on the disk while two versions are made, two remain. With ``--steps`` loads
take long: a second signature, which is in the warmup file too, has so many steps.

Kinds:

keras    exported by Keras 3, whose exports restore every variable twice
module   a ``tf.Module``, whose variables are restored once; dense reads (``GatherV2``)
sparse   the same, but the table is read sparsely (``ResourceGather``)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click
import numpy as np

from spikeless import mapping, warmup
from spikeless.cli.options import Size
from spikeless.disk import atomic
from spikeless.errors import AlreadyExists
from spikeless.formats import tfrecord
from spikeless.formats.savedmodel import VARIABLES_DIRECTORY
from spikeless.warmup.requests import predict

KINDS = ("keras", "module", "sparse")
WIDTH, IDS, HIDDEN = 64, 32, 256
BLOCK_ROWS = 1 << 18
#: The second signature.
STEPS = "steps"
#: The records of a warmup file, and those to replay: enough that most of a table of 512
#: MiB is looked up.
WARMUP_REQUESTS, REQUESTS = 20, 10_000


def make(
    out: Path,
    size: int,
    kind: str = "keras",
    versions: int = 2,
    *,
    mapped_only: bool = False,
    requests: int = REQUESTS,
    steps: int = 0,
) -> None:
    """Write the models, with embeddings of `size` bytes, and the requests to `out`.

    Raises:
        AlreadyExists: there is something at `out`.
    """
    if out.exists():
        raise AlreadyExists(f"{out} is there already; give a new folder")
    rows = size // (4 * WIDTH)
    generator = np.random.default_rng(0)
    records = [
        predict("serving_default", {"ids": generator.integers(0, rows, (1, IDS))}).SerializeToString()
        for _ in range(max(requests, WARMUP_REQUESTS))
    ]
    further = [predict(STEPS, {"x": np.zeros(1, np.float32)}).SerializeToString()] if steps else []
    with atomic.staging(out.absolute().parent / ".staging") as staging:
        for version in range(1, versions + 1):
            model = staging / "models" / str(version)
            if kind == "keras":
                _export_keras(model, rows, version)
            else:
                _export_module(model, rows, version, kind, steps)
            own = warmup.warmup_file(model)
            own.parent.mkdir(exist_ok=True)
            tfrecord.write(own, [*records[:WARMUP_REQUESTS], *further])
            if mapped_only:
                _map(model, out.absolute())
        tfrecord.write(staging / "models" / "requests", records[:requests])
        atomic.make_readable(staging / "models")
        atomic.sync_tree(staging / "models")
        os.rename(staging / "models", out)


def _map(model: Path, out: Path) -> None:
    """Replace a model by two that are mapped, one of them optimised."""
    mapped, optimized = (model.parent / kind / model.name for kind in ("mapped", "optimized"))
    for path in (mapped, optimized):
        path.parent.mkdir(exist_ok=True)
        root = out / path.relative_to(model.parent)
        settings = mapping.MapSettings(serving_root=str(root), verify=False, optimize=path == optimized)
        mapping.map_saved_model(model, path, settings)
        # The mapped model's checkpoint is complete, so that it does for the other one.
        shutil.rmtree(model / VARIABLES_DIRECTORY)
        atomic.copy_tree(mapped / VARIABLES_DIRECTORY, model / VARIABLES_DIRECTORY, link=True)
    files, same = (
        {file.path: file for file in mapping.read_manifest(path).files} for path in (mapped, optimized)
    )
    for name in (name for name, file in files.items() if same.get(name) == file):
        (optimized / name).unlink()
        os.link(mapped / name, optimized / name)
    shutil.rmtree(model)


def _export_keras(path: Path, rows: int, seed: int) -> None:
    import keras

    keras.utils.set_random_seed(seed)
    ids = keras.Input((IDS,), dtype="int64", name="ids")
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(rows, WIDTH)(ids))
    for _ in range(2):
        x = keras.layers.Dense(HIDDEN, activation="relu")(x)
    keras.Model(ids, keras.layers.Dense(1, activation="sigmoid")(x)).export(path, verbose=False)
    keras.backend.clear_session()


def _export_module(path: Path, rows: int, seed: int, kind: str, steps: int) -> None:
    import tensorflow as tf

    model = tf.Module()
    # Mapped from a file: with every step of making and saving it on the heap, a table
    # of 8 GiB takes 24.
    values = path.with_name(f"{path.name}.values")
    _write_random(values, rows, seed)
    table = tf.raw_ops.ImmutableConst(
        dtype=tf.float32, shape=[rows, WIDTH], memory_region_name=str(values.absolute())
    )
    model.table = tf.Variable(table, name="table")
    shapes = [[WIDTH, HIDDEN], [HIDDEN, HIDDEN], [HIDDEN, 1]]
    model.kernels = [
        tf.Variable(tf.random.stateless_normal(shape, [seed, 2 + number]) / 8, name=f"kernel_{number}")
        for number, shape in enumerate(shapes)
    ]

    @tf.function(input_signature=[tf.TensorSpec([None, IDS], tf.int64, "ids")])
    def serve(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        table = model.table if kind == "sparse" else tf.convert_to_tensor(model.table)
        x = tf.reduce_mean(tf.nn.embedding_lookup(table, ids), 1)
        for kernel in model.kernels[:-1]:
            x = tf.nn.relu(x @ kernel)
        return {"scores": tf.sigmoid(x @ model.kernels[-1])}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def take_steps(x: tf.Tensor) -> dict[str, tf.Tensor]:
        for step in range(steps):
            x = tf.tanh(x * (1 + step / steps))
        return {"y": x}

    model.serve, model.take_steps = serve, take_steps
    signatures = {"serving_default": serve, **({STEPS: take_steps} if steps else {})}
    tf.saved_model.save(model, str(path), signatures)
    values.unlink()


def _write_random(file: Path, rows: int, seed: int) -> None:
    """Write float32 ``[rows, WIDTH]``, uniform in [0, 1), block by block."""
    generator = np.random.default_rng(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        for begin in range(0, rows, BLOCK_ROWS):
            out.write(generator.random((min(BLOCK_ROWS, rows - begin), WIDTH), np.float32).data)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--size", type=Size(), default="512MiB", show_default=True, help="Of the embedding.")
@click.option("--kind", type=click.Choice(KINDS), default="keras", show_default=True)
@click.option("--versions", type=click.IntRange(1), default=2, show_default=True, help="How many models.")
@click.option("--mapped-only", is_flag=True, help="Mapped models, and mapped and optimised ones, instead.")
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=REQUESTS,
    show_default=True,
    help="Different ones to replay. Fewer look up fewer rows, which then stay in memory.",
)
@click.option("--steps", type=click.IntRange(0), default=0, help="Of another signature, not of keras.")
def main(
    out: Path, size: int, kind: str, versions: int, mapped_only: bool, requests: int, steps: int
) -> None:
    """Make models of an embedding of a given size in OUT."""
    if steps and kind == "keras":
        raise SystemExit("error: --steps is for the kinds module and sparse")
    try:
        make(out, size, kind, versions, mapped_only=mapped_only, requests=requests, steps=steps)
    except AlreadyExists as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
