"""Build a warmup file.

In: a SavedModel and sample files, or none. Out: its
``assets.extra/tf_serving_warmup_requests``, in which every record fits its signature.
On any error nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spikeless.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from spikeless.formats import tfrecord
from spikeless.formats.savedmodel import DEFAULT_SIGNATURE
from spikeless.warmup import samples, synthetic
from spikeless.warmup.batching import rebatch
from spikeless.warmup.records import MAX_RECORDS, warmup_file
from spikeless.warmup.requests import Servable, WarmupRequest
from spikeless.warmup.samples import Router, SampleFile
from spikeless.warmup.validation import validate

#: TensorFlow Serving's default name of a model.
DEFAULT_MODEL_NAME = "default"


@dataclass(frozen=True)
class BuildSettings:
    """What goes into a warmup file."""

    #: Files of sample requests. Without any, requests are generated from the
    #: signatures.
    samples: tuple[SampleFile, ...] = ()
    #: The signatures to warm; without a sample, one gets a generated request. Default:
    #: the signatures of the samples, or all where there are no samples.
    signatures: tuple[str, ...] = ()
    #: Signature key -> ``Predict``, ``Classify`` or ``Regress``, where its method name
    #: says something else; TensorFlow 2 exports every signature as Predict.
    kinds: Mapping[str, str] = field(default_factory=dict)
    #: The Classify and Regress signatures of each MultiInference request.
    multi_inference: tuple[tuple[str, ...], ...] = ()
    #: The batch sizes of the requests; empty leaves samples as they are.
    batch_sizes: tuple[int, ...] = ()
    #: Sizes of unknown dimensions in generated requests.
    dims: synthetic.Dims = field(default_factory=dict)
    #: The model name in the requests, which servers ignore when they warm up. None
    #: keeps the name in a PredictionLog sample, else ``default``.
    model_name: str | None = None


def make_requests(saved_model: str | os.PathLike[str], settings: BuildSettings) -> list[WarmupRequest]:
    """The requests of a warmup file, each of which fits its signature.

    Raises:
        NotFound: no SavedModel, sample file or signature where one was named.
        InvalidArgument: a sample does not fit its signature, or a setting names
            nothing.
        ResourceExhausted: more than ``MAX_RECORDS`` requests.
    """
    _check(settings)
    servable = Servable.read(saved_model, settings.kinds)
    named = [servable.target(key) for key in settings.signatures]
    joined = [servable.multi_inference(keys) for keys in settings.multi_inference]
    _check_names(servable, settings)
    router = Router(servable, named, joined)
    requests = [request for file in settings.samples for request in samples.read(file, router)]
    for request in requests:
        _address(request, settings.model_name)
    covered = {tuple(spec.signature_name for spec in request.model_specs) for request in requests}
    if not settings.samples and not named:
        named = [servable.target(key) for key in servable.signatures]
    wanted = [target for target in (*named, *joined) if target.keys not in covered]
    for target in wanted:
        requests.append(synthetic.request(servable, target, settings.dims))
        _address(requests[-1], settings.model_name)
    for request in requests:
        validate(servable, request)
    if settings.batch_sizes:
        requests = rebatch(servable, requests, settings.batch_sizes)
    if not requests:
        raise InvalidArgument(f"{saved_model} has no signature to warm")
    if len(requests) > MAX_RECORDS:
        raise ResourceExhausted(
            f"{len(requests)} records: a server refuses a warmup file with more than {MAX_RECORDS}; give "
            "fewer samples, or larger or fewer batch sizes"
        )
    return requests


def build(saved_model: str | os.PathLike[str], settings: BuildSettings | None = None) -> Path:
    """Write the warmup file of ``saved_model``, over an older one; returns its path.

    On any error an older warmup file stays as it is.

    Raises:
        SpikelessError: as `make_requests` does.
        FailedPrecondition: the file cannot be written.
    """
    requests = make_requests(saved_model, settings or BuildSettings())
    path = warmup_file(saved_model)
    try:
        path.parent.mkdir(exist_ok=True)
        # Deterministic, so that the same samples give the same file.
        tfrecord.write(path, (request.log.SerializeToString(deterministic=True) for request in requests))
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be written: {error.strerror}") from None
    return path


def _check(settings: BuildSettings) -> None:
    if isinstance(settings.samples, str) or not all(isinstance(one, SampleFile) for one in settings.samples):
        raise InvalidArgument("samples must be a tuple of SampleFile, such as (SampleFile(path),)")
    for size in settings.batch_sizes:
        if size < 1:
            raise InvalidArgument(f"batch size {size}: it must be 1 or more")
    for alias, sizes in settings.dims.items():
        if any(size < 0 for size in sizes):
            raise InvalidArgument(f"dimensions {sizes} of {alias or 'every input'}: none may be negative")


def _check_names(servable: Servable, settings: BuildSettings) -> None:
    for key in settings.kinds:
        servable.signature(key)
    known = {alias for signature in servable.signatures.values() for alias in signature.inputs}
    for alias in settings.dims:
        if alias is not None and alias not in known:
            raise InvalidArgument(f"no signature has input {alias!r}; there is: {', '.join(sorted(known))}")


def _address(request: WarmupRequest, model_name: str | None) -> None:
    """Name model and signature, no version: a record warms the one it comes with."""
    for spec in request.model_specs:
        spec.name = model_name or spec.name or DEFAULT_MODEL_NAME
        spec.signature_name = spec.signature_name or DEFAULT_SIGNATURE
        spec.ClearField("version")
        spec.ClearField("version_label")
