"""What a SavedModel must be before it becomes a version that servers see.

In: a SavedModel's directory. Out: nothing, or an error that names the file and the
remedy.
"""

from __future__ import annotations

import re
from pathlib import Path

from spikeless.errors import DataLoss, InvalidArgument, NotFound, Unimplemented
from spikeless.formats import savedmodel
from spikeless.formats.protos import meta_graph_pb2
from spikeless.mapping.plan import VARIABLES
from spikeless.warmup.records import MAX_RECORDS, read, warmup_file
from spikeless.warmup.requests import Servable, WarmupRequest
from spikeless.warmup.validation import validate

_SHARD = re.compile(r"variables\.data-\d+-of-(\d+)")


def check_files(path: Path) -> None:
    """Refuse a SavedModel without a serving graph or a file that the graph names.

    Raises:
        NotFound: no ``saved_model.pb``, no meta graph tagged ``serve``, no variables,
            no asset.
        InvalidArgument: ``saved_model.pb`` is no SavedModel.
        DataLoss: a data shard of the variables is missing.
    """
    meta_graph = savedmodel.read(path).meta_graph()
    _check_variables(path, meta_graph)
    for asset in meta_graph.asset_file_def:
        file = path / savedmodel.ASSETS_DIRECTORY / asset.filename
        if not file.is_file():
            raise NotFound(f"{file} is missing, but the graph reads it; copy or export the model again")


def _check_variables(path: Path, meta_graph: meta_graph_pb2.MetaGraphDef) -> None:
    index = path / savedmodel.VARIABLES_DIRECTORY / "variables.index"
    if not index.is_file():
        # TensorFlow loads such a model, and then fails its first request.
        if any(node.op in VARIABLES for node in meta_graph.graph_def.node):
            raise NotFound(f"{index} is missing, but the graph has variables; copy or export the model again")
        return
    shards = [match for file in index.parent.iterdir() if (match := _SHARD.fullmatch(file.name))]
    expected = int(shards[0][1]) if shards else 1
    if len(shards) != expected:
        raise DataLoss(
            f"{index.parent} has {len(shards)} of the {expected} data files that belong to {index.name}; "
            "copy or export the model again"
        )


def check_warmup(path: Path) -> None:
    """Refuse a warmup file that would fail the load, as far as that shows without one.

    A SavedModel without a warmup file passes.

    Raises:
        DataLoss: the file is truncated, damaged or no TFRecord file.
        InvalidArgument: a record is no PredictionLog or does not fit its signature; too
            many records.
        NotFound: a record names a signature that is not there.
        Unimplemented: a record of a kind that servers do not replay.
    """
    file = warmup_file(path)
    if not file.exists():
        return
    servable = Servable.read(path)
    for record in read(file):
        source = f"{file}: record {record.number}"
        if record.number > MAX_RECORDS:
            raise InvalidArgument(
                f"{source}: a server refuses a warmup file of more than {MAX_RECORDS} records"
            )
        if record.log_field is None:
            continue  # holds no request: a server skips it
        if record.kind is None:
            raise Unimplemented(
                f"{source}: servers do not replay {record.log_field}; build the file again without it"
            )
        request = WarmupRequest(source, record.log)
        for spec in request.model_specs:
            spec.signature_name = spec.signature_name or savedmodel.DEFAULT_SIGNATURE
        validate(servable, request)
