"""Prove that a mapped model answers as its original does, bit by bit.

In: both SavedModels, and requests: the warmup records of the original, others, or
generated ones. Out: how many there were, or an error that names the first request whose
answers differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spikeless.errors import FailedPrecondition, SpikelessError
from spikeless.formats import savedmodel, session_overrides
from spikeless.formats.protos import meta_graph_pb2, types_pb2
from spikeless.formats.savedmodel import TensorSpec
from spikeless.formats.tensors import numpy_dtype
from spikeless.runtime import Session
from spikeless.runtime.model import Model
from spikeless.warmup import synthetic, warmup_file
from spikeless.warmup.records import Record, read
from spikeless.warmup.replay import answer
from spikeless.warmup.requests import Servable, predict

#: Of unknown dimensions in generated requests.
_SIZE = 4
#: Random integers are below this: ids, tokens and counts.
_LARGEST_ID = 64
#: An answer as a digest, or the code of the error that the model answered with.
_Answer = bytes | int


def verify(
    original: str | os.PathLike[str],
    mapped: str | os.PathLike[str],
    tags: Collection[str] = savedmodel.SERVE_TAGS,
    records: Path | None = None,
) -> int:
    """Send both models the same requests in the same order, and compare the answers.

    Args:
        original: takes as much memory as it does on a server.
        mapped: its graph names files that exist here.
        tags: the meta graph to compare.
        records: a warmup file; None: that of ``original``, or else inputs generated for
            each signature.

    Returns:
        The number of requests.

    Raises:
        FailedPrecondition: the answers differ, or a signature answers nothing, so that
            nothing is proved.
    """
    requests = list(_requests(original, tags, records))
    if not requests:
        raise FailedPrecondition(f"{records or warmup_file(original)} holds no request to compare answers on")
    before = _answers(original, tags, requests)
    _refuse_unanswered(original, requests, before)
    after = _answers(mapped, tags, requests)
    if after == before:
        return len(requests)
    differing = next(
        request for request, one, other in zip(requests, before, after, strict=True) if one != other
    )
    if _answers(original, tags, requests) != before:
        raise FailedPrecondition(
            f"{original} does not even answer as itself when it is loaded again, starting with "
            f"{_describe(differing)}: the comparison proves nothing; --no-verify leaves it out"
        )
    raise FailedPrecondition(f"{original}: mapped, it answers {_describe(differing)} differently")


def _requests(
    original: str | os.PathLike[str], tags: Collection[str], records: Path | None
) -> Iterator[Record]:
    file = records or warmup_file(original)
    if records or file.is_file():
        return (record for record in read(file) if record.kind)
    return _generated(savedmodel.read(original).meta_graph(tags))


def _answers(
    path: str | os.PathLike[str], tags: Collection[str], requests: Iterable[Record]
) -> list[_Answer]:
    with Session.load(path, tags, session_overrides.session_config(path)) as session:
        model = Model(session, tensor_content=True)
        return [_answer(model, request) for request in requests]


def _answer(model: Model, request: Record) -> _Answer:
    try:
        response = answer(model, request)
    except SpikelessError as error:
        return int(error.code)
    return hashlib.sha256(response.SerializeToString(deterministic=True)).digest()


def _refuse_unanswered(
    original: str | os.PathLike[str], requests: Sequence[Record], answers: Sequence[_Answer]
) -> None:
    """Every signature that is asked must answer something."""
    asked = {_signature(request): request for request in requests}
    answered = {
        _signature(request)
        for request, answer in zip(requests, answers, strict=True)
        if isinstance(answer, bytes)
    }
    for signature in sorted(asked.keys() - answered):
        raise FailedPrecondition(
            f"{original} answers no {_describe(asked[signature])}, so nothing would be proved; "
            "give it warmup records that it answers, or use --no-verify"
        )


def _signature(request: Record) -> str:
    spec = getattr(request.request, "model_spec", None)
    return "" if spec is None else spec.signature_name or savedmodel.DEFAULT_SIGNATURE


def _describe(request: Record) -> str:
    signature = _signature(request)
    return f"request {request.number} ({request.kind}{f' to {signature}' if signature else ''})"


def _generated(meta_graph: meta_graph_pb2.MetaGraphDef) -> Iterator[Record]:
    """Two requests for every signature: a plain one, and one with random values."""
    servable = Servable(meta_graph, savedmodel.signatures_of(meta_graph), {})
    logs = []
    for key, signature in servable.signatures.items():
        logs.append(synthetic.request(servable, servable.target(key), {None: (_SIZE,)}).log)
        if all(spec.dtype != types_pb2.DT_STRING for spec in signature.inputs.values()):
            generator = np.random.default_rng(0)
            inputs = {alias: _random(spec, generator) for alias, spec in signature.inputs.items()}
            logs.append(predict(key, inputs))
    return (Record(number, log, log.ByteSize()) for number, log in enumerate(logs, 1))


def _random(spec: TensorSpec, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    shape = [_SIZE if size is None else size for size in spec.shape or ()]
    dtype = numpy_dtype(spec.dtype)
    if dtype.kind in "iub":
        return generator.integers(0, _LARGEST_ID, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)
