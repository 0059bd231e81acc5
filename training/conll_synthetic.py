"""Generated sentences with named entities, in the format of the CoNLL-2003 shared task.

In: how many sentences, a seed. Out: ``train.txt`` and ``test.txt``, one word a line
with its tag in the last of four columns, a blank line after each sentence,
``-DOCSTART-`` before each document. The two in training/data/conll were made so:

    python training/conll_synthetic.py training/data/conll

People, places and organisations share their words (``Hale``, ``Port Hale``, ``Hale
Foundry``), and a part of the names in the test file are in no training sentence: what a
word is follows from the words around it.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from pathlib import Path

TEMPLATES = """
PER said on Tuesday that ORG would leave LOC .
PER , a lawyer from LOC , joined ORG in May .
ORG opened an office in LOC last year .
shares of ORG rose after PER resigned .
PER met PER in LOC .
the NATION team beat LOC three to one .
officials in LOC praised PER of ORG .
ORG and ORG agreed to merge , PER told reporters .
PER flew from LOC to LOC on Friday .
a NATION court fined ORG for the spill near LOC .
PER won the PRIZE for the second time .
workers at ORG in LOC went on strike .
the mayor of LOC thanked ORG and PER .
ORG named PER as its new head of research .
NATION tourists filled the streets of LOC .
PER , PER and PER were elected to the board of ORG .
nobody at ORG could be reached .
it rained in LOC while PER played in the PRIZE .
a spokesman for ORG said PER had no comment .
the train to LOC was late again .
PER scored twice for LOC in the PRIZE final .
police in LOC questioned a man who worked for ORG .
prices fell by four percent .
reports about ANY surprised ANY .
he had not heard of ANY or ANY .
ANY and ANY were in the news again .
first ANY , then ANY , now ANY .
ANY versus ANY : who wins ?
more on ANY , ANY and ANY below .
the NATION edition of the book by PER sold out in LOC .
""".strip().splitlines()
#: What is filled in (and ``ANY`` of the first three) -> the entity type that it is
#: tagged as.
SLOTS = {"PER": "PER", "LOC": "LOC", "ORG": "ORG", "NATION": "MISC", "PRIZE": "MISC"}
ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo"]
CODAS = ["", "", "l", "n", "r", "rd", "s", "ck", "nt", "m"]
FIRST = "Anna Ben Carla David Emma Felix Grace Hugo Iris Jonas Kira Leo Mara Nils Olga Paul Rosa Simon Tara"
PLACES = ["Port {}", "New {}", "{}", "{}", "{} Bay", "{} upon Sea", "San {}", "North {}"]
ORGANISATIONS = [
    "{} Foundry",
    "{} and {}",
    "Bank of {}",
    "{}",
    "{} Steel Works",
    "University of {}",
    "{} Group",
]
PRIZES = ["{} Cup", "{} Prize", "{} Open"]


@dataclass(frozen=True)
class Settings:
    """How many sentences each file has, and what decides every byte of them."""

    train: int = 1500
    test: int = 400
    seed: int = 1


class Names:
    """Made-up names, few of them frequent and most rare."""

    def __init__(self, random: random.Random, count: int) -> None:
        self.random = random
        made: dict[str, None] = {}
        while len(made) < count:
            syllables = random.choice((1, 2, 2))
            word = "".join(random.choice(ONSETS) + random.choice(VOWELS) for _ in range(syllables))
            made[(word + random.choice(CODAS)).capitalize()] = None
        words = [word for word in made if len(word) > 3]
        third = len(words) // 3
        self.words = words
        self.usual = {"PER": words[:third], "LOC": words[third : 2 * third], "ORG": words[2 * third :]}

    def draw(self, kind: str) -> str:
        """A name, mostly one of those that this kind of entity usually has."""
        usual = self.random.random() < 0.8
        words = self.usual.get(kind, self.words) if usual else self.words
        return words[int(len(words) * self.random.random() ** 2)]

    def entity(self, kind: str) -> list[str]:
        """The words of an entity of this kind."""
        choose = self.random.choice
        if kind == "PER":
            name = self.draw(kind)
            return [choose(FIRST.split()), name] if self.random.random() < 0.6 else [name]
        if kind == "LOC":
            pattern = choose(PLACES)
        elif kind == "ORG":
            pattern = choose(ORGANISATIONS)
        elif kind == "PRIZE":
            pattern = choose(PRIZES)
        else:
            return [self.draw(kind) + choose(["ian", "ese", "ish"])]
        return pattern.format(*(self.draw(kind) for _ in range(pattern.count("{}")))).split()


def sentence(random: random.Random, names: Names) -> list[tuple[str, str]]:
    """Words with tags: ``B-`` begins an entity, ``I-`` continues it, ``O`` is none."""
    made: list[tuple[str, str]] = []
    for word in random.choice(TEMPLATES).split():
        if word == "ANY":
            word = random.choice(("PER", "LOC", "ORG"))
        if word in SLOTS:
            first, *rest = names.entity(word)
            kind = SLOTS[word]
            made += [(first, f"B-{kind}"), *((other, f"I-{kind}") for other in rest)]
        else:
            made.append((word, "O"))
    return made


def write(file: Path, sentences: list[list[tuple[str, str]]]) -> None:
    lines = []
    for number, words in enumerate(sentences):
        if number % 20 == 0:
            lines += ["-DOCSTART- _ _ O", ""]
        lines += [f"{word} _ _ {tag}" for word, tag in words] + [""]
    file.write_text("\n".join(lines) + "\n")


def generate(directory: Path, settings: Settings) -> None:
    """Write ``train.txt`` and ``test.txt``; the same settings give the same files."""
    source = random.Random(settings.seed)
    names = Names(source, 1500)
    directory.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", settings.train), ("test", settings.test)):
        write(directory / f"{name}.txt", [sentence(source, names) for _ in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    settings = vars(parser.parse_args())
    generate(settings.pop("directory"), Settings(**settings))


if __name__ == "__main__":
    main()
