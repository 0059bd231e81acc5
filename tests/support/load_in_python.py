"""Load original and mapped models with TensorFlow's Python loaders; compare answers.

In: ``python load_in_python.py ORIGINALS MAPPED NAME...``. Exits 0 if all answers are
the same, bit by bit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

v1 = tf.compat.v1
#: Not for callers, but one of Python's loaders shows it.
INIT = "__saved_model_init_op"


def value(shape: Any, dtype: Any) -> NDArray[Any]:
    sizes = [2 if size is None else size for size in shape]
    return np.full(sizes, b"", object) if dtype == tf.string else np.ones(sizes, dtype.as_numpy_dtype)


def answers(path: Path) -> dict[str, list[NDArray[Any]]]:
    loaded = tf.saved_model.load(str(path), tags=["serve"])
    found = {}
    for key, function in loaded.signatures.items():
        if key == INIT:
            continue
        inputs = function.structured_input_signature[1]
        fed = {name: tf.constant(value(spec.shape, spec.dtype)) for name, spec in inputs.items()}
        found[key] = [output.numpy() for _, output in sorted(function(**fed).items())]
    return found


def answers_in_v1(path: Path) -> dict[str, list[NDArray[Any]]]:
    found = {}
    with tf.Graph().as_default(), v1.Session() as session:
        graph = v1.saved_model.load(session, ["serve"], str(path))
        for key, signature in sorted(graph.signature_def.items()):
            if key == INIT:
                continue
            fed = {
                info.name: value(
                    [None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim],
                    tf.as_dtype(info.dtype),
                )
                for info in signature.inputs.values()
            }
            fetches = [info.name for _, info in sorted(signature.outputs.items())]
            found[key] = session.run(fetches, fed)
    return found


def main(originals: Path, mapped: Path, names: list[str]) -> None:
    for name in names:
        for load in (answers, answers_in_v1):
            one, other = load(originals / name), load(mapped / name)
            assert one
            assert one.keys() == other.keys()
            for key in one:
                for mine, theirs in zip(one[key], other[key], strict=True):
                    assert mine.dtype == theirs.dtype, (name, key)
                    assert np.array_equal(mine, theirs), (name, key)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
