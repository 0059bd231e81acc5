"""The last step of every training script: write a run directory that can be published.

In: the model's signatures as TensorFlow functions, sample requests, settings and
metrics. Out: ``<runs>/<name>-<UTC time>/``, which appears whole or not at all, with

    saved_model/     the SavedModel to map and publish, with warmup if asked for
    samples.jsonl    sample requests to build warmup from, one REST request a line
    metrics.json     settings, metrics, wall time, versions, commit
    README.md        the model card

The functions may come from Keras 2 (``tf_keras``) as well as from Keras 3.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import itertools
import json
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import spikeless
from spikeless import warmup
from spikeless.disk import atomic
from spikeless.disk.git import commit
from spikeless.errors import InvalidArgument

#: Methods that a signature may have, as TensorFlow Serving names them in
#: ``signature_constants.h``.
METHODS = {
    "predict": "tensorflow/serving/predict",
    "classify": "tensorflow/serving/classify",
    "regress": "tensorflow/serving/regress",
}
_PACKAGES = (
    "tensorflow",
    "keras",
    "numpy",
    "scikit-learn",
    "pyspark",
    "tensorflow-datasets",
    "tf_keras",
    "tf2crf",
    "seqeval",
)


def export(
    *,
    name: str,
    signatures: Mapping[str, Any],
    samples: Iterable[Mapping[str, Any]],
    settings: Any,
    metrics: Mapping[str, Any],
    seconds: float,
    card: str,
    methods: Mapping[str, str] | None = None,
    resources: Iterable[Any] = (),
    warmup_batch_sizes: Sequence[int] | None = None,
    folders: Mapping[str, Path] | None = None,
    runs: str | Path = "runs",
) -> Path:
    """Write a run directory and return its path; a failure leaves none behind.

    Args:
        name: what the run is called; the name of the training script.
        signatures: signature key -> ``tf.function`` with an input signature that
            returns a dictionary of tensors. The variables that these functions use are
            exported, and no others: an optimizer's slots would treble the size of every
            load.
        samples: request bodies of TensorFlow Serving's REST API, such as
            ``{"signature_name": "serving_default", "instances": [[1.0, 2.0]]}``.
        settings: a dataclass or a mapping: everything needed to run the same again, the
            seed included.
        metrics: metric -> value, such as ``{"test_auc": 0.99}``.
        seconds: wall time of the training.
        card: the model card's text (markdown, without a title): what the model does,
            the data it comes from, what it should not be used for. Metrics and settings
            are added to it.
        methods: signature key -> ``classify`` or ``regress`` where it is not
            ``predict``.
        resources: lookup tables, assets, and layers that hold some, which the
            signatures use.
        warmup_batch_sizes: build the warmup file from the samples, put into batches of
            each of these sizes; empty leaves them as they are. None leaves warmup to
            ``spikeless warmup build``.
        folders: name in the run directory -> a folder to copy there, such as logs.
        runs: where run directories are kept.

    Raises:
        InvalidArgument: a sample or method that names no signature, a signature that
            TensorFlow Serving would refuse for its method, no sample at all, a sample
            that does not fit its signature.
    """
    import tensorflow as tf

    moment = datetime.now(timezone.utc)
    methods = dict(methods or {})
    lines = list(samples)
    _check_names(name, signatures, methods, lines)
    record = {
        "name": name,
        "time": moment.isoformat(timespec="seconds"),
        "metrics": dict(metrics),
        "settings": _mapping(settings),
        "seconds": round(seconds, 3),
        "versions": {
            "python": platform.python_version(),
            **_package_versions(),
            "spikeless": spikeless.__version__,
        },
        "commit": commit(Path.cwd()),
    }
    runs = Path(runs)
    functions = {key: function.get_concrete_function() for key, function in signatures.items()}
    for key, method in methods.items():
        _check_method(key, method, functions[key])
    with atomic.staging(runs / ".staging") as staging:
        run = staging / "run"
        saved_model = run / "saved_model"
        root = tf.Module()
        root.weights = _variables(functions.values())
        root.resources = list(resources)
        tf.saved_model.save(root, str(saved_model), signatures=functions)
        _set_methods(saved_model, methods)
        samples_file = run / "samples.jsonl"
        samples_file.write_text("".join(_json(line) + "\n" for line in lines))
        if warmup_batch_sizes is not None:
            wanted = warmup.BuildSettings(
                samples=(warmup.SampleFile(samples_file),), batch_sizes=tuple(warmup_batch_sizes)
            )
            warmup.build(saved_model, wanted)
        for folder, source in (folders or {}).items():
            shutil.copytree(source, run / folder)
        (run / "metrics.json").write_text(json.dumps(record, indent=2, default=_plain) + "\n")
        (run / "README.md").write_text(_card(card, record))
        atomic.make_readable(run)
        atomic.sync_tree(run)
        return _rename(run, runs, f"{name}-{moment:%Y%m%dT%H%M%SZ}")


def _check_names(
    name: str,
    signatures: Mapping[str, Any],
    methods: Mapping[str, str],
    samples: list[Mapping[str, Any]],
) -> None:
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise InvalidArgument(f"run name {name!r} must be letters, digits and underscores")
    if not samples:
        raise InvalidArgument(f"{name}: no sample requests; warmup is built from them, so give at least one")
    known = ", ".join(sorted(signatures))
    for sample in samples:
        key = sample.get("signature_name", "serving_default")
        if key not in signatures:
            raise InvalidArgument(f"{name}: a sample names the signature {key!r}; there is: {known}")
    for key, method in methods.items():
        if key not in signatures:
            raise InvalidArgument(f"{name}: a method is given for the signature {key!r}; there is: {known}")
        if method not in METHODS:
            raise InvalidArgument(f"{name}: method {method!r} of {key!r} must be one of {', '.join(METHODS)}")


def _check_method(key: str, method: str, function: Any) -> None:
    """Check what TensorFlow Serving does (``classifier.cc``, ``regressor.cc``)."""
    import tensorflow as tf

    arguments, keywords = function.structured_input_signature
    inputs = {spec.name: spec for spec in (*arguments, *keywords.values())}
    outputs = function.structured_outputs
    if method == "classify":
        allowed: dict[str, Any] = {"classes": (tf.string, (2,)), "scores": (tf.float32, (2,))}
        wanted = "`classes` (string) and `scores` (float32), both [batch, classes]"
    elif method == "regress":
        allowed = {"outputs": (tf.float32, (1, 2))}
        wanted = "`outputs` (float32), [batch] or [batch, 1]"
    else:
        return
    if list(inputs) != ["inputs"] or inputs["inputs"].dtype != tf.string:
        raise InvalidArgument(
            f"{key}: a {method} signature takes one input, `inputs` (string), the serialized tf.Examples; "
            f"this one takes {', '.join(map(str, inputs))}"
        )
    for alias, spec in outputs.items():
        dtype, ranks = allowed.get(alias, (None, ()))
        if spec.dtype != dtype or spec.shape.rank not in (None, *ranks):
            raise InvalidArgument(
                f"{key}: a {method} signature returns {wanted}; this one returns {alias}: {spec}"
            )


def _variables(functions: Iterable[Any]) -> dict[str, Any]:
    """The variables that functions use, by name; equal names are numbered."""
    named: dict[str, Any] = {}
    seen = set()
    for variable in itertools.chain.from_iterable(function.variables for function in functions):
        if id(variable) in seen:
            continue
        seen.add(id(variable))
        name = variable.name.split(":")[0]
        key = next(key for key in _numbered(name) if key not in named)
        named[key] = variable
    return named


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in itertools.count(2):
        yield f"{name}-{number}"


def _set_methods(saved_model: Path, methods: Mapping[str, str]) -> None:
    """Set method names in ``saved_model.pb``; TensorFlow writes predict only."""
    import tensorflow as tf

    updater = tf.compat.v1.saved_model.signature_def_utils.MethodNameUpdater(str(saved_model))
    for key, method in methods.items():
        updater.replace_method_name(key, METHODS[method])
    updater.save()


def _rename(run: Path, runs: Path, name: str) -> Path:
    """Move the staged run to its name, numbered when another has the same second."""
    for target in (runs / numbered for numbered in _numbered(name)):
        try:
            run.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    atomic.sync(runs)
    return target


def _mapping(settings: Any) -> dict[str, Any]:
    return dict(settings) if isinstance(settings, Mapping) else dataclasses.asdict(settings)


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _card(text: str, record: Mapping[str, Any]) -> str:
    """The model card: the script's text, then tables of metrics and settings."""

    def table(title: str, values: Mapping[str, Any]) -> str:
        rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in values.items())
        return f"## {title}\n\n| name | value |\n|---|---|\n{rows}"

    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return "\n".join(
        [
            f"# {record['name']}\n",
            text.strip() + "\n",
            table("Metrics", record["metrics"]),
            table("Settings", record["settings"]),
            f"Trained in {record['seconds']:.1f} s, exported {record['time']}, with {versions}.",
            "",
        ]
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """NumPy values as JSON: nested lists, numbers; others as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
