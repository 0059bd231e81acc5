"""The flags of the embedded server: each is one field of `ServerFlags`.

Everything else comes from that field: the option of ``spikeless serve`` and its help,
the setting that the engine reads, and the row of the reference table. Names and
defaults are TensorFlow Serving's, so that one command line starts either server. A flag
that means nothing here is declared with the reason, and so is one that has to be
refused.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from spikeless.errors import InvalidArgument

_T = TypeVar("_T")
_MAX_PORT = 65535
_TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Flag:
    """What is known of a flag besides its value."""

    name: str
    #: ``bool``, ``int``, ``float`` or ``str``.
    kind: type
    default: Any
    help: str = ""
    #: The range of a number, both ends included; None leaves an end open.
    minimum: int | None = None
    maximum: int | None = None
    #: Raises ValueError for a value that is no good.
    check: Callable[[Any], object] | None = None
    #: How the reference writes a default that depends on the machine.
    default_text: str = ""
    #: Whether TensorFlow Serving does not have it.
    own: bool = False
    #: Why the flag changes nothing; empty for one that does.
    ignored: str = ""
    #: Why a server must not start with it; empty for one that may be given.
    refused: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether there is a reason to list it in the help."""
        return not (self.ignored or self.refused)

    def validate(self, value: Any) -> None:
        """Raise InvalidArgument for a wrong type, a value out of range or refused."""
        if value is None and not self.has_effect:
            return
        if self.refused and value.lower() != "false":
            raise InvalidArgument(f"--{self.name}: {self.refused}")
        is_kind = isinstance(value, (int, float) if self.kind is float else self.kind)
        if not is_kind or (isinstance(value, bool) and self.kind is not bool):
            raise InvalidArgument(f"--{self.name}: {value!r} is not of type {_TYPE_NAMES[self.kind]}")
        if (self.minimum is not None and value < self.minimum) or (
            self.maximum is not None and value > self.maximum
        ):
            raise InvalidArgument(f"--{self.name}: {value} is out of range ({self._range()})")
        if self.check is not None:
            try:
                self.check(value)
            except ValueError as error:
                raise InvalidArgument(f"--{self.name}: {error}") from None

    def _range(self) -> str:
        if self.maximum is not None:
            return f"{self.minimum} to {self.maximum}"
        return "" if self.minimum is None else f"at least {self.minimum}"

    def row(self) -> str:
        """Its row in the reference."""
        if not self.has_effect:
            kind = default = ""
            text = f"Ignored: {self.ignored}." if self.ignored else f"Refused: {self.refused}."
        else:
            kind = ", ".join(filter(None, (_TYPE_NAMES[self.kind], self._range())))
            value = str(self.default).lower() if self.kind is bool else str(self.default)
            default = self.default_text or (f"`{value}`" if value else "")
            text = self.help + (" Not a flag of TensorFlow Serving." if self.own else "")
        return f"| `--{self.name}` | {kind} | {default} | {text} |"


def _flag(default: _T, help: str, **details: Any) -> _T:
    """A field for a flag that has an effect; ``details`` are fields of `Flag`."""
    return field(default=default, metadata={"help": help, **details})


def _ignored(reason: str) -> str | None:
    return field(default=None, metadata={"ignored": reason})


def _refused(reason: str) -> str | None:
    return field(default=None, metadata={"refused": reason})


def channel_arguments(text: str) -> list[tuple[str, int | str]]:
    """The pairs in ``name=value,name=value``; raises ValueError for anything else."""
    arguments: list[tuple[str, int | str]] = []
    for argument in filter(None, text.split(",")):
        name, separator, value = argument.partition("=")
        if not separator:
            raise ValueError(f"{argument!r} is not name=value")
        arguments.append((name, int(value) if value.lstrip("-").isdigit() else value))
    return arguments


_PROCESSORS = os.cpu_count() or 1
_PORT: dict[str, Any] = {"minimum": 0, "maximum": _MAX_PORT}
_THREADS: dict[str, Any] = {"minimum": 1, "default_text": "4 for each processor"}
_COUNT: dict[str, Any] = {"minimum": 0}


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """The value of every flag; raises InvalidArgument for one that makes no sense."""

    port: int = _flag(8500, "Port of the gRPC API; 0 picks a free one.", **_PORT)
    grpc_socket_path: str = _flag("", "UNIX socket that the gRPC API listens on as well.")
    ssl_config_file: str = _flag(
        "", "SSLConfig in text format: TLS on the gRPC ports, with client certificates if it says so."
    )
    rest_api_port: int = _flag(0, "Port of the REST API; 0: no REST API.", **_PORT)
    rest_api_num_threads: int = _flag(4 * _PROCESSORS, "Requests that REST answers at once.", **_THREADS)
    rest_api_timeout_in_ms: int = _flag(30_000, "Milliseconds that a REST call may run.")
    rest_api_enable_cors_support: bool = _flag(False, "Allow REST calls from the pages of other sites.")
    monitoring_config_file: str = _flag("", "MonitoringConfig in text format: metrics, below the REST port.")
    host: str = _flag("127.0.0.1", "Address to listen on.", own=True)
    model_name: str = _flag("default", "Name of the model.")
    model_base_path: str = _flag("", "Folder whose sub-folders, named by numbers, are the versions.")
    model_config_file: str = _flag("", "ModelServerConfig in text format; replaces name and base path.")
    model_config_file_poll_wait_seconds: float = _flag(
        0.0, "Seconds between two looks at model_config_file; 0: never."
    )
    file_system_poll_wait_seconds: float = _flag(
        1.0, "Seconds between two looks for new versions; 0: one look."
    )
    num_load_threads: int = _flag(0, "Threads that load versions; 0: the manager's own.", **_COUNT)
    num_unload_threads: int = _flag(0, "Threads that unload versions; 0: the manager's own.", **_COUNT)
    load_threads_yield: bool = _flag(
        False, "Load and unload threads run only while nothing else wants the processor.", own=True
    )
    max_num_load_retries: int = _flag(5, "How often a load that failed is tried again.", **_COUNT)
    load_retry_interval_micros: int = _flag(60_000_000, "Microseconds between two tries of a load.")
    allow_version_labels_for_unavailable_models: bool = _flag(False, "New labels may point at any version.")
    enable_model_warmup: bool = _flag(True, "Replay a version's warmup file before it becomes available.")
    num_request_iterations_for_warmup: int = _flag(1, "How often each warmup record is replayed.", **_COUNT)
    enable_batching: bool = _flag(False, "Run requests that wait for the same signature as one batch.")
    batching_parameters_file: str = _flag("", "BatchingParameters in text format; needs enable_batching.")
    enable_per_model_batching_parameters: bool = _flag(
        False,
        "Batch by the batching_params.pbtxt in a version's folder; versions without one are not batched.",
    )
    num_model_warmup_threads: int = _flag(
        1, "Warmup records that are replayed at once; 1: on the thread that loads.", minimum=1, own=True
    )
    saved_model_tags: str = _flag("serve", "Comma-separated tags of the meta graph to load.")
    tensorflow_session_config_file: str = _flag("", "ConfigProto in text format for every session.")
    tensorflow_session_parallelism: int = _flag(
        0, "Default of the intra-op and inter-op flags; 0: automatic.", **_COUNT
    )
    tensorflow_intra_op_parallelism: int = _flag(0, "Threads inside one operation; 0: automatic.", **_COUNT)
    tensorflow_inter_op_parallelism: int = _flag(
        0,
        "Threads for independent operations; 0: automatic; -1: the call's own, which no deadline interrupts.",
        minimum=-1,
    )
    enable_serialization_as_tensor_content: bool = _flag(False, "Answer in tensor_content.")
    enable_signature_method_name_check: bool = _flag(False, "A signature's method name must fit the call.")
    grpc_max_threads: int = _flag(4 * _PROCESSORS, "Calls in progress at once; more are refused.", **_THREADS)
    grpc_channel_arguments: str = _flag(
        "", "Comma-separated name=value arguments of the gRPC server.", check=channel_arguments
    )
    workers: int = _flag(
        1,
        "Processes that answer on the same ports and change versions together; each takes what flags allow.",
        minimum=1,
        maximum=256,
        own=True,
    )
    drain: float = _flag(
        0.0, "Seconds to go on answering after SIGTERM, while the health service says NOT_SERVING.", own=True
    )
    grace: float = _flag(
        10.0,
        "Seconds after SIGTERM in which the server ends; requests in progress have nine tenths of them.",
        own=True,
    )

    # Ignored: they change nothing here.
    enable_grpc_healthcheck_service: str | None = _ignored("the health service is always there")
    enable_profiler: str | None = _ignored("there is no profiler service")
    flush_filesystem_caches: str | None = _ignored("the page cache is the kernel's")
    mixed_precision: str | None = _ignored("models run as they were exported")
    num_initial_load_threads: str | None = _ignored(
        "the first versions are loaded by the threads that load all others"
    )
    num_tflite_interpreters_per_pool: str | None = _ignored("TensorFlow Lite models are not served")
    num_tflite_pools: str | None = _ignored("TensorFlow Lite models are not served")
    per_process_gpu_memory_fraction: str | None = _ignored("it runs on the CPU")
    platform_config_file: str | None = _ignored(
        "all models are SavedModels, restored and warmed on the loading thread"
    )
    prefer_tflite_model: str | None = _ignored("TensorFlow Lite models are not served")
    remove_unused_fields_from_bundle_metagraph: str | None = _ignored("they are always removed")
    skip_initialize_tpu: str | None = _ignored("it runs on the CPU")
    thread_pool_factory_config_file: str | None = _ignored(
        "sessions have the thread pools of their session config"
    )
    xla_cpu_compilation_enabled: str | None = _ignored("compilation is as TensorFlow decides")
    xla_gpu_compilation_enabled: str | None = _ignored("it runs on the CPU")

    # Refused: ignoring them would open what they close.
    use_alts_credentials: str | None = _refused("this engine has no ALTS: put a proxy in front of it")

    def __post_init__(self) -> None:
        for flag in FLAGS:
            flag.validate(getattr(self, flag.name))
        if self.batching_parameters_file and not self.enable_batching:
            raise InvalidArgument("--batching_parameters_file is of no use without --enable_batching")
        if self.grpc_socket_path and self.workers > 1:
            raise InvalidArgument("--grpc_socket_path cannot be shared by several --workers")

    def command_line(self) -> list[str]:
        """The arguments that give these values."""
        values = ((flag.name, getattr(self, flag.name), flag.default) for flag in FLAGS)
        return [f"--{name}={value}" for name, value, default in values if value != default]

    def ignored(self) -> Iterable[Flag]:
        """The flags that were given although they change nothing."""
        return (flag for flag in FLAGS if flag.ignored and getattr(self, flag.name) is not None)


def _declared() -> tuple[Flag, ...]:
    kinds = typing.get_type_hints(ServerFlags)
    return tuple(
        Flag(
            name=declared.name,
            kind=str if declared.default is None else kinds[declared.name],
            default=declared.default,
            **declared.metadata,
        )
        for declared in fields(ServerFlags)
    )


#: All flags, in the order of the help.
FLAGS = _declared()
#: What a server runs with when no flag is given.
DEFAULTS = ServerFlags()


def reference() -> str:
    """The table of all flags in Markdown."""
    rows = ["| Flag | Type | Default | What it does |", "|---|---|---|---|", *(flag.row() for flag in FLAGS)]
    return "\n".join(rows) + "\n"
