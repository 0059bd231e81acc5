"""Synthetic click data in the Criteo format, with a signal to learn.

In: how many rows, a seed. Out: tab-separated files without a header, as Criteo's: a
label (1 for a click), 13 integers I1-I13, 26 categories C1-C26 of 8 hexadecimal digits;
any of them but the label may be empty.

    python training/criteo_synthetic.py runs/criteo --train-rows 200000

The click probability of a row is sigmoid of: an effect of each category; a dot product
between two groups of categories (the user's C1-C13 and the candidate's C14-C26), which
no linear model can express; and a curved effect of the integers. Since it is known, so
is the best AUC that any model can reach on the test rows: the ceiling, in
``synthetic.json``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import criteo
import numpy as np
from criteo import CATEGORIES, INTEGERS, USER_CATEGORIES
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from spikeless.disk import atomic
from spikeless.errors import AlreadyExists

FACTS_FILE = "synthetic.json"


@dataclass(frozen=True)
class Settings:
    """What decides every byte of the files."""

    train_rows: int = 200_000
    test_rows: int = 50_000
    seed: int = 1
    #: Different values of the rarest category column; the others have fewer, down to
    #: ten.
    vocabulary: int = 500
    #: Part of the integers and categories that are empty.
    missing: float = 0.05


class Clicks:
    """What rows are drawn from: the categories' frequencies and effects on a click."""

    RANK = 2

    def __init__(self, settings: Settings) -> None:
        random = np.random.default_rng(settings.seed)
        self.settings = settings
        self.random = random
        self.sizes = np.geomspace(10, settings.vocabulary, CATEGORIES).astype(int)
        # Half of the columns with many values belong to the user, half to the
        # candidate.
        self.sizes = np.concatenate([self.sizes[0::2], self.sizes[1::2]])
        self.effects = [random.normal(0, 0.25, size) for size in self.sizes]
        self.factors = [random.normal(0, 0.3, (size, self.RANK)) for size in self.sizes]
        self.names = [random.integers(0, 1 << 32, size, dtype=np.uint64) for size in self.sizes]
        self.weights = random.normal(0, 0.25, INTEGERS)

    def draw(self, rows: int) -> tuple[NDArray[Any], ...]:
        """Labels, probabilities [n], integers [n, 13], categories [n, 26]; -1 empty."""
        random = self.random
        # Few values are frequent and most are rare, as in real logs.
        categories = np.stack([(size * random.random(rows) ** 3).astype(int) for size in self.sizes], axis=1)
        categories[random.random(categories.shape) < self.settings.missing] = -1
        integers = np.floor(random.lognormal(1.5, 1.2, (rows, INTEGERS))).astype(int)
        integers[random.random(integers.shape) < self.settings.missing] = -1

        logit = np.full(rows, -1.1)
        sums = np.zeros((2, rows, self.RANK))
        for column in range(CATEGORIES):
            present = categories[:, column] >= 0
            values = categories[present, column]
            logit[present] += self.effects[column][values]
            sums[int(column >= USER_CATEGORIES), present] += self.factors[column][values]
        logit += (sums[0] * sums[1]).sum(axis=1)
        magnitude = np.log1p(np.maximum(integers, 0)) - 1.7
        logit += np.where(integers >= 0, magnitude - 0.5 * magnitude**2, 0) @ self.weights
        probability = 1 / (1 + np.exp(-logit))
        return (random.random(rows) < probability).astype(int), probability, integers, categories

    def write(self, file: Path, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Write rows and return their labels and click probabilities."""
        labels, probabilities, integers, categories = self.draw(rows)
        columns = [labels.astype(str)]
        columns += [np.where(column >= 0, column.astype(str), "") for column in integers.T]
        for names, column in zip(self.names, categories.T, strict=True):
            text = np.array([f"{name:08x}" for name in names])
            columns.append(np.where(column >= 0, text[column], ""))
        with open(file, "w") as out:
            out.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))
        return labels, probabilities


def generate(directory: Path, settings: Settings) -> None:
    """Write ``train.tsv``, ``test.tsv`` and ``synthetic.json``, all of them or none."""
    if directory.exists():
        raise AlreadyExists(f"{directory} exists; remove it or name another directory")
    world = Clicks(settings)
    with atomic.staging(directory.parent / ".staging") as staging:
        made = staging / "data"
        made.mkdir()
        world.write(made / "train.tsv", settings.train_rows)
        labels, probabilities = world.write(made / "test.tsv", settings.test_rows)
        facts = {
            "synthetic": True,
            "settings": asdict(settings),
            "test_click_rate": float(labels.mean()),
            "test_auc_ceiling": float(roc_auc_score(labels, probabilities)),
        }
        (made / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
        made.rename(directory)


def records(directory: Path, settings: Settings, *, spark: bool = False) -> dict[str, Any]:
    """The same rows as TFRecords, in ``train`` and ``test``, unless they exist.

    Returns what ``synthetic.json`` says.

    Args:
        spark: let Spark write them.

    Raises:
        AlreadyExists: the directory holds rows that other settings made.
    """
    if not (directory / FACTS_FILE).exists():
        generate(directory, settings)
    facts: dict[str, Any] = json.loads((directory / FACTS_FILE).read_text())
    if facts["settings"] != asdict(settings):
        raise AlreadyExists(f"{directory} was made with other settings; remove it or name another directory")
    for part in ("train", "test"):
        if not (directory / part).exists():
            criteo.write(directory / f"{part}.tsv", directory / part, spark=spark)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    settings = vars(parser.parse_args())
    directory = settings.pop("directory")
    generate(directory, Settings(**settings))
    print((directory / FACTS_FILE).read_text(), end="")


if __name__ == "__main__":
    main()
