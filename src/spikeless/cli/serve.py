"""``spikeless serve``: run the embedded engine with TensorFlow Serving's flags."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import click

from spikeless import __version__, runtime
from spikeless.engine.core import CoreSettings
from spikeless.engine.loader import ModelLoader
from spikeless.engine.manager import ManagerSettings
from spikeless.engine.server import Server, ServerSettings
from spikeless.formats.protos import config_pb2, read_text_proto

_log = logging.getLogger(__name__)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_PORT = click.IntRange(0, 65535)
_COUNT = click.IntRange(min=0)
_THREADS = click.IntRange(min=1)

#: Flags of TensorFlow Serving that change nothing here and are taken all the same, so that one command line
#: starts either server -> why they change nothing.
IGNORED_FLAGS = {
    "batching_parameters_file": "requests are not batched",
    "enable_batching": "requests are not batched",
    "enable_grpc_healthcheck_service": "the health service is always there",
    "enable_per_model_batching_parameters": "requests are not batched",
    "enable_profiler": "there is no profiler service",
    "flush_filesystem_caches": "the page cache is the kernel's",
    "mixed_precision": "models run as they were exported",
    "num_initial_load_threads": "the first versions are loaded by the threads that load all others",
    "num_tflite_interpreters_per_pool": "TensorFlow Lite models are not served",
    "num_tflite_pools": "TensorFlow Lite models are not served",
    "per_process_gpu_memory_fraction": "it runs on the CPU",
    "platform_config_file": "all models are SavedModels, restored and warmed on the loading thread",
    "prefer_tflite_model": "TensorFlow Lite models are not served",
    "remove_unused_fields_from_bundle_metagraph": "they are always removed",
    "skip_initialize_tpu": "it runs on the CPU",
    "thread_pool_factory_config_file": "sessions have the thread pools of their session config",
    "xla_cpu_compilation_enabled": "compilation is as TensorFlow decides",
    "xla_gpu_compilation_enabled": "it runs on the CPU",
}
#: Flags that must not be ignored, because ignoring them would open what they close.
REFUSED_FLAGS = {
    "ssl_config_file": "this engine has no TLS: put a proxy in front of it",
    "use_alts_credentials": "this engine has no ALTS: put a proxy in front of it",
}


def _flag(name: str, kind: Any, default: Any, text: str) -> Callable[[_Function], _Function]:
    """An option spelt as TensorFlow's flags are: ``--name=value``, and for booleans ``--name`` too."""
    extra: dict[str, Any] = {"is_flag": False, "flag_value": "true"} if kind is bool else {}
    return click.option(f"--{name}", name, type=kind, default=default, show_default=True, help=text, **extra)


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"TensorFlow ModelServer: embedded, spikeless {__version__}")
        click.echo(f"TensorFlow Library: {runtime.version()}")
        context.exit()


@click.command()
@_flag("port", _PORT, 8500, "Port of the gRPC API; 0 picks a free one.")
@_flag("grpc_socket_path", str, "", "UNIX socket that the gRPC API listens on as well.")
@_flag("rest_api_port", _PORT, 0, "Port of the REST API; 0: no REST API.")
@_flag("rest_api_num_threads", _THREADS, 4 * (os.cpu_count() or 1), "Requests that REST answers at once.")
@_flag("rest_api_timeout_in_ms", int, 30_000, "Milliseconds that a REST call may run.")
@_flag("rest_api_enable_cors_support", bool, False, "Allow REST calls from the pages of other sites.")
@_flag("monitoring_config_file", str, "", "MonitoringConfig in text format: metrics, below the REST port.")
@_flag("host", str, "127.0.0.1", "Address to listen on.")
@_flag("model_name", str, "default", "Name of the model.")
@_flag("model_base_path", str, "", "Folder whose sub-folders, named by numbers, are the versions.")
@_flag("model_config_file", str, "", "ModelServerConfig in text format; replaces the two flags before.")
@_flag("model_config_file_poll_wait_seconds", float, 0, "Seconds between two looks at that file; 0: never.")
@_flag("file_system_poll_wait_seconds", float, 1, "Seconds between two looks for new versions; 0: one look.")
@_flag("num_load_threads", _COUNT, 0, "Threads that load versions; 0: the manager's own.")
@_flag("num_unload_threads", _COUNT, 0, "Threads that unload versions; 0: the manager's own.")
@_flag("load_threads_yield", bool, False, "Those threads run only while nothing else wants the processor.")
@_flag("max_num_load_retries", _COUNT, 5, "How often a load that failed is tried again.")
@_flag("load_retry_interval_micros", int, 60_000_000, "Microseconds between two tries.")
@_flag("allow_version_labels_for_unavailable_models", bool, False, "New labels may point at any version.")
@_flag("enable_model_warmup", bool, True, "Replay a version's warmup file before it becomes available.")
@_flag("num_request_iterations_for_warmup", _COUNT, 1, "How often each warmup record is replayed.")
@_flag("saved_model_tags", str, "serve", "Comma-separated tags of the meta graph to load.")
@_flag("tensorflow_session_config_file", str, "", "ConfigProto in text format for every session.")
@_flag("tensorflow_session_parallelism", _COUNT, 0, "Threads for both of the two flags after; 0: automatic.")
@_flag("tensorflow_intra_op_parallelism", _COUNT, 0, "Threads inside one operation; 0: automatic.")
@_flag(
    "tensorflow_inter_op_parallelism",
    click.IntRange(min=-1),
    0,
    "Threads for independent operations; 0: automatic; -1: the call's own, which no deadline interrupts.",
)
@_flag("enable_serialization_as_tensor_content", bool, False, "Answer numbers in tensor_content.")
@_flag("enable_signature_method_name_check", bool, False, "A signature's method name must fit the call.")
@_flag(
    "grpc_max_threads", _THREADS, 4 * (os.cpu_count() or 1), "Calls in progress at once; more are refused."
)
@_flag("grpc_channel_arguments", str, "", "Comma-separated name=value arguments of the gRPC server.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version)
@_flag("grace", float, 10.0, "Seconds that requests in progress have to end after SIGTERM.")
def command(**flags: Any) -> None:
    """Serve models with the embedded engine; flags are TensorFlow Serving's.

    The gRPC port opens when the first version of every model is loaded and warm. SIGTERM and SIGINT let the
    requests in progress end.
    """
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    server = Server(_settings(flags))
    _stop_on_signal(server, flags["grace"])
    port = server.start()
    if port is not None:
        print(f"serving gRPC on {flags['host']}:{port}", flush=True)
        if server.rest_port is not None:
            print(f"serving REST on http://{flags['host']}:{server.rest_port}", flush=True)
        server.wait()
    # Whoever signals again while the interpreter ends must not turn this end into a violent one.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop_on_signal(server: Server, grace: float) -> None:
    """Drain and stop at the first SIGTERM or SIGINT, on a thread of its own: handlers must not wait."""

    def handle(received: int, _: object) -> None:
        _log.info("%s: draining", signal.Signals(received).name)
        threading.Thread(target=server.stop, args=(grace,), name="stop").start()

    for number in _STOP_SIGNALS:
        signal.signal(number, handle)


def _settings(flags: dict[str, Any]) -> ServerSettings:
    both = flags["tensorflow_session_parallelism"]
    return ServerSettings(
        port=flags["port"],
        host=flags["host"],
        grpc_socket_path=flags["grpc_socket_path"],
        model_name=flags["model_name"],
        model_base_path=flags["model_base_path"],
        model_config_file=flags["model_config_file"],
        model_config_file_poll_wait_seconds=flags["model_config_file_poll_wait_seconds"],
        grpc_max_threads=flags["grpc_max_threads"],
        grpc_channel_arguments=_channel_arguments(flags["grpc_channel_arguments"]),
        rest_api_port=flags["rest_api_port"] or None,
        rest_api_num_threads=flags["rest_api_num_threads"],
        rest_api_timeout_in_ms=flags["rest_api_timeout_in_ms"],
        rest_api_enable_cors_support=flags["rest_api_enable_cors_support"],
        monitoring_config_file=flags["monitoring_config_file"],
        core=CoreSettings(
            manager=ManagerSettings(
                num_load_threads=flags["num_load_threads"],
                num_unload_threads=flags["num_unload_threads"],
                load_threads_yield=flags["load_threads_yield"],
                max_num_load_retries=flags["max_num_load_retries"],
                load_retry_interval=flags["load_retry_interval_micros"] / 1e6,
            ),
            file_system_poll_wait_seconds=flags["file_system_poll_wait_seconds"],
            allow_version_labels_for_unavailable_models=flags["allow_version_labels_for_unavailable_models"],
        ),
        loader=ModelLoader(
            saved_model_tags=tuple(tag for tag in flags["saved_model_tags"].split(",") if tag),
            inter_op_parallelism=flags["tensorflow_inter_op_parallelism"] or both,
            intra_op_parallelism=flags["tensorflow_intra_op_parallelism"] or both,
            session_config=_session_config(flags["tensorflow_session_config_file"]),
            enable_model_warmup=flags["enable_model_warmup"],
            num_request_iterations_for_warmup=flags["num_request_iterations_for_warmup"],
            enable_serialization_as_tensor_content=flags["enable_serialization_as_tensor_content"],
            enable_signature_method_name_check=flags["enable_signature_method_name_check"],
        ),
    )


def _channel_arguments(text: str) -> tuple[tuple[str, int | str], ...]:
    arguments: list[tuple[str, int | str]] = []
    for argument in filter(None, text.split(",")):
        name, separator, value = argument.partition("=")
        if not separator:
            raise click.UsageError(f"--grpc_channel_arguments: {argument!r} is not name=value")
        arguments.append((name, int(value) if value.lstrip("-").isdigit() else value))
    return tuple(arguments)


def _session_config(file: str) -> config_pb2.ConfigProto:
    config = config_pb2.ConfigProto()
    return read_text_proto(file, config) if file else config


def _ignore(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        print(f"--{parameter.name} is ignored: {IGNORED_FLAGS[str(parameter.name)]}", file=sys.stderr)


def _refuse(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None and value.lower() != "false":
        raise click.UsageError(f"--{parameter.name}: {REFUSED_FLAGS[str(parameter.name)]}", context)


for _names, _callback in ((IGNORED_FLAGS, _ignore), (REFUSED_FLAGS, _refuse)):
    for _name in _names:
        command.params.append(
            click.Option(
                [f"--{_name}", _name],
                is_flag=False,
                flag_value="true",
                hidden=True,
                expose_value=False,
                callback=_callback,
            )
        )
