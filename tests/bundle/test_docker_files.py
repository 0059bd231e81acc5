"""What can be said of the images, the stack and the manifests without running them."""

from __future__ import annotations

import json
import mmap
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any, Protocol

import pytest
import rendered_manifests
import yaml
from dashboard import dashboard_queries
from google.protobuf import descriptor, descriptor_pb2, descriptor_pool, message_factory, text_format
from places import ROOT

import spikeless
from spikeless.disk import proc
from spikeless.engine.configuration import read_model_config
from spikeless.formats.protos import config_pb2
from spikeless.repository import models_config
from spikeless.repository.models_config import new_block, with_versions

DOCKER = ROOT / "docker"
KUBERNETES = DOCKER / "kubernetes"
TOOLS = Path(sys.executable).parent
#: What the images consist of; the other stages are only copied from.
SHIPPED_STAGES = ("python", "runtime", "embedded", "tools", "serving")
MANIFESTS = sorted(path for path in KUBERNETES.glob("*.yaml") if path.name != "kustomization.yaml")


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, **options
    )
    return done


def found(pattern: str, text: str) -> str:
    """The group of a pattern that has to be there."""
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A Python tool of this environment, whatever PYTHONPATH and its script say."""
    return run(sys.executable, "-I", "-m", name, *arguments)


# Linters ------------------------------------------------------------------------------


def test_the_dockerfile_passes_hadolint() -> None:
    done = run(TOOLS / "hadolint", "--config", ROOT / ".hadolint.yaml", DOCKER / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_scripts_pass_shellcheck() -> None:
    scripts = [path for path in DOCKER.iterdir() if path.is_file() and path.read_text().startswith("#!")]
    assert len(scripts) >= 5
    assert all(os.access(path, os.X_OK) for path in scripts)
    done = run(
        TOOLS / "shellcheck",
        "--external-sources",
        *scripts,
        ROOT / "src/spikeless/serving-flags.bash",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_the_stack_fits_the_compose_schema() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    done = run_module("check_jsonschema", *schema, ROOT / "compose.yaml", DOCKER / "compose.gpu.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_service_has_the_least_privilege() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(services) >= {"server", "prepare", "bench", "locust", "worker", "prometheus", "grafana"}
    for name, service in services.items():
        if "build" in service:
            assert {"BASE", "REVISION", "SOURCE", "CREATED"} <= set(service["build"]["args"]), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"]["max-size"], name
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert not service.get("privileged"), name
        if name == "keep":
            # It becomes that owner, too, and goes on with the one right to lock memory.
            assert service["cap_add"] == ["SETUID", "SETGID", "IPC_LOCK"]
            assert service["entrypoint"][:2] == ["as-owner", "--lock"]
        elif service.get("user") == "0:0":
            # A writer becomes the owner of the folder it writes to before it does
            # anything.
            assert service["cap_add"] == ["SETUID", "SETGID"], name
            assert service["entrypoint"][0] == "as-owner", name
        else:
            assert "cap_add" not in service, name
        for port in service.get("ports", []):
            assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:"), name
    models, status = services["server"]["volumes"]
    assert models["target"] == "/models"
    assert models["read_only"] is True
    # What the server may write is a few bytes for the exporter, which cannot write
    # them.
    assert status == "status:/run/spikeless"
    assert "status:/run/spikeless:ro" in services["exporter"]["volumes"]
    # Nothing that has to go on after a restart of the server is in the process
    # namespace that ends with it.
    assert [name for name, service in services.items() if "pid" in service] == ["bench"]
    assert "restart" not in services["bench"]


def test_nothing_is_copied_into_images_that_is_not_named() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert not {"!models/", "!.git/", "!.venv/", "!runs/", "!reports/"} & set(rules)


def test_build_arguments_choose_the_base_of_the_serving_image() -> None:
    assert serving_base() == "tensorflow/serving:2.20.0"
    assert serving_base(TF_SERVING_VARIANT="-gpu") == "tensorflow/serving:2.20.0-gpu"
    assert serving_base(TF_SERVING_VERSION="2.21.0") == "tensorflow/serving:2.21.0"
    pinned = "tensorflow/serving:2.20.0@sha256:0123"
    assert serving_base(TF_SERVING_IMAGE=pinned, TF_SERVING_VARIANT="-gpu") == pinned


def serving_base(**arguments: str) -> str:
    """What the serving image is built on, from the arguments before the first FROM."""
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    values: dict[str, str] = {}
    for line in lines[: next(number for number, line in enumerate(lines) if line.startswith("FROM "))]:
        if line.startswith("ARG "):
            name, default = line.removeprefix("ARG ").split("=", 1)
            values[name] = arguments.get(name, Template(default.strip('"')).substitute(values))
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ") and line.endswith(" AS serving")]
    return Template(base).substitute(values)


def test_images_have_the_version_of_the_package() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert set(re.findall(r"^ARG VERSION=(.*)$", text, re.MULTILINE)) == {spikeless.__version__}


def test_no_layer_says_when_it_was_built() -> None:
    """What commands of the stages that images consist of write into files."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL))
    runs = re.findall(r"^RUN (.*)$", "".join(stages[name] for name in SHIPPED_STAGES), re.MULTILINE)
    users = [command for run in runs for command in run.split("&&") if " useradd " in command]
    assert len(users) == 2
    for command in users:
        # /etc/shadow has the day on which a password was changed last.
        assert command.split()[:2] == ["SOURCE_DATE_EPOCH=0", "useradd"], command
    packages = [run for run in runs if "apt-get install" in run]
    assert len(packages) == 2
    for run in packages:
        removed = found(r"rm -rf ([^&]*)", run).split()
        assert {"/var/log/apt", "/var/log/dpkg.log", "/var/cache/ldconfig/aux-cache"} <= {*removed}, run
        assert "apt-get clean" in run, run


def test_images_take_nothing_from_the_clone_directly() -> None:
    """A clone's times and permissions are its own: the stage `files` evens them out."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL))
    copies = re.findall(r"^(?:COPY|ADD) .*$", "".join(stages[name] for name in SHIPPED_STAGES), re.MULTILINE)
    assert len(copies) >= 8
    assert [line for line in copies if not line.startswith("COPY --from=")] == []


def test_the_scan_asks_about_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image's listing and of what apt says; the package itself is in no index."""
    monkeypatch.syspath_prepend(DOCKER)
    scan = runpy.run_path(str(DOCKER / "scan.py"))
    bill = runpy.run_path(str(DOCKER / "sbom.py"))["document"](
        "an/image",
        "release\tdebian\t12\n"
        "deb\tlibstdc++6\t12.2.0-14+deb12u1\tamd64\tgcc-12\t12.2.0-14+deb12u1\n"
        "deb\tdash\t0.5.12-2\tamd64\tdash\t0.5.12-2\n"
        "pypi\tTyping_Extensions\t4.16.0\n"
        "pypi\tspikeless\t0.1.0\n"
        "pypi\tgrpcio\t1.85.3\n"
        "server\ttensorflow-serving\t2.20.0\n",
    )
    assert scan["pins_of"](bill) == ["grpcio==1.85.3", "typing-extensions==4.16.0"]
    release, *packages = bill["components"]
    assert (release["type"], release["name"], release["version"]) == ("operating-system", "debian", "12")
    assert [one["purl"] for one in packages] == [
        "pkg:deb/debian/dash@0.5.12-2?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libstdc++6@12.2.0-14%2Bdeb12u1?arch=amd64&distro=debian-12"
        "&upstream=gcc-12%4012.2.0-14%2Bdeb12u1",
        "pkg:github/tensorflow/serving@2.20.0",
        "pkg:pypi/grpcio@1.85.3",
        "pkg:pypi/spikeless@0.1.0",
        "pkg:pypi/typing-extensions@4.16.0",
    ]
    simulated = (
        "Inst apt [2.6.1] (2.6.2 Debian-Security:12/oldstable-security [amd64])\n"
        "Inst libnew (1.0 Debian:12/oldstable [amd64])\n"
        "Conf apt (2.6.2 Debian-Security:12/oldstable-security [amd64])\n"
    )
    assert [line.split()[0] for line in scan["updates_of"](simulated)] == ["apt", "libnew"]
    assert scan["updates_of"]("") == []


def test_the_server_drains_before_it_is_ended() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["server"]
    period = found(r"^\$\{STOP_GRACE_PERIOD:-(\d+)s\}$", service["stop_grace_period"])
    grace = found(r"default grace (\d+)", (DOCKER / "entrypoint").read_text())
    drain = found(r"DRAIN:-(\d+)", (DOCKER / "entrypoint").read_text())
    assert int(drain) + int(grace) < int(period)


def test_every_alert_is_shown_to_fire_and_to_stop_and_explained() -> None:
    """By the tests that promtool runs, and by the page for operators."""
    rules = yaml.safe_load((DOCKER / "monitoring" / "rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    cases = yaml.safe_load((ROOT / "tests" / "bundle" / "rules_test.yml").read_text())["tests"]
    tests = [case for case in cases if "alert_rule_test" in case]
    for alert in alerts:
        fires = [case for case in tests if _fired(case, alert)]
        assert any(_stopped(case, alert) for case in fires), alert
    page = (ROOT / "docs" / "how-to" / "operate.md").read_text()
    assert set(re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE)) == alerts


def _fired(case: dict[str, Any], alert: str) -> list[float]:
    """The minutes at which a case expects an alert."""
    return [
        _minutes(one) for one in case["alert_rule_test"] if one["alertname"] == alert and one["exp_alerts"]
    ]


def _stopped(case: dict[str, Any], alert: str) -> bool:
    quiet = [one for one in case["alert_rule_test"] if one["alertname"] == alert and not one["exp_alerts"]]
    return any(_minutes(one) > max(_fired(case, alert)) for one in quiet)


def _minutes(one: dict[str, Any]) -> float:
    parts = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", one["eval_time"])
    assert parts is not None
    return int(parts[1] or 0) + int(parts[2] or 0) / 60


# The entrypoint -----------------------------------------------------------------------


class Start(Protocol):
    def __call__(
        self, *flags: str, under: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs the entrypoint with a server that only says how it was started."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    server = binaries / "tensorflow_model_server"
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\necho "LD_PRELOAD=$LD_PRELOAD"\n')
    server.chmod(0o755)
    (tmp_path / "models").mkdir()

    def start(*flags: str, under: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
        return run(
            *under,
            DOCKER / "entrypoint",
            *flags,
            env={
                "PATH": f"{binaries}:{DOCKER}:{ROOT / 'src' / 'spikeless'}:{os.environ['PATH']}",
                "TMPDIR": str(tmp_path),
                "MODEL_BASE_PATH": str(tmp_path / "models"),
                "SPIKELESS_ENGINE": "tensorflow_serving",
                "SPIKELESS_ALLOCATOR": "glibc",
                **environment,
            },
        )

    return start


def flags_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    flags = [line.removeprefix("--") for line in done.stdout.splitlines() if line.startswith("--")]
    names = [flag.partition("=")[0] for flag in flags]
    assert len(names) == len(set(names)), f"a flag is given twice: {names}"
    return dict(flag.partition("=")[::2] for flag in flags)


def test_what_is_not_said_is_filled_in(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "boston").mkdir()
    (tmp_path / "models" / 'a "name"').mkdir()
    (tmp_path / "models" / ".hidden").mkdir()
    flags = flags_of(start())
    assert flags["port"] == "8500"
    assert flags["rest_api_port"] == "8501"
    assert flags["num_load_threads"] == flags["num_unload_threads"] == "1"
    assert flags["monitoring_config_file"] == "/etc/spikeless/monitoring.config"
    config = read_model_config(flags["model_config_file"])
    served = {model.name: model.base_path for model in config.model_config_list.config}
    assert served == {name: f"{tmp_path}/models/{name}" for name in ("boston", 'a "name"')}


def test_what_is_said_wins(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "models.config").write_text("model_config_list {}")
    assert flags_of(start())["model_config_file"] == f"{tmp_path}/models/models.config"
    flags = flags_of(start(MODEL_NAME="other"))
    assert flags["model_name"] == "other"
    assert flags["model_base_path"] == f"{tmp_path}/models/other"
    flags = flags_of(start("--port=1", "--num_load_threads=4", "--model_name=m", "--model_base_path=/there"))
    assert flags["port"] == "1"
    assert flags["num_load_threads"] == "4"
    assert flags["model_base_path"] == "/there"
    assert "model_config_file" not in flags


def test_the_servers_status_is_copied_to_where_an_exporter_reads_it(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "boston").mkdir()
    server = tmp_path / "bin" / "tensorflow_model_server"
    copied = tmp_path / "status"
    copied.write_text("of a server before\n")
    # A server that maps parameters, and ends when its memory has been copied.
    data = tmp_path / "variables" / "variables.data-00000-of-00001"
    data.parent.mkdir()
    data.write_bytes(bytes(3 * mmap.PAGESIZE))
    server.write_text(
        f"#!{sys.executable}\n"
        "import mmap, pathlib, sys, time\n"
        "if '--help' in sys.argv: sys.exit()\n"
        f"data = open({str(data)!r}, 'rb')\n"
        "mapping = mmap.mmap(data.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        "mapping[:]\n"
        f"copied = pathlib.Path({str(copied)!r})\n"
        "while not copied.exists() or 'MappedParameters: 12 kB' not in copied.read_text():\n"
        "    time.sleep(0.05)\n"
    )
    done = start(STATUS_FILE=str(copied))
    assert done.returncode == 0, done.stderr
    memory = proc.memory_in(copied)
    assert memory["MappedParameters"] == 3 * mmap.PAGESIZE, "no libraries"
    assert memory["RssAnon"] > memory["MappedParameters"]
    done = start(STATUS_FILE=str(tmp_path / "nowhere" / "status"))
    assert "cannot be written: the server's memory is not exported" in done.stderr


def test_a_label_on_a_version_that_failed_starts_the_server_again(start: Start, tmp_path: Path) -> None:
    """TensorFlow Serving may listen already when a version of a model fails."""
    models = tmp_path / "models"
    for version in ("1", "2"):
        (models / "m" / version).mkdir(parents=True)
    block = with_versions(new_block("m", str(models / "m")), [1, 2], {"stable": 2})
    models_config.edit(models, {"m": block})
    server = tmp_path / "bin" / "tensorflow_model_server"
    server.write_text(
        "#!/bin/bash\n"
        "[[ $1 != --help ]] || exit\n"
        'echo "Successfully loaded servable version {name: m version: 1}" >&2\n'
        "echo 'Running gRPC ModelServer at 0.0.0.0:8500 ...' >&2\n"
        f"if [[ $* == *{models}/models.config* ]]; then\n"
        "    echo 'Servable {name: m version: 2} cannot be loaded: NOT_FOUND: its file' >&2\n"
        "    trap 'exit 143' TERM\n"
        "    for _ in {1..600}; do sleep 0.1; done\n"
        "fi\n"
        'printf "%s\\n" "$@"\n'
    )
    done = start()
    assert "the server is started again: the version that a label is on failed" in done.stderr
    assert "version 2 of m cannot be loaded: NOT_FOUND: its file" in done.stderr
    assert "of m, wanted are versions 1 2: it starts with 1" in done.stderr
    (model,) = read_model_config(flags_of(done)["model_config_file"]).model_config_list.config
    assert list(model.model_version_policy.specific.versions) == [1]
    assert dict(model.version_labels) == {"stable": 1}


def test_without_a_model_it_does_not_start(start: Start) -> None:
    done = start()
    assert done.returncode == 1
    assert "holds no model" in done.stderr
    assert done.stdout == ""


#: As TensorFlow Serving prints it.
HELP = """usage: tensorflow_model_server
Flags:
\t--port=8500                      \tint32\tTCP port to listen on for gRPC/HTTP API.
\t--enable_batching=false          \tbool\tenable batching
"""


def test_what_the_server_would_pass_over_is_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "boston").mkdir()
    server = tmp_path / "bin" / "tensorflow_model_server"
    server.write_text(f'#!/bin/sh\ncase $1 in --help) echo \'{HELP}\' ;; *) echo "$0" "$@" ;; esac\n')
    for flags, reason in (
        (["bash"], "'bash' is no flag: write --name=value"),
        (["--port", "9000"], "--port needs a value: --port=VALUE"),
        (["--prot=9000"], "this server has no flag --prot"),
    ):
        done = start(*flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
    assert "--port=9000 --enable_batching" in start("--port=9000", "--enable_batching").stdout


def test_help_and_version_need_no_models(start: Start) -> None:
    for flag in ("--help", "--version"):
        done = start(flag, SPIKELESS_ALLOCATOR="jemalloc")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[1:] == [flag, "LD_PRELOAD="]


def test_a_repository_that_cannot_be_read_is_not_an_empty_one(start: Start) -> None:
    # Root can read everything: as somebody else.
    under = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory() as models:
        Path(models, "boston").mkdir()
        Path(models).chmod(0o300)
        done = start(under=under, MODEL_BASE_PATH=models, TMPDIR=tempfile.gettempdir())
        Path(models).chmod(0o700)
    assert done.returncode == 1
    assert f"cannot read {models}: allow it on the host, chmod -R go+rX" in done.stderr


def test_an_allocator_that_does_not_load_is_an_error(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "boston").mkdir()
    assert "LD_PRELOAD=\n" in start().stdout
    done = start(SPIKELESS_ALLOCATOR="tcmalloc")
    assert done.returncode == 1
    assert "must be jemalloc or glibc, not 'tcmalloc'" in done.stderr
    # A `cat` that maps nothing of the kind stands for a system without the library.
    blind = tmp_path / "bin" / "cat"
    blind.write_text("#!/bin/sh\necho nothing\n")
    blind.chmod(0o755)
    done = start(SPIKELESS_ALLOCATOR="jemalloc")
    assert done.returncode == 1
    assert "jemalloc does not load: is libjemalloc2 installed?" in done.stderr
    assert done.stdout == ""


def test_loading_apart_is_switched_on_and_off(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "boston").mkdir()
    # Any library that every system has.
    library = next(file.path for file in proc.mapped_files() if "libc.so" in file.path)
    assert "LD_PRELOAD=\n" in start(SPIKELESS_ISOLATE="0", SPIKELESS_ISOLATE_LIBRARY=library).stdout
    on = start(SPIKELESS_ISOLATE="1", SPIKELESS_ISOLATE_LIBRARY=library)
    assert f"LD_PRELOAD={library}\n" in on.stdout
    done = start(SPIKELESS_ISOLATE="1", SPIKELESS_ISOLATE_LIBRARY="/nowhere/libisolate.so")
    assert done.returncode == 1
    assert "isolation does not load" in done.stderr
    assert "must be 0 or 1, not 'on'" in start(SPIKELESS_ISOLATE="on").stderr


def test_what_a_platform_file_switches_off_is_said_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "models" / "boston").mkdir()
    (tmp_path / "session").write_text("allow_soft_placement: true  # where there is no GPU")
    (tmp_path / "batching").write_text("max_batch_size { value: 64 }\nallowed_batch_sizes: 64  # one")
    flags = flags_of(
        start(
            "--tensorflow_intra_op_parallelism=2",
            "--tensorflow_inter_op_parallelism=3",
            f"--tensorflow_session_config_file={tmp_path / 'session'}",
            "--saved_model_tags=serve,gpu",
            "--prefer_tflite_model",
            "--num_tflite_pools=2",
            "--enable_per_model_batching_parameters=true",
            "--num_request_iterations_for_warmup=5",
            "--enable_batching",
            f"--batching_parameters_file={tmp_path / 'batching'}",
            WARMUP_THREADS="4",
            DISABLE_META_OPTIMIZER="true",
        )
    )
    config = platform_config(flags["platform_config_file"])
    assert config.session_config.intra_op_parallelism_threads == 2
    assert config.session_config.inter_op_parallelism_threads == 3
    assert config.session_config.graph_options.rewrite_options.disable_meta_optimizer
    assert config.session_run_load_threadpool_index.value == -1
    assert config.session_config.allow_soft_placement
    assert config.saved_model_tags == ["serve", "gpu"]
    assert config.prefer_tflite_model
    assert config.num_tflite_pools == 2
    assert config.enable_per_model_batching_params
    assert config.enable_model_warmup
    assert config.model_warmup_options.num_request_iterations.value == 5
    assert config.model_warmup_options.num_model_warmup_threads.value == 4
    assert config.batching_parameters.max_batch_size.value == 64
    assert config.batching_parameters.allowed_batch_sizes == [64]

    flags = flags_of(start("--enable_model_warmup=false", "--tensorflow_session_parallelism=1"))
    config = platform_config(flags["platform_config_file"])
    assert not config.enable_model_warmup
    assert not config.session_config.HasField("graph_options")
    assert config.session_config.intra_op_parallelism_threads == 1
    assert config.session_config.inter_op_parallelism_threads == 1
    assert config.saved_model_tags == ["serve"]
    assert not config.HasField("batching_parameters")

    for flag, reason in (
        ("--enable_batching", "cannot read --batching_parameters_file=/nowhere"),
        ("--enable_batching=false", "--batching_parameters_file is of no use without --enable_batching"),
        ("--port=1", "--batching_parameters_file is of no use without --enable_batching"),
    ):
        done = start(flag, "--batching_parameters_file=/nowhere")
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
    flags = flags_of(start("--mixed_precision=bfloat16"))
    assert platform_config(flags["platform_config_file"]).mixed_precision == "bfloat16"

    assert flags_of(start("--platform_config_file=/mine"))["platform_config_file"] == "/mine"


def platform_config(path: str) -> Any:
    """Parse a PlatformConfigMap strictly; no Python package has its inner messages.

    What they contain of TensorFlow, the session's configuration, is TensorFlow's own.
    """
    field = descriptor_pb2.FieldDescriptorProto
    pool = descriptor_pool.DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(
        name="platform.proto",
        package="tensorflow.serving",
        syntax="proto3",
        dependency=[config_pb2.DESCRIPTOR.name],
    )

    def include(other: descriptor.FileDescriptor) -> None:
        for dependency in other.dependencies:
            include(dependency)
        pool.AddSerializedFile(other.serialized_pb)

    include(config_pb2.DESCRIPTOR)
    numbers: dict[str, int] = {}

    def add(message: str, name: str, kind: int, type_name: str = "", repeated: bool = False) -> None:
        if message not in numbers:
            numbers[message] = 0
            file.message_type.add(name=message)
        numbers[message] += 1
        entry = next(entry for entry in file.message_type if entry.name == message)
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        new = entry.field.add(name=name, number=numbers[message], type=kind, label=label)
        if type_name:
            new.type_name = type_name if type_name[0] == "." else f".tensorflow.serving.{type_name}"

    add("Value", "value", field.TYPE_INT64)
    add("Text", "value", field.TYPE_STRING)
    for name in ("num_request_iterations", "num_model_warmup_threads"):
        add("ModelWarmupOptions", name, field.TYPE_MESSAGE, "Value")
    for name in ("max_batch_size", "batch_timeout_micros"):
        add("BatchingParameters", name, field.TYPE_MESSAGE, "Value")
    add("BatchingParameters", "thread_pool_name", field.TYPE_MESSAGE, "Text")
    add("BatchingParameters", "allowed_batch_sizes", field.TYPE_INT64, repeated=True)
    add("SessionBundleConfig", "session_config", field.TYPE_MESSAGE, ".tensorflow.ConfigProto")
    add("SessionBundleConfig", "session_run_load_threadpool_index", field.TYPE_MESSAGE, "Value")
    add("SessionBundleConfig", "saved_model_tags", field.TYPE_STRING, repeated=True)
    add("SessionBundleConfig", "enable_model_warmup", field.TYPE_BOOL)
    add("SessionBundleConfig", "model_warmup_options", field.TYPE_MESSAGE, "ModelWarmupOptions")
    add("SessionBundleConfig", "remove_unused_fields_from_bundle_metagraph", field.TYPE_BOOL)
    add("SessionBundleConfig", "mixed_precision", field.TYPE_STRING)
    add("SessionBundleConfig", "prefer_tflite_model", field.TYPE_BOOL)
    add("SessionBundleConfig", "num_tflite_pools", field.TYPE_INT32)
    add("SessionBundleConfig", "enable_per_model_batching_params", field.TYPE_BOOL)
    add("SessionBundleConfig", "batching_parameters", field.TYPE_MESSAGE, "BatchingParameters")
    add("SavedModelBundleSourceAdapterConfig", "legacy_config", field.TYPE_MESSAGE, "SessionBundleConfig")
    pool.Add(file)

    text = Path(path).read_text()
    start, end = text.index("[type.googleapis.com/"), text.rindex("} } }")
    inner = re.fullmatch(r"\[type\.googleapis\.com/([\w.]+)\] \{(.*)\}", text[start:end].strip(), re.S)
    assert inner is not None
    name, body = inner.groups()
    outer = 'platform_configs { key: "tensorflow" value { source_adapter_config {'
    assert " ".join(text[:start].split()) == outer
    adapter: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))()
    return text_format.Parse(body, adapter).legacy_config


# Monitoring ---------------------------------------------------------------------------


def test_the_dashboard_shows_only_what_is_recorded_or_exported() -> None:
    rules = yaml.safe_load((DOCKER / "monitoring" / "rules.yml").read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    for query in dashboard_queries():
        for name in re.findall(r"\bmodel:[\w:]+", query):
            assert name in recorded, query


# Kubernetes ---------------------------------------------------------------------------


def parsed(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Manifests by kind."""
    return {manifest["kind"]: manifest for manifest in map(yaml.safe_load, texts)}


def pod_of(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = manifests["Deployment"]["spec"]["template"]["spec"]
    return pod


def containers_of(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in [*pod["initContainers"], *pod["containers"]]}


def validate(*files: Path) -> None:
    """Strictly, against Kubernetes' own schemas; custom resources have none there."""
    done = run_module("kubernetes_validate", "--strict", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed for resource") == len(files), done.stdout + done.stderr


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    return parsed(path.read_text() for path in MANIFESTS)


def test_the_manifests_fit_the_kubernetes_schemas() -> None:
    own = [path for path in MANIFESTS if path.name not in ("podmonitor.yaml", "rules.yaml")]
    assert len(own) == 6
    validate(*own)


def test_the_manifests_belong_together(manifests: dict[str, dict[str, Any]]) -> None:
    deployment = manifests["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert manifests[kind]["spec"]["selector"]["matchLabels"] == labels
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    service = manifests["Service"]
    assert service["spec"]["selector"] == labels == service["metadata"]["labels"]
    containers = containers_of(pod_of(manifests))
    ports = {
        port["name"]: port["containerPort"] for one in containers.values() for port in one.get("ports", ())
    }
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == {
        name: ports[name] for name in ("grpc", "rest")
    }
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == {*ports}
    monitor = manifests["PodMonitor"]["spec"]
    endpoints = {endpoint["port"]: endpoint for endpoint in monitor["podMetricsEndpoints"]}
    assert endpoints.keys() == ports.keys() - {"grpc"}
    assert endpoints["rest"]["path"] in (DOCKER / "monitoring.config").read_text()
    # The name of the job in the rules.
    assert f'job="{labels[monitor["jobLabel"]]}"' in (DOCKER / "monitoring" / "rules.yml").read_text()
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])
    assert manifests["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > 1
    assert "replicas" not in deployment, "applying a rollout would undo what the autoscaler has decided"
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in MANIFESTS]


def test_a_rollout_takes_no_replica_away_before_the_next_is_ready(
    manifests: dict[str, dict[str, Any]],
) -> None:
    deployment, pod = manifests["Deployment"]["spec"], pod_of(manifests)
    server = containers_of(pod)["server"]
    health = json.loads(found(r"HEALTHCHECK .* CMD (\[.*\])", (DOCKER / "Dockerfile").read_text()))
    for probe in ("startupProbe", "readinessProbe"):
        assert server[probe]["exec"]["command"] == health
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert deployment["minReadySeconds"] > 0
    drain = next(entry["value"] for entry in server["env"] if entry["name"] == "DRAIN")
    # Calls in progress have time to end after it, embedded or not.
    assert int(drain) + 20 < pod["terminationGracePeriodSeconds"]
    spread = [constraint["topologyKey"] for constraint in pod["topologySpreadConstraints"]]
    assert spread == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]


def test_pods_follow_the_store_on_a_disk_of_their_own(manifests: dict[str, dict[str, Any]]) -> None:
    pod = pod_of(manifests)
    containers = containers_of(pod)
    pull, follow, exporter = pod["initContainers"]
    assert "restartPolicy" not in pull, "the server waits for it"
    assert follow["restartPolicy"] == exporter["restartPolicy"] == "Always"
    arguments = ["pull", "$(STORE)", "--models=/models", "--serving-root=/models", "--node=$(POD)"]
    assert pull["args"] == arguments
    assert follow["args"][: len(pull["args"])] == pull["args"]
    assert {"--follow", "--servers=127.0.0.1:8500"} <= {*follow["args"]}
    assert pull["env"] == follow["env"]
    # A promotion in waves goes by reports in the pod's name, with the server's metrics.
    names = {entry["name"]: entry for entry in follow["env"]}
    assert names["POD"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}
    assert "--report=1m" in follow["args"]
    rest = next(port for port in containers["server"]["ports"] if port["name"] == "rest")["containerPort"]
    monitor = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    path = next(endpoint["path"] for endpoint in monitor if endpoint["port"] == "rest")
    assert f"--metrics=http://127.0.0.1:{rest}{path}" in follow["args"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "sizeLimit" in volumes["models"]["emptyDir"]
    assert all("emptyDir" in volume for volume in volumes.values())
    mounts = {
        name: {mount["name"]: mount for mount in one["volumeMounts"]} for name, one in containers.items()
    }
    assert {name for name, of in mounts.items() if of["models"].get("readOnly")} == {"server", "exporter"}
    status = next(entry["value"] for entry in containers["server"]["env"] if entry["name"] == "STATUS_FILE")
    assert f"--status-file={status}" in exporter["args"]
    extras = found(r"'\.\[([\w,]*tagger[\w,]*)\]'", (DOCKER / "Dockerfile").read_text()).split(",")
    assert {"fleet", "s3", "gcs", "azure"} <= {*extras}, "they run the image `tools`"
    assert status.startswith(f"{mounts['server']['status']['mountPath']}/")


def test_pods_may_do_no_more_than_they_need(manifests: dict[str, dict[str, Any]]) -> None:
    pod = pod_of(manifests)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for name, container in containers_of(pod).items():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert "memory" in container["resources"]["limits"], name
    policy = manifests["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    grpc = [rule for rule in policy["ingress"] if {"port": "grpc"} in rule["ports"]]
    assert [len(rule["from"]) for rule in grpc] == [1]
    assert grpc[0]["from"][0].keys() == {"namespaceSelector", "podSelector"}


def test_the_rules_are_those_of_the_alert_file(manifests: dict[str, dict[str, Any]]) -> None:
    rules = yaml.safe_load((DOCKER / "monitoring" / "rules.yml").read_text())
    assert manifests["PrometheusRule"]["spec"] == rules


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which builds kustomizations, is not installed"
)
def test_the_kustomization_is_built_with_its_store_and_images(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes" / "kustomization.yaml"
    file.write_text(file.read_text().replace("s3://bucket/models", "gs://ours/models"))
    done = run("kubectl", "kustomize", tmp_path / "kubernetes", env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    built = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}
    assert {manifest["metadata"].get("namespace") for manifest in built.values()} == {"spikeless", None}
    containers = containers_of(pod_of(built))
    for name in ("pull", "follow"):
        assert {"name": "STORE", "value": "gs://ours/models"} in containers[name]["env"]
        assert [entry["name"] for entry in containers[name]["env"]] == ["STORE", "POD"]
        assert containers[name]["args"][:2] == ["pull", "$(STORE)"]


def test_the_manifests_are_the_chart_with_its_default_values() -> None:
    rendered = rendered_manifests.render()
    for name, text in rendered.items():
        written = (KUBERNETES / name).read_text()
        assert written == text, "run: python tests/support/rendered_manifests.py"
    assert sorted([*rendered, *rendered_manifests.OWN]) == sorted(
        path.name for path in KUBERNETES.glob("*.yaml")
    )


def test_the_chart_takes_the_values_that_it_names(tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    values = {
        "images": {"serving": f"registry.example:5000/serving@{digest}", "tools": "tools:2"},
        "store": "az://models",
        "report": "",
        "connectionAge": "90s",
        "drain": "30s",
        "flags": ["--enable_batching=true"],
        "environment": {"SPIKELESS_ISOLATE": "0", "WARMUP_THREADS": "2"},
        "replicas": {"min": 1, "max": 2},
        "monitoring": {"enabled": False},
        "disk": "1Ti",
    }
    rendered = rendered_manifests.render(values)
    assert rendered.keys().isdisjoint({"podmonitor.yaml", "rules.yaml"})
    files = []
    for name, text in rendered.items():
        files.append(tmp_path / name)
        files[-1].write_text(text)
    validate(*files)
    containers = containers_of(pod_of(parsed(rendered.values())))
    assert not [each for each in containers["follow"]["args"] if re.match("--(report|metrics)=", each)]
    often = containers_of(pod_of(parsed(rendered_manifests.render({"report": "20s"}).values())))
    assert "--report=20s" in often["follow"]["args"]
    server = containers["server"]
    assert server["image"] == values["images"]["serving"]  # type: ignore[index]
    assert server["args"] == [
        "--grpc_channel_arguments=grpc.max_connection_age_ms=90000,grpc.max_connection_age_grace_ms=60000",
        "--enable_batching=true",
    ]
    assert {"name": "DRAIN", "value": "30"} in server["env"]
    assert {"name": "SPIKELESS_ISOLATE", "value": "0"} in server["env"]
    assert {"name": "WARMUP_THREADS", "value": "2"} in server["env"]


def test_the_charts_settings_are_the_entrypoints() -> None:
    """But for those that the chart sets, and those that the image does."""
    text = (DOCKER / "entrypoint").read_text().partition("set -euo pipefail")[0]
    known = set(re.findall(r"^# ([A-Z][A-Z_]+)(?:=\w+)?  ", text, re.MULTILINE))
    known |= set(re.findall(r"^# ([A-Z][A-Z_]+)=\w+   ", text, re.MULTILINE))
    schema = json.loads((DOCKER / "helm" / "values.schema.json").read_text())
    settings = schema["properties"]["environment"]["properties"]
    assert known - {"DRAIN", "STATUS_FILE", "SPIKELESS_ENGINE", "MODEL_NAME"} == settings.keys()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"stroe": "s3://bucket/models"}, "stroe"),
        ({"store": "/models"}, "store"),
        ({"keep": 0}, "keep"),
        ({"connectionAge": "5"}, "connectionAge"),
        ({"report": "0s"}, "report"),
        ({"report": "2h"}, "report"),
        ({"flags": ["port=1"]}, "flags"),
        ({"environment": {"SPIKELESS_ISOLATE": "yes"}}, "SPIKELESS_ISOLATE"),
        ({"environment": {"PATH": "/"}}, "PATH"),
        ({"clients": {"podLabels": {"client": 1}}}, "podLabels"),
        ({"resources": {"limits": {"memory": "two"}}}, "memory"),
    ],
)
def test_the_chart_refuses_other_values(values: dict[str, Any], key: str) -> None:
    import helm_python

    with helm_python.Chart.load(str(rendered_manifests.CHART)) as chart:
        chart.validate_schema({})
        with pytest.raises(helm_python.HelmError, match=key):
            chart.validate_schema(values)


def test_the_chart_passes_helm_lint_and_its_schema_is_one() -> None:
    import helm_python

    result = helm_python.lint(str(rendered_manifests.CHART))
    assert result["errors"] == []
    done = run_module("check_jsonschema", "--check-metaschema", DOCKER / "helm" / "values.schema.json")
    assert done.returncode == 0, done.stdout
    schema = DOCKER / "helm" / "values.schema.json"
    done = run_module("check_jsonschema", "--schemafile", schema, DOCKER / "helm" / "values.yaml")
    assert done.returncode == 0, done.stdout


def test_the_runtime_for_kserve_runs_the_serving_image(tmp_path: Path) -> None:
    runtime = yaml.safe_load((DOCKER / "kserve.yaml").read_text())
    assert (runtime["apiVersion"], runtime["kind"]) == (
        "serving.kserve.io/v1alpha1",
        "ClusterServingRuntime",
    )
    spec = runtime["spec"]
    (container,) = spec["containers"]
    assert container["name"] == "kserve-container"
    assert "--model_base_path=/mnt/models" in container["args"]
    (port,) = (port["containerPort"] for port in container["ports"])
    assert f"--rest_api_port={port}" in container["args"]
    assert spec["annotations"]["prometheus.kserve.io/port"] == str(port)
    assert spec["annotations"]["prometheus.kserve.io/path"] in (DOCKER / "monitoring.config").read_text()
    assert [model["name"] for model in spec["supportedModelFormats"]] == ["tensorflow"]
    # What it has of a pod is a pod's; KServe fills in the name.
    file = tmp_path / "pod.yaml"
    pod = {"containers": spec["containers"], "volumes": spec["volumes"]}
    file.write_text(
        yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod})
    )
    validate(file)
