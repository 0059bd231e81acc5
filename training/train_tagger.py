"""Train a named-entity tagger with a conditional random field on CoNLL-2003 files.

In: two files, one word a line, its tag in the last column, a blank line after each
sentence; by default those in training/data/conll. Out: a run directory with a
SavedModel that takes sentences as they are.

    spikeless train tagger              # about 1 min on 2 cores, test F1 over 0.93
    spikeless train tagger --train eng.train --test eng.testb

The model: Embedding, Bidirectional GRU, Dense, CRF. The Dense layer scores each tag for
each word, the CRF adds what follows what, and Viterbi finds the best path. The same
network without it is trained beside it.

tf2crf is for Keras 2 and tensorflow-addons; `spikeless.training.crf` makes it work with
the installed TensorFlow.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spikeless.errors import InvalidArgument, NotFound
from spikeless.training import crf
from spikeless.training.settings import parse_settings

# Settings -----------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
parser = argparse.ArgumentParser(
    prog="spikeless train tagger",
    description=__doc__.partition("\n")[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--train", type=Path, default=HERE / "data" / "conll" / "train.txt", help="to train on")
parser.add_argument("--test", type=Path, default=HERE / "data" / "conll" / "test.txt", help="to test on")
parser.add_argument("--dimensions", type=int, default=64, help="of a word's embedding")
parser.add_argument("--units", type=int, default=64, help="of the GRU in each direction")
parser.add_argument("--dropout", type=float, default=0.3, help="between embedding, GRU and Dense")
parser.add_argument("--minimum-count", type=int, default=2, help="rarer words count as unknown")
parser.add_argument("--epochs", type=int, default=12, help="passes over the training sentences")
parser.add_argument("--batch-size", type=int, default=32, help="sentences a step")
parser.add_argument("--learning-rate", type=float, default=0.003, help="of Adam")
parser.add_argument("--predictions", type=Path, help="write the test sentences with the tags found here")
parser.add_argument("--seed", type=int, default=1, help="of the initial weights and the shuffling")
parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run directory is written")
settings = parse_settings(parser)

# Data ---------------------------------------------------------------------------------


def read(file: Path, known: set[str] | None = None) -> list[tuple[list[str], list[str]]]:
    """Sentences as words and tags; an ``I-`` that continues nothing begins an entity.

    Args:
        known: the tags that may occur; any well-formed one if None.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NotFound(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{file} is not UTF-8 text: {error}") from None
    sentences = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], start=1):
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if words:
                sentences.append((words, tags))
                words, tags = [], []
            continue
        if len(columns) < 2:
            raise InvalidArgument(
                f"{file}, line {number}: {line!r} has no tag; write word and tag on each line"
            )
        tag = columns[-1]
        if not re.fullmatch(r"O|[BI]-\S+", tag):
            raise InvalidArgument(f"{file}, line {number}: {tag!r} is no tag; they are O, B-<type>, I-<type>")
        if tag.startswith("I-") and (not tags or tags[-1][1:] != tag[1:]):
            tag = "B" + tag[1:]
        if known is not None and tag not in known:
            raise InvalidArgument(
                f"{file}, line {number}: the tag {tag} is not in the training file, which has: "
                f"{', '.join(sorted(known))}"
            )
        words.append(columns[0])
        tags.append(tag)
    if not sentences:
        raise InvalidArgument(f"{file} has no sentences")
    return sentences


train = read(settings.train)
TAGS = sorted({tag for _, tags in train for tag in tags}, key=lambda tag: (tag[2:], tag))  # O is the first
test = read(settings.test, set(TAGS))
if len(TAGS) < 2:
    raise InvalidArgument(f"{settings.train} has only the tag {TAGS[0]}: there is nothing to learn")
counts: dict[str, int] = {}
for words, _ in train:
    for word in words:
        counts[word] = counts.get(word, 0) + 1
vocabulary = [word for word, count in counts.items() if count >= settings.minimum_count]
if not vocabulary:
    raise InvalidArgument(
        f"{settings.train}: no word occurs {settings.minimum_count} times; lower --minimum-count"
    )
#: Ids of words: 0 is padding, 1 a word that is not known, the vocabulary follows.
PADDING, UNKNOWN, FIRST = 0, 1, 2
word_ids = {word: number for number, word in enumerate(vocabulary, start=FIRST)}
tag_ids = {tag: number for number, tag in enumerate(TAGS)}

# TensorFlow, with Keras 2 -------------------------------------------------------------

crf.prepare()

import tensorflow as tf  # only once the settings and the files are good
import tf2crf
from seqeval.metrics import f1_score, precision_score, recall_score

from spikeless.training.export import export

# Batches ------------------------------------------------------------------------------

started = time.monotonic()
tf.keras.utils.set_random_seed(settings.seed)  # Python's, NumPy's and TensorFlow's
print(
    f"{len(train)} sentences to train on, {len(test)} to test on, {len(vocabulary)} words known, "
    f"tags: {', '.join(TAGS)}"
)


def batches(sentences: list[tuple[list[str], list[str]]], *, shuffle: bool = False) -> tf.data.Dataset:
    """Word ids, tag ids, weights [batch, longest]; padding is 0 in all of them."""

    def encoded() -> Iterator[tuple[list[int], list[int], list[float]]]:
        for words, tags in sentences:
            ids = [word_ids.get(word, UNKNOWN) for word in words]
            yield ids, [tag_ids[tag] for tag in tags], [1.0] * len(ids)

    types = tuple(tf.TensorSpec([None], dtype) for dtype in (tf.int64, tf.int64, tf.float32))
    made = tf.data.Dataset.from_generator(encoded, output_signature=types).cache()
    if shuffle:
        made = made.shuffle(len(sentences), seed=settings.seed)
    return made.padded_batch(settings.batch_size).prefetch(tf.data.AUTOTUNE)


train_batches, test_batches = batches(train, shuffle=True), batches(test)

# Model --------------------------------------------------------------------------------


def network() -> tf.keras.Sequential:
    """Word ids [batch, length] -> scores [batch, length, tags]; padding is masked."""
    return tf.keras.Sequential(
        [
            tf.keras.Input([None], dtype="int64"),
            tf.keras.layers.Embedding(FIRST + len(vocabulary), settings.dimensions, mask_zero=True),
            tf.keras.layers.Dropout(settings.dropout),
            tf.keras.layers.Bidirectional(tf.keras.layers.GRU(settings.units, return_sequences=True)),
            tf.keras.layers.Dropout(settings.dropout),
            tf.keras.layers.Dense(len(TAGS)),
        ]
    )


scores = network()
with_crf = tf.keras.Model(scores.input, tf2crf.CRF(name="crf")(scores.output))
tagger = tf2crf.ModelWithCRFLoss(with_crf, sparse_target=True)
tagger.compile(tf.keras.optimizers.Adam(settings.learning_rate))
without_crf = network()
without_crf.compile(
    tf.keras.optimizers.Adam(settings.learning_rate),
    tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)

# Training -----------------------------------------------------------------------------

verbose = 1 if sys.stdout.isatty() else 2
print("with the CRF:")
tagger.fit(train_batches, epochs=settings.epochs, verbose=verbose)
print("without it:")
without_crf.fit(train_batches, epochs=settings.epochs, verbose=verbose)


@tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64)])
def viterbi(ids: tf.Tensor) -> tf.Tensor:
    """Word ids [batch, length], padded at the end -> tag ids of the best path."""
    length = tf.shape(ids)[1]
    ids = tf.pad(ids, [[0, 0], [0, tf.maximum(1 - length, 0)]])  # a GRU cannot take sentences of no word
    return tf.cast(with_crf(ids, training=False)[0], tf.int64)[:, :length]


@tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64)])
def likeliest(ids: tf.Tensor) -> tf.Tensor:
    """The same without the CRF: the best tag of each word by itself."""
    return tf.argmax(without_crf(ids, training=False), axis=-1)


def tags_of(find: Callable[[tf.Tensor], tf.Tensor]) -> list[list[str]]:
    """The tags that a function finds in the test sentences, without padding."""
    found = [row for ids, _, _ in test_batches for row in find(ids).numpy()]
    return [[TAGS[tag] for tag in row[: len(words)]] for row, (words, _) in zip(found, test, strict=True)]


def broken(found: list[list[str]]) -> int:
    """How many ``I-`` tags continue nothing, which no annotator writes."""
    return sum(
        tag.startswith("I-") and before[1:] != tag[1:]
        for tags in found
        for before, tag in zip(["O", *tags[:-1]], tags, strict=True)
    )


truth = [tags for _, tags in test]
found, found_without = tags_of(viterbi), tags_of(likeliest)
metrics = {
    "test_f1": float(f1_score(truth, found)),
    "test_precision": float(precision_score(truth, found)),
    "test_recall": float(recall_score(truth, found)),
    "test_f1_without_crf": float(f1_score(truth, found_without)),
    "test_broken_entities": broken(found),
    "test_broken_entities_without_crf": broken(found_without),
}
print(f"entity F1: {metrics['test_f1']:.4f} with the CRF, {metrics['test_f1_without_crf']:.4f} without")

# Export -------------------------------------------------------------------------------

names = tf.constant(TAGS)


def named(ids: tf.Tensor, tags: tf.Tensor) -> tf.Tensor:
    """Tag names [batch, length]; padding has none."""
    return tf.where(ids == PADDING, "", tf.gather(names, tags))


with tempfile.TemporaryDirectory() as folder:
    # One word a line; the file becomes an asset of the SavedModel.
    asset = Path(folder, "vocabulary.txt")
    asset.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    lines = tf.lookup.TextFileInitializer(
        str(asset),
        tf.string,
        tf.lookup.TextFileIndex.WHOLE_LINE,
        tf.int64,
        tf.lookup.TextFileIndex.LINE_NUMBER,
    )
    table = tf.lookup.StaticHashTable(lines, default_value=UNKNOWN - FIRST)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="sentences")])
    def tag_sentences(sentences: tf.Tensor) -> dict[str, tf.Tensor]:
        """Sentences [batch] -> words, tags [batch, longest], padded with ""."""
        words = tf.strings.split(sentences)
        ids = words.with_values(table.lookup(words.values) + FIRST).to_tensor(PADDING)
        return {"words": words.to_tensor(""), "tags": named(ids, viterbi(ids))}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int64, name="ids")])
    def tag_ids_of(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """Word ids [batch, length], padded with 0 -> tag ids, names [batch, length]."""
        tags = viterbi(ids)
        return {"tag_ids": tags, "tags": named(ids, tags)}

    sentences = [" ".join(words) for words, _ in test[:16]]
    ids = next(iter(test_batches))[0].numpy()[:8]
    run = export(
        name="tagger",
        signatures={"serving_default": tag_sentences, "ids": tag_ids_of},
        samples=[
            *({"signature_name": "serving_default", "instances": sentences[:count]} for count in (1, 16)),
            {"signature_name": "ids", "instances": ids},
        ],
        settings=vars(settings),
        metrics=metrics,
        seconds=time.monotonic() - started,
        card=f"""
Finds names in sentences: {", ".join(sorted({tag[2:] for tag in TAGS} - {""}))}.
Words are what spaces separate. `B-` tags the first word of an entity, `I-` the next ones, `O` all others.

Embedding, bidirectional GRU, Dense and a conditional random field (tf2crf); the tags are its Viterbi path.
`test_f1` counts whole entities (seqeval); `test_f1_without_crf` is the same network without the CRF.

Data: {settings.train.name} ({len(train)} sentences) and {settings.test.name} ({len(test)}).
""",
        resources=[table],
        warmup_batch_sizes=(),
        runs=settings.runs,
    )

if settings.predictions:
    with open(settings.predictions, "w", encoding="utf-8") as out:
        for (words, tags), best in zip(test, found, strict=True):
            rows = zip(words, tags, best, strict=True)
            out.writelines(f"{word} {tag} {name}\n" for word, tag, name in rows)
            out.write("\n")
print(f"run directory: {run}")
