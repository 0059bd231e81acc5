"""``spikeless warmup``: build, inspect and verify the warmup file of a SavedModel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spikeless import warmup
from spikeless.cli.options import json_option
from spikeless.cli.samples import samples_option
from spikeless.formats.kinds import KINDS
from spikeless.warmup import BuildSettings, SampleFile
from spikeless.warmup.inspection import RecordSummary

_KINDS = {kind.name.lower(): kind.name for kind in KINDS if kind.signature_method}

_Dims = dict[str | None, tuple[int, ...]]


def _parse_sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    return () if value is None else _sizes(value)


def _parse_dims(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> _Dims:
    """``SIZE`` for every input or ``INPUT=SIZE,...``."""
    dims: _Dims = {}
    for value in values:
        alias, equals, text = value.rpartition("=")
        sizes = _sizes(text)
        if not equals and len(sizes) > 1:
            raise click.BadParameter(f"{value!r} gives several sizes, so name the input: INPUT={value}")
        dims[alias if equals else None] = sizes
    return dims


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of whole numbers such as 1,8,32") from None


@click.group()
def command() -> None:
    """Build, inspect and verify warmup files.

    A server replays the requests in VERSION/assets.extra/tf_serving_warmup_requests
    before the version takes traffic, so that its first caller does not wait for what
    only the first request has to do.
    """


@command.command()
@click.argument("saved_model", type=click.Path(path_type=Path))
@samples_option(
    "Sample requests: TensorFlow Serving REST JSON (.json, .jsonl), .npz, .csv, or TFRecords of "
    "tf.Example or PredictionLog. SIGNATURE is for samples that name none themselves. Repeatable. Without "
    "samples, requests are made up from the signatures.",
)
@click.option(
    "--signature",
    "signatures",
    metavar="KEY[:KIND]",
    multiple=True,
    help="A signature to warm, and predict, classify or regress where its method name does not tell. "
    "Repeatable. Default: those that the samples are for, or all.",
)
@click.option(
    "--multi-inference",
    metavar="KEY,KEY...",
    multiple=True,
    help="Also a MultiInference request that joins these Classify and Regress signatures. Repeatable.",
)
@click.option(
    "--batch-sizes",
    metavar="SIZE,...",
    callback=_parse_sizes,
    help="Put the samples into batches of each of these sizes.",
)
@click.option(
    "--dim",
    "dims",
    metavar="SIZE|INPUT=SIZE,...",
    callback=_parse_dims,
    multiple=True,
    help="Sizes of the unknown dimensions behind the batch, for requests that are made up. Repeatable.",
)
@click.option("--name", help="Name of the model in the requests; servers do not look at it.")
@json_option
def build(
    saved_model: Path,
    samples: tuple[SampleFile, ...],
    signatures: tuple[str, ...],
    multi_inference: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    dims: _Dims,
    name: str | None,
    as_json: bool,
) -> None:
    """Write the warmup file of SAVED_MODEL, a directory with saved_model.pb.

    Every record is checked against its signature first; on any error nothing is
    written.
    """
    named = [_key_and_kind(signature) for signature in signatures]
    settings = BuildSettings(
        samples=samples,
        signatures=tuple(key for key, _ in named),
        kinds={key: kind for key, kind in named if kind is not None},
        multi_inference=tuple(tuple(keys.split(",")) for keys in multi_inference),
        batch_sizes=batch_sizes,
        dims=dims,
        model_name=name,
    )
    path = warmup.build(saved_model, settings)
    count = len(list(warmup.inspect(path)))
    if as_json:
        click.echo(json.dumps({"path": str(path), "records": count, "bytes": path.stat().st_size}))
        return
    click.echo(f"{path}: {count} {'record' if count == 1 else 'records'}, {path.stat().st_size} bytes")


def _key_and_kind(signature: str) -> tuple[str, str | None]:
    key, _, kind = signature.rpartition(":")
    return (key, _KINDS[kind.lower()]) if key and kind.lower() in _KINDS else (signature, None)


@command.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--all", "all_records", is_flag=True, help="List every record.")
@json_option
def inspect(path: Path, all_records: bool, as_json: bool) -> None:
    """Summarise the records of PATH, a warmup file or a SavedModel that has one.

    Records of the same kind, signature and inputs are one line. With --json every
    record is listed.
    """
    records = list(warmup.inspect(path))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(record) for record in records], indent=2))
        return
    groups: dict[object, list[RecordSummary]] = {}
    for record in records:
        alike = record.number if all_records else (record.kind, record.signatures, record.inputs)
        groups.setdefault(alike, []).append(record)
    table = Table("record" if all_records else "records", "kind", "signature", "inputs", "bytes")
    for group in groups.values():
        first = group[0]
        table.add_row(
            str(first.number if all_records else len(group)),
            first.kind or "(no request)",
            escape("\n".join(first.signatures)),
            escape("\n".join(map(str, first.inputs))),
            str(sum(record.bytes for record in group)),
        )
    Console().print(table)


@command.command()
@click.argument("saved_model", type=click.Path(path_type=Path))
@click.option(
    "--request-iterations",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How often each record is replayed, as --num_request_iterations_for_warmup of the server.",
)
@json_option
def verify(saved_model: Path, request_iterations: int, as_json: bool) -> None:
    """Replay the warmup file of SAVED_MODEL as a server would, and measure the gain.

    Fails with the number and the cause of the first record that would fail the load.
    """
    result = warmup.verify(saved_model, request_iterations=request_iterations)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), indent=2))
        return
    table = Table("first request", "signature", "cold ms", "after warmup ms")
    for first in result.first_requests:
        signatures = escape("\n".join(first.signatures))
        table.add_row(first.kind, signatures, f"{first.cold_ms:.1f}", f"{first.warm_ms:.1f}")
    Console().print(table)
    count = result.records
    click.echo(f"{count} {'record' if count == 1 else 'records'} replayed in {result.replay_ms:.0f} ms")
