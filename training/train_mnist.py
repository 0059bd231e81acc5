"""Train a convolutional network on handwritten digits, on several devices at once.

In: MNIST from tensorflow_datasets where it can be downloaded; scikit-learn's bundled
digits, 8x8 pixels enlarged to 28x28, where it cannot. Out: a run directory with a
SavedModel that takes pictures.

    spikeless train mnist                       # all GPUs, or the CPU; 1 min on 2 cores
    spikeless train mnist --logical-devices 2   # two devices made of one CPU, to try it

Each device computes the gradients of its share of a batch, and all apply their sum:
batch and learning rate grow with the number of devices, and the result stays the same
within noise. A killed run goes on from its last epoch when it is started again with the
same settings.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from spikeless.training.settings import parse_settings

# Settings -----------------------------------------------------------------------------

parser = argparse.ArgumentParser(
    prog="spikeless train mnist",
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument(
    "--data", choices=["auto", "mnist", "digits"], default="auto", help="auto: MNIST where it can be had"
)
parser.add_argument("--logical-devices", type=int, default=0, help="divide the CPU into so many; 0: as it is")
parser.add_argument("--epochs", type=int, default=0, help="passes over the pictures; 0: 5, or 30 of digits")
parser.add_argument("--batch-size", type=int, default=64, help="pictures a step on each device")
parser.add_argument("--learning-rate", type=float, default=0.001, help="of Adam at its peak, for one device")
parser.add_argument("--warmup-fraction", type=float, default=0.1, help="part of the steps until the peak")
parser.add_argument(
    "--fresh", action="store_true", help="forget what a killed run with these settings had done"
)
parser.add_argument("--seed", type=int, default=1, help="of the split, the initial weights and the shuffling")
parser.add_argument("--runs", default="runs", help="where the run directory is written")
settings = parse_settings(parser, may_be_zero=["epochs", "logical_devices"])

# After the settings: --help and wrong options need no TensorFlow.
import keras
import numpy as np
import tensorboard  # noqa: F401 (the callback writes with it)
import tensorflow as tf
from numpy.typing import NDArray

from spikeless.errors import InvalidArgument, Unavailable
from spikeless.training.export import export

started = time.monotonic()
keras.utils.set_random_seed(settings.seed)  # Python's, NumPy's and TensorFlow's

# Devices ------------------------------------------------------------------------------

if settings.logical_devices:
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * settings.logical_devices
    )
    strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(settings.logical_devices)])
else:
    strategy = tf.distribute.MirroredStrategy()
devices = strategy.num_replicas_in_sync
global_batch = settings.batch_size * devices
print(f"{devices} device(s), {settings.batch_size} pictures on each, {global_batch} a step")

# Data ---------------------------------------------------------------------------------


#: One of the files that tensorflow_datasets downloads.
MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz"


def mnist() -> tuple[NDArray[Any], ...]:
    """Pictures [n, 28, 28] uint8, labels [n] int64 to train on, to test on."""
    import tensorflow_datasets

    if not tensorflow_datasets.builder("mnist").is_prepared():
        urllib.request.urlopen(MNIST, timeout=10).close()  # tensorflow_datasets itself tries for minutes
    parts = tensorflow_datasets.load("mnist", split=["train", "test"], as_supervised=True, batch_size=-1)
    return tuple(
        values.numpy().reshape(-1, 28, 28) if values.ndim > 1 else values.numpy() for values in sum(parts, ())
    )


def digits() -> tuple[NDArray[Any], ...]:
    """The same of scikit-learn's 1,797 digits, a fifth of them for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    large = tf.image.resize(data.images[..., None] * (255 / 16), [28, 28]).numpy()[..., 0]
    pictures = np.clip(np.rint(large), 0, 255).astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        pictures, data.target, test_size=0.2, stratify=data.target, random_state=settings.seed
    )
    return train, train_labels, test, test_labels


used = settings.data
if used != "digits":
    try:
        parts, used = mnist(), "mnist"
    except Exception as error:  # no package, no network, a server that is down, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if used == "mnist":
            raise Unavailable(f"MNIST is not to be had ({reason}); --data digits needs no download") from None
        print(f"MNIST is not to be had ({reason}): training on scikit-learn's digits instead")
        used = "digits"
if used == "digits":
    parts = digits()
train_pictures, train_labels, test_pictures, test_labels = parts
epochs = settings.epochs or {"mnist": 5, "digits": 30}[used]
steps = len(train_labels) // global_batch
if not steps:
    raise InvalidArgument(
        f"a step takes {global_batch} pictures, but there are {len(train_labels)}; lower --batch-size"
    )
print(f"{used}: {len(train_labels)} pictures to train on, {len(test_labels)} to test on")

pictures = tf.data.Dataset.from_tensor_slices((train_pictures, train_labels)).cache()


def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
    """All pictures in the order of this epoch, whichever epochs came before."""
    return pictures.shuffle(len(train_labels), settings.seed + epoch).batch(global_batch, drop_remainder=True)


test = tf.data.Dataset.from_tensor_slices((test_pictures, test_labels)).batch(global_batch).cache()

# Model --------------------------------------------------------------------------------

# The rate grows with the devices, since a step covers as many more pictures; it climbs
# first, then falls.
peak = settings.learning_rate * devices
warmup_steps = int(settings.warmup_fraction * epochs * steps)
schedule = keras.optimizers.schedules.CosineDecay(
    initial_learning_rate=peak / 10,
    warmup_target=peak,
    warmup_steps=warmup_steps,
    decay_steps=max(epochs * steps - warmup_steps, 1),
)
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input([28, 28], dtype="uint8", name="pictures"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Reshape([28, 28, 1]),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3, seed=settings.seed),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

# Checkpoints --------------------------------------------------------------------------

# Everything that decides the result names the folder that a killed run is taken up
# from.
identity = {key: value for key, value in vars(settings).items() if key not in ("runs", "fresh")}
identity |= {"data": used, "devices": devices, "epochs": epochs}
key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
work = Path(settings.runs, ".work", f"mnist-{key}")
if settings.fresh:
    shutil.rmtree(work, ignore_errors=True)
with strategy.scope():
    model.optimizer.build(model.trainable_variables)
epochs_done = tf.Variable(0, dtype=tf.int64, trainable=False)
# Weights, the optimizer's moments and the random state of Dropout: what the next step
# depends on.
state = [variable.value for variable in (*model.variables, *model.optimizer.variables)]
# A checkpoint counts when the file that names it was renamed into place: a kill never
# leaves half of one.
checkpoints = tf.train.CheckpointManager(
    tf.train.Checkpoint(state=state, epochs_done=epochs_done), str(work / "checkpoints"), max_to_keep=1
)
if checkpoints.restore_or_initialize():
    print(f"taking up the run in {work} after epoch {int(epochs_done)}; --fresh starts it anew")
train = tf.data.Dataset.range(epochs_done, epochs).flat_map(one_epoch).prefetch(tf.data.AUTOTUNE)

# Training -----------------------------------------------------------------------------


class Checkpoint(keras.callbacks.Callback):
    """Saves the state after each epoch."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        epochs_done.assign(epoch + 1)
        checkpoints.save()


class LogLearningRate(keras.callbacks.Callback):
    """Logs the learning rate for the other callbacks, and prints a line an epoch."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        logs["learning_rate"] = float(schedule(self.model.optimizer.iterations))
        values = ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
        print(f"epoch {epoch + 1}/{epochs}: {values}", flush=True)


model.fit(
    train,
    initial_epoch=int(epochs_done),
    epochs=epochs,
    steps_per_epoch=steps,
    validation_data=test,
    verbose=1 if sys.stdout.isatty() else 0,
    callbacks=[Checkpoint(), LogLearningRate(), keras.callbacks.TensorBoard(work / "tensorboard")],
)
loss, accuracy = model.evaluate(test, verbose=0)
print(f"test accuracy {accuracy:.4f} on {used}")

# Export -------------------------------------------------------------------------------


@tf.function(input_signature=[tf.TensorSpec([None, 28, 28], tf.uint8, name="pictures")])
def predict(pictures: tf.Tensor) -> dict[str, tf.Tensor]:
    """Pictures [n, 28, 28], white on black -> digit [n], probabilities [n, 10]."""
    probabilities = tf.nn.softmax(model(pictures, training=False))
    return {"digit": tf.argmax(probabilities, axis=1), "probabilities": probabilities}


run = export(
    name="mnist",
    signatures={"serving_default": predict},
    samples=[
        {"signature_name": "serving_default", "instances": test_pictures[:n].tolist()} for n in (1, 8, 32)
    ],
    settings=identity,
    metrics={"test_accuracy": float(accuracy), "test_loss": float(loss)},
    seconds=time.monotonic() - started,
    card=f"""
Which digit a grey 28x28 picture shows, white on black. Two convolutions and a dense layer.

Data: {used}, {len(train_labels)} pictures to train on and {len(test_labels)} to test on. Trained on {devices}
device(s) with MirroredStrategy, {global_batch} pictures a step.
""",
    warmup_batch_sizes=(),
    folders={"tensorboard": work / "tensorboard"},
    runs=settings.runs,
)
shutil.rmtree(work)
print(f"run directory: {run}")
