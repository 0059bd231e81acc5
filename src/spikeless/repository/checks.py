"""What a SavedModel must be before it becomes a version that servers see.

In: a SavedModel's directory. Out: nothing, or an error that names the file and the
remedy.
"""

from __future__ import annotations

from pathlib import Path

from spikeless.errors import InvalidArgument, NotFound, SpikelessError, Unimplemented
from spikeless.formats import savedmodel
from spikeless.formats.variables import check_variables
from spikeless.warmup.records import MAX_RECORDS, read, warmup_file
from spikeless.warmup.requests import Servable, WarmupRequest
from spikeless.warmup.validation import validate


def check_files(path: Path) -> None:
    """Refuse a SavedModel without a serving graph or a file that the graph names.

    Raises:
        NotFound: no ``saved_model.pb``, no meta graph tagged ``serve``, no variables,
            no asset.
        InvalidArgument: ``saved_model.pb`` is no SavedModel.
        DataLoss: a data shard of the variables is missing.
    """
    meta_graph = savedmodel.read(path).meta_graph()
    check_variables(path)
    for asset in meta_graph.asset_file_def:
        file = path / savedmodel.ASSETS_DIRECTORY / asset.filename
        if not file.is_file():
            raise NotFound(f"{file} is missing, but the graph reads it; copy or export the model again")


def missing_part(path: Path) -> str:
    """What a version on disk lacks, or nothing; as when its copy was cut short."""
    file = path / savedmodel.SAVED_MODEL_FILE
    try:
        if not file.is_file():
            return f"{file} is missing; copy it again, or remove it" if path.is_dir() else ""
        check_variables(path)
    except SpikelessError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}" if path.is_dir() else ""
    return ""


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
