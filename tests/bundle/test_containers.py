"""The images and the compose stack, built and run by a real engine.

One stack goes through a day: up on a fresh clone, requests, a hot reload, a measured
run, monitoring. Each test leaves it serving. `container_stack` says what is built,
`engine` when all of this is skipped. SPIKELESS_CONTAINERS=0 leaves it out.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from container_stack import OWNER, REVISION, Images, Stack, inside
from dashboard import dashboard_queries
from docker.models.containers import Container
from engine import STAND_IN, Engine, Finished
from harness import ENGINE
from places import ROOT

import spikeless
from spikeless import bench, launch
from spikeless.client import Client
from spikeless.errors import SpikelessError, Unavailable
from spikeless.formats.protos import predict_pb2
from spikeless.formats.states import State
from spikeless.formats.tensors import to_proto
from spikeless.repository import layout, publishing

pytestmark = [
    pytest.mark.xdist_group("containers"),
    pytest.mark.timeout(1500),
]

FEATURES = 30
#: The number of the capability in linux/capability.h.
IPC_LOCK = 14
#: What a read-only container may write.
TMP = {"/tmp": ""}
#: A block of commands in a document, and why it is not run.
BLOCK = re.compile(r"(<!-- not run here: [^>]+ -->\n)?```sh\n(.*?)```", re.DOTALL)


# Helpers ------------------------------------------------------------------------------


def fetch(url: str, data: object = None) -> str:
    """The body of an HTTP answer, whatever its status."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = None if data is None else json.dumps(data).encode()
    try:
        answer: bytes = opener.open(url, body, timeout=20).read()
    except urllib.error.HTTPError as error:
        answer = error.read()
    return answer.decode()


def answers(url: str) -> bool:
    try:
        return bool(fetch(url))
    except OSError:
        return False


def rest(stack: Stack, path: str, data: object = None) -> Any:
    return json.loads(fetch(f"http://127.0.0.1:{stack.ports['REST_PORT']}{path}", data))


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(f"127.0.0.1:{stack.ports['GRPC_PORT']}") as client:
        yield client


@pytest.fixture(scope="module")
def up(stack: Stack) -> Stack:
    """The stack as `docker compose up` leaves it on a fresh clone, healthy."""
    stack.compose("up", "--detach", "--wait", "--no-build", timeout=600)
    return stack


def available(client: Client, name: str) -> set[int]:
    try:
        return {status.version for status in client.statuses(name) if status.state is State.AVAILABLE}
    except SpikelessError:
        return set()


def versions_on_disk(stack: Stack) -> set[int]:
    return set(layout.versions(stack.folder / "models", "boston"))


def break_version(source: Path, version: Path) -> None:
    """A version without the weights that its graph asks for."""
    staged = version.with_name("staged")
    shutil.copytree(source, staged, ignore=shutil.ignore_patterns("variables.data*"))
    staged.rename(version)


def state_of(container: Container) -> dict[str, Any]:
    container.reload()
    state: dict[str, Any] = container.attrs["State"]
    return state


def health_of(container: Container) -> dict[str, Any]:
    health: dict[str, Any] = state_of(container)["Health"]
    return health


def is_healthy(container: Container) -> bool:
    return bool(health_of(container)["Status"] == "healthy")


# Images -------------------------------------------------------------------------------


def test_images_say_what_they_are_and_run_as_nobody_in_particular(containers: Engine, images: Images) -> None:
    for name in ("embedded", "tools", "serving"):
        image = getattr(images, name)
        config = containers.client.images.get(image).attrs["Config"]
        assert config["User"] == "10001:10001", name
        assert config["Labels"]["org.opencontainers.image.title"] == f"spikeless/{name}"
        assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert config["Labels"]["org.opencontainers.image.version"] == spikeless.__version__
        assert config["Labels"]["org.opencontainers.image.revision"] == REVISION
        assert config["Entrypoint"][0] != "/bin/sh", "exec form"
        if name in ("embedded", "serving"):
            assert config["Healthcheck"]["Test"] == ["CMD", "/usr/local/bin/health"]
        # Whatever stands in for a published image says so, in everything that is built
        # on it.
        stands_in = images.serving_stands_in if name == "serving" else containers.private
        assert (STAND_IN in config["Labels"]) == stands_in, name


def test_the_images_are_as_large_as_the_documentation_says(containers: Engine, images: Images) -> None:
    text = (ROOT / "docs" / "how-to" / "docker.md").read_text()
    said = dict(re.findall(r"^\| `spikeless/(\w+)` \|.*\| ([\d.]+) GB", text, re.MULTILINE))
    assert set(said) == {"embedded", "tools"}
    for name, gigabytes in said.items():
        size = containers.client.images.get(getattr(images, name)).attrs["Size"]
        assert size / 1e9 == pytest.approx(float(gigabytes), rel=0.1), name


def test_nothing_of_the_machine_that_built_them_is_in_the_images(containers: Engine, images: Images) -> None:
    unwanted = ("-name pip.conf", "-name .git", "-name .env", "-name 'id_rsa*'", "-path '/run/secrets/*'")
    leftovers = ("-path '/root/.cache/*'", "-path '/build*'")
    search = f"find / -xdev \\( {' -o '.join(unwanted + leftovers)} \\) -print; env"
    for image in (images.embedded, images.tools, images.serving):
        found = containers.run(image, "-c", search, entrypoint="sh", user="0:0")
        assert found.code == 0, found.output
        lines = found.output.splitlines()
        assert not [line for line in lines if line.startswith("/")], image
        variables = {line.partition("=")[0].upper() for line in lines if "=" in line}
        assert not [name for name in variables if name.startswith(("PIP_", "SSL_", "CURL_", "REQUESTS_"))], (
            image
        )
        history = containers.client.images.get(image).history()
        assert not [layer for layer in history if "BEGIN CERTIFICATE" in layer["CreatedBy"]]


def test_nothing_in_the_images_helps_an_intruder(containers: Engine, images: Images) -> None:
    """No program with the rights of another user, no pip, no test suites."""
    search = "find / -xdev -type f -perm /6000; find / -xdev -path '*/tests/*' -name 'test_*.py'; "
    search += "find / -xdev -path '*-packages/pip' -not -path '/usr/share/*'; command -v pip"
    for image in (images.embedded, images.tools, images.serving):
        found = containers.run(image, "-c", search, entrypoint="sh", user="0:0")
        assert found.output == "", image


def test_the_bill_of_materials_is_of_the_image(containers: Engine, images: Images) -> None:
    """Of each image, whether it has Python or not, by what `make sbom` runs."""
    wanted = {
        images.embedded: {"spikeless", "grpcio"},
        images.tools: {"spikeless", "keras"},
        images.serving: set(),
    }
    for image, packages in wanted.items():
        done = subprocess.run(
            [sys.executable, ROOT / "docker" / "sbom.py", image],
            env=dict(containers.environment), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        bom = json.loads(done.stdout)
        assert bom["metadata"]["component"]["name"] == image
        release, *packages_found = bom["components"]
        assert release["type"] == "operating-system"
        purls = {component["purl"] for component in packages_found}
        assert len(purls) == len(packages_found)
        distribution = f"&distro={release['name']}-{release['version']}"
        assert all(distribution in purl for purl in purls if purl.startswith("pkg:deb/"))
        names = {purl.partition("@")[0] for purl in purls}
        assert {f"pkg:pypi/{name}" for name in packages} <= names
        assert "pkg:pypi/pip" not in names
        assert any(name.endswith("/libjemalloc2") for name in names)
        assert not [purl for purl in purls if purl.endswith("@")]


def test_the_package_is_the_same_in_every_build(containers: Engine, images: Images, clone: Path) -> None:
    """Compiled modules, too, from sources that were checked out at another time."""
    script = (
        "cp -r /source /tmp/source && cd /tmp/source && "
        "{ pip-install --no-deps --prefix /tmp/package . > /tmp/log 2>&1 || { cat /tmp/log; exit 1; }; } && "
        "cd /tmp/package && find . -type f -exec sha256sum {} +"
    )
    volumes = [f"{clone}:/source:ro"]
    if containers.ca_file:
        volumes.append(f"{containers.ca_file}:/run/secrets/pip_ca:ro")
    options: dict[str, Any] = {
        "entrypoint": "sh",
        "environment": {"SOURCE_DATE_EPOCH": "315532800"},
        "volumes": volumes,
    }
    built = [containers.run(images.build, "-c", script, **options) for _ in range(2)]
    for one in built:
        assert one.code == 0, one.output
        assert "/spikeless/__pycache__/__init__.cpython-" in one.output
    first, second = (sorted(one.output.splitlines()) for one in built)
    assert first == second


def test_files_of_the_clone_lose_its_times_and_permissions(containers: Engine, images: Images) -> None:
    """The clone is one that a umask of 077 made: nobody else may read its files."""
    scripts = "/usr/local/bin/entrypoint /usr/local/bin/health /usr/local/bin/serving-flags.bash"
    commands = "/usr/local/bin/as-owner /usr/local/bin/prepare /training /warmup /benchmarks"
    for image, paths in ((images.embedded, scripts), (images.serving, scripts), (images.tools, commands)):
        found = containers.run(image, "-c", f"find {paths} -printf '%m %Ts %p\\n'", entrypoint="sh")
        assert found.code == 0, found.output
        lines = [line.split(" ", 2) for line in found.output.splitlines()]
        assert len(lines) >= 3
        assert [line for line in lines if line[0] not in ("644", "755") or int(line[1]) != 315532800] == []


def test_pip_trusts_an_authority_that_is_passed_as_a_secret(
    containers: Engine, images: Images, tmp_path: Path
) -> None:
    """Each build's pip, with an index whose certificate only the secret vouches for."""
    folder, certificate = tmp_path / "simple" / "probe", tmp_path / "certificate"
    folder.mkdir(parents=True)
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: probe\nVersion: 1\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / "probe-1-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"probe-1.dist-info/{name}", text)
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    request += [
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
        "-keyout",
        str(tmp_path / "key"),
    ]
    subprocess.run([*request, "-out", str(certificate)], check=True, capture_output=True)
    certificate.chmod(0o644)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, tmp_path / "key")
    index = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    )
    index.socket = context.wrap_socket(index.socket, server_side=True)
    thread = threading.Thread(target=index.serve_forever)
    thread.start()

    def install(*volumes: str) -> Finished:
        url = f"--index-url=https://localhost:{index.server_port}/simple"
        return containers.run(
            images.build,
            *(url, "--no-cache-dir", "--retries=0", "--target=/tmp/installed", "probe"),
            entrypoint="pip-install",
            environment={"no_proxy": "*", "NO_PROXY": "*"},
            network_mode="host",
            volumes=list(volumes),
        )

    try:
        without, trusted = install(), install(f"{certificate}:/run/secrets/pip_ca:ro")
    finally:
        index.shutdown()
        thread.join()
        index.server_close()
    assert without.code != 0
    assert "CERTIFICATE_VERIFY_FAILED" in without.output
    assert trusted.code == 0, trusted.output
    assert "Successfully installed probe-1" in trusted.output


def test_the_tagger_trains_in_the_tools(containers: Engine, images: Images) -> None:
    arguments = ("train", "tagger", "--epochs", "1", "--runs", "/tmp/runs")
    options = {"network_mode": "none", "read_only": True, "tmpfs": TMP}
    done = containers.run(images.tools, *arguments, timeout=300, **options)
    assert done.code == 0, done.output
    assert "run directory: /tmp/runs/tagger-" in done.output


# The stack ----------------------------------------------------------------------------


def test_compose_accepts_the_files(stack: Stack) -> None:
    stack.compose("--profile", "*", "config", "--quiet")
    files = ("--file", "compose.yaml", "--file", "docker/compose.gpu.yaml")
    server = json.loads(stack.compose(*files, "config", "--format", "json").stdout)["services"]["server"]
    assert server["build"]["args"]["TF_SERVING_VARIANT"] == "-gpu"
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert server["deploy"]["resources"]["limits"]["memory"], "what is not said there stays"


def test_up_on_a_fresh_clone_trains_publishes_and_serves(up: Stack, client: Client) -> None:
    assert is_healthy(up.container("server"))
    assert state_of(up.container("prepare"))["ExitCode"] == 0
    row = np.full((1, FEATURES), 0.5, np.float32)
    (probability,) = client.predict("boston", {"features": row}).values()
    assert 0 <= probability.item() <= 1
    answer = rest(up, "/v1/models/boston:predict", {"instances": row.tolist()})
    assert np.allclose(answer["predictions"], probability, rtol=1e-5)
    # What was published belongs to the owner of the clone.
    version = up.folder / "models" / "boston" / "1"
    owner = (up.folder / "models").stat()
    assert (version.stat().st_uid, version.stat().st_gid) == (owner.st_uid, owner.st_gid)
    assert (version / "assets.extra" / "tf_serving_warmup_requests").is_file()
    # A second `up` leaves all of it alone.
    up.compose("up", "--detach", "--wait", "--no-build")
    assert "holds a model already" in up.compose("logs", "prepare").stdout
    assert available(client, "boston") == {1}


def test_the_server_has_jemalloc_and_nothing_else_does(up: Stack) -> None:
    server = f"/proc/{up.inside('cat', '/tmp/spikeless-pid').strip()}"
    assert up.inside("cat", f"{server}/cmdline").split("\0")[2] == "serve"
    assert "libjemalloc.so.2" in up.inside("cat", f"{server}/maps")
    environment = up.inside("cat", f"{server}/environ").split("\0")
    assert "LD_PRELOAD=libjemalloc.so.2" in environment
    assert [entry for entry in environment if entry.startswith("MALLOC_CONF=background_thread:true")]
    assert "TF_ONEDNN_USE_SYSTEM_ALLOCATOR=1" in environment
    for other in ("self", "1"):
        assert "jemalloc" not in up.inside("cat", f"/proc/{other}/maps")


def test_the_least_privilege_holds_while_it_runs(up: Stack) -> None:
    status = dict(
        line.split(":\t", 1) for line in up.inside("cat", "/proc/1/status").splitlines() if ":\t" in line
    )
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    for path in ("/here", "/usr/bin/here", "/models/here", "/opt/spikeless/here"):
        assert "Read-only file system" in up.inside("touch", path), path
    server = up.container("server")
    host = server.attrs["HostConfig"]
    assert {binding["HostIp"] for bindings in host["PortBindings"].values() for binding in bindings} == {
        "127.0.0.1"
    }
    assert host["Memory"] == 4 << 30
    check = server.attrs["Config"]["Healthcheck"]
    assert check["Test"] == ["CMD", "/usr/local/bin/health"]
    assert check["StartPeriod"] == 30 * 10**9
    assert host["LogConfig"]["Config"] == {"max-file": "3", "max-size": "10m"}
    prepare = state_of(up.container("prepare"))
    assert prepare["ExitCode"] == 0
    # What writes gives its rights up before it does: the trained version belongs to
    # nobody but the owner.
    program = "import os; print(open('/proc/self/status').read())"
    shown = up.compose("run", "--rm", "tools", "python", "-c", program).stdout
    status = dict(line.split(":\t", 1) for line in shown.splitlines() if ":\t" in line)
    owner = (up.folder / "models").stat()
    assert status["Uid"].split() == [str(owner.st_uid)] * 4
    assert status["Groups"].split() == []
    if owner.st_uid:
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_a_version_is_swapped_under_load_and_no_request_fails(up: Stack) -> None:
    before = rest(up, "/v1/models/boston")["model_version_status"]
    (first,) = {int(status["version"]) for status in before if status["state"] == "AVAILABLE"}
    with load(up, "boston") as seen:
        up.wait_for(lambda: seen.versions[first] > 50, "requests before the swap")
        up.compose("run", "--rm", "tools", "spikeless", "publish", f"models/boston/{first}", "boston")
        up.wait_for(lambda: seen.versions[first + 1] > 50, "requests after the swap")
    assert seen.errors == []
    assert set(seen.versions) == {first, first + 1}


def test_a_broken_version_leaves_the_old_one_serving(up: Stack, client: Client) -> None:
    (serving,) = available(client, "boston")
    folder = up.folder / "models" / "boston"
    break_version(folder / str(serving), folder / "100")

    def refused() -> bool:
        return any(status.version == 100 and status.error for status in client.statuses("boston"))

    with load(up, "boston") as seen:
        up.wait_for(refused, "the broken version to be refused")
    shutil.rmtree(folder / "100")
    assert seen.errors == []
    assert set(seen.versions) == {serving}
    assert is_healthy(up.container("server"))
    assert "/models/boston/100/variables" in up.logs()


def test_the_bench_profile_writes_a_report(up: Stack, client: Client) -> None:
    environment = {"BENCH_SECONDS": "8", "BENCH_RATE": "50"}
    up.environment.update(environment)
    before = versions_on_disk(up)
    shown = up.compose("run", "--rm", "bench", timeout=300).stdout
    (page,) = (up.folder / "reports").glob("*/index.html")
    assert "<html" in page.read_text()
    assert page.stat().st_uid == (up.folder / "models").stat().st_uid
    (result,) = page.parent.glob("raw/*.npz")
    assert result.stat().st_size > 0
    run = bench.read_run(result)
    (published,) = run.facts.publishes
    assert published.result == f"/models/boston/{max(before) + 1}"
    assert set(run.requests["version"].tolist()) == {max(before), max(before) + 1}, "the swap was measured"
    assert not run.requests["code"].any(), "a request failed"
    # What was measured is said, although nobody but the server may read its memory.
    facts = run.facts
    assert (facts.server.engine, facts.server.engine_version) == ("embedded", spikeless.__version__)
    assert facts.server.allocator == "jemalloc"
    assert facts.commit == REVISION
    assert "unknown" not in (facts.server.allocator_proof, facts.machine.cpu, facts.machine.kernel)
    # Measuring leaves nothing behind but the report.
    assert f"version {max(before) + 1}, the copy" in shown
    assert versions_on_disk(up) == before
    assert not list((up.folder / "models" / "boston").glob(".measured-*"))
    assert available(client, "boston") == {max(before)}


def test_locust_shows_its_page_and_drives_load_with_its_workers(up: Stack) -> None:
    up.compose("up", "--detach", "--no-build", "locust", "worker")
    page = f"http://127.0.0.1:{up.ports['LOCUST_PORT']}"
    up.wait_for(lambda: answers(page), "Locust's page")
    up.wait_for(lambda: len(json.loads(fetch(f"{page}/stats/requests"))["workers"]) == 2, "two workers")
    form = urllib.parse.urlencode({"user_count": 2, "spawn_rate": 2, "host": "server:8500"}).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert json.loads(opener.open(f"{page}/swarm", form, timeout=20).read())["success"]

    def total() -> Any:
        stats = json.loads(fetch(f"{page}/stats/requests"))["stats"]
        return next((entry for entry in stats if entry["name"] == "Aggregated"), {"num_requests": 0})

    up.wait_for(lambda: total()["num_requests"] > 100, "requests")
    assert total()["num_failures"] == 0
    up.compose("rm", "--stop", "--force", "locust", "worker")


def test_mapped_parameters_are_served_and_kept_in_memory(up: Stack, client: Client) -> None:
    newest = max(available(client, "boston"))
    publish = ("tools", "spikeless", "publish", f"models/boston/{newest}", "boston")
    up.compose("run", "--rm", *publish, "--map", "--min-bytes", "64")
    up.wait_for(lambda: available(client, "boston") == {newest + 1}, "the mapped version")
    up.compose("up", "--detach", "--no-build", "keep")
    up.wait_for(lambda: f"locked: /models/boston/{newest + 1}/" in up.logs(), "its files to be locked")
    status = inside(up.container("keep"), "cat", "/proc/1/status")
    assert f"Uid:\t{OWNER}\t{OWNER}\t{OWNER}\t{OWNER}" in status
    assert f"CapEff:\t{1 << IPC_LOCK:016x}" in status, "the one right that it needs"
    up.compose("rm", "--stop", "--force", "keep")


# Monitoring ---------------------------------------------------------------------------


def test_prometheus_scrapes_and_its_rules_evaluate(up: Stack) -> None:
    up.compose("--profile", "monitoring", "up", "--detach", "--wait", "--no-build")
    api = f"http://127.0.0.1:{up.ports['PROMETHEUS_PORT']}/api/v1"

    def query(expression: str) -> Any:
        answer = json.loads(fetch(f"{api}/query?{urllib.parse.urlencode({'query': expression})}"))
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    up.wait_for(lambda: sum(float(series["value"][1]) for series in query("up")) == 2, "all targets")
    with load(up, "boston") as seen:
        up.wait_for(lambda: bool(query("model:request_latency_seconds:p99_1m > 0")), "a recorded p99")
    assert seen.errors == []
    up.wait_for(
        lambda: bool(query('model:versions_available{model_name="boston"} == 1')), "a version's state"
    )
    # Of a server that does not export its own, too.
    up.wait_for(
        lambda: bool(query('spikeless_memory_private_bytes{job="exporter"} > 0')), "the server's memory"
    )
    groups = json.loads(fetch(f"{api}/rules"))["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    # A version that a test before broke is new to this Prometheus, so its alert is due.
    failed = query(':tensorflow:cc:saved_model:load_attempt_count{status!="success"} > 0')
    assert firing == ({"ModelLoadAttemptsFail"} if failed else set())
    # What the dashboard asks is understood, and most of it has an answer by now.
    answered = [bool(query(text.replace("$model", ".*"))) for text in dashboard_queries()]
    assert sum(answered) >= 6


def test_monitoring_goes_on_after_the_server_was_restarted(up: Stack, images: Images) -> None:
    """Whether it was restarted, or crashed and the engine started it again."""
    api = f"http://127.0.0.1:{up.ports['PROMETHEUS_PORT']}/api/v1/query?query="
    server, exporter = up.container("server"), up.container("exporter")
    exporting_since = state_of(exporter)["StartedAt"]

    def crash() -> Finished:
        kill = f"kill -KILL {state_of(server)['Pid']}"
        return up.engine.run(images.tools, "-c", kill, entrypoint="sh", pid_mode="host", user="0:0")

    for restart in (server.restart, crash):
        before = state_of(server)["StartedAt"]
        restart()

        def healthy_again(before: str = before) -> bool:
            return state_of(server)["StartedAt"] != before and is_healthy(server)

        up.wait_for(healthy_again, "the server to be back")
        back = time.time()

        def scraped(series: str, back: float = back) -> bool:
            expression = urllib.parse.quote(f"timestamp({series}) > {back}")
            return bool(json.loads(fetch(api + expression))["data"]["result"])

        for series in (
            'up{job="model-server"} == 1',
            "spikeless_server_up == 1",
            'spikeless_memory_private_bytes{job="exporter"} > 0',
        ):
            up.wait_for(functools.partial(scraped, series), f"Prometheus to scrape {series} again")
    assert state_of(exporter)["StartedAt"] == exporting_since, "it never depended on the server"
    up.compose("rm", "--stop", "--force", "exporter", "prometheus")


def test_a_run_in_which_no_version_was_swapped_says_so(up: Stack, client: Client) -> None:
    """A server that serves only what is promoted does not load the copy."""
    (serving,) = available(client, "boston")
    on_disk = versions_on_disk(up)
    promote = ("promote", "boston", str(serving), "--servers", "server:8500")
    up.compose("run", "--rm", "tools", "spikeless", *promote)
    try:
        before = {page.parent for page in (up.folder / "reports").glob("*/index.html")}
        up.environment.update({"BENCH_SECONDS": "8", "BENCH_RATE": "50"})
        shown = up.compose("run", "--rm", "bench", timeout=300).stdout
        (report,) = {page.parent for page in (up.folder / "reports").glob("*/index.html")} - before
        assert "No version was swapped" in shown
        for page in ("index.html", "summary.md"):
            assert "No version was swapped" in (report / page).read_text(), page
        assert available(client, "boston") == {serving}
        assert versions_on_disk(up) == on_disk
    finally:
        (up.folder / "models" / "models.config").unlink()


def test_the_commands_of_the_documentation_run(up: Stack, client: Client) -> None:
    """From a clone without a model to a promoted version and down again."""
    up.compose("--profile", "*", "down")
    shutil.rmtree(up.folder / "models" / "boston")
    text = (ROOT / "docs" / "how-to" / "docker.md").read_text()
    blocks = [block for excused, block in BLOCK.findall(text) if not excused]
    assert len(blocks) == 6
    for block in blocks:
        if "down" in block:
            assert available(client, "boston") >= {2}
            assert client.version_of("boston", label="stable") == 2, "rolled back"
        commands = block.replace("localhost:8501", f"localhost:{up.ports['REST_PORT']}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=up.folder,
            env={**up.engine.environment, **up.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}\n{up.logs()}"
        if "curl" in block:
            assert '"state":"AVAILABLE"' in done.stdout.replace(" ", "")
            assert '"predictions"' in done.stdout
        if "Client" in block:
            assert "probability" in done.stdout
    assert up.compose("--profile", "*", "ps", "--all", "--quiet").stdout == ""


# One container ------------------------------------------------------------------------


def let_read(models: Path) -> None:
    """Whatever user an image runs as."""
    for path in (models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


class Runner:
    """Starts containers of servers on a repository, and removes them at the end."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._started: list[Container] = []

    def __call__(
        self, image: str, models: Path, *flags: str, volumes: tuple[str, ...] = (), **options: Any
    ) -> Container:
        let_read(models)
        for parent in models.parents[:3]:
            parent.chmod(0o755)
        ports: Any = {f"{port}/tcp": ("127.0.0.1", None) for port in (8500, 8501)}
        container: Container = self._engine.client.containers.run(
            image,
            list(flags),
            detach=True,
            cap_drop=["ALL"],
            healthcheck={"interval": 10**9, "start_period": 10**9, "retries": 2},
            ports=ports,
            read_only=True,
            security_opt=["no-new-privileges"],
            tmpfs=TMP,
            volumes=[f"{models}:/models:ro", *volumes],
            **options,
        )
        self._started.append(container)
        return container

    def close(self) -> None:
        for container in self._started:
            container.remove(force=True, v=True)


@pytest.fixture
def run(containers: Engine) -> Iterator[Runner]:
    with closing(Runner(containers)) as runner:
        yield runner


def logs_of(container: Container) -> str:
    logs = container.logs()
    assert isinstance(logs, bytes)
    return logs.decode()


def port_of(container: Container, port: int) -> str:
    """``127.0.0.1:port`` on this machine."""
    container.reload()
    (binding,) = container.attrs["NetworkSettings"]["Ports"][f"{port}/tcp"]
    return f"{binding['HostIp']}:{binding['HostPort']}"


def wait_for(container: Container, condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        state = state_of(container)
        assert state["Running"], f"it ended while waiting for {what}:\n{logs_of(container)}"
        assert time.monotonic() < deadline, f"waited for {what}:\n{state}\n{logs_of(container)}"
        time.sleep(0.1)


def wait_healthy(container: Container) -> None:
    wait_for(container, lambda: is_healthy(container), "health")


def test_a_model_that_cannot_be_loaded_makes_no_other_unhealthy(
    images: Images, run: Runner, tmp_path: Path, saved_models: Path
) -> None:
    models = tmp_path / "models"
    publishing.publish(saved_models / "times_one", models, "fine")
    (models / "broken").mkdir()
    break_version(models / "fine" / "1", models / "broken" / "1")
    container = run(images.embedded, models)
    cause = "/models/broken/1/variables"
    wait_for(container, lambda: cause in logs_of(container), "the cause in the log")
    wait_healthy(container)
    assert "available: fine; cannot be served: broken" in inside(container, "/usr/local/bin/health")
    # With nothing else, the container ends.
    container = run(images.embedded, models, "--model_name=broken", "--model_base_path=/models/broken")
    assert container.wait(timeout=120)["StatusCode"] == 1
    assert cause in logs_of(container)


def test_health_is_of_what_is_configured_now(
    images: Images, run: Runner, tmp_path: Path, saved_models: Path
) -> None:
    models = tmp_path / "models"

    def configure(*names: str) -> None:
        entries = (
            f'config {{ name: "{name}" base_path: "/models/{name}" model_platform: "tensorflow" }}'
            for name in names
        )
        staged = models / "staged"
        staged.write_text(f"model_config_list {{ {' '.join(entries)} }}")
        let_read(models)
        staged.rename(models / "models.config")

    publishing.publish(saved_models / "times_one", models, "first")
    configure("first")
    # Threads that give way change their scheduling, which takes no privilege.
    flags = ("--model_config_file_poll_wait_seconds=0.2", "--load_threads_yield")
    container = run(images.embedded, models, *flags)
    wait_healthy(container)
    # One that cannot be loaded comes to it, and is mended.
    (models / "second").mkdir()
    break_version(models / "first" / "1", models / "second" / "1")
    configure("first", "second")
    left_out = "available: first; cannot be served: second"
    wait_for(container, lambda: left_out in inside(container, "/usr/local/bin/health"), "it to be left out")
    publishing.publish(saved_models / "times_one", models, "second")
    let_read(models)
    both = "available: first second"
    wait_for(container, lambda: both in inside(container, "/usr/local/bin/health"), "both to be available")
    wait_healthy(container)


def test_sigterm_lets_requests_in_progress_end(
    images: Images, run: Runner, tmp_path: Path, saved_models: Path
) -> None:
    models = tmp_path / "models"
    publishing.publish(saved_models / "times_one", models, "m")
    container = run(images.embedded, models, "--grace=200")
    wait_healthy(container)
    metrics = f"http://{port_of(container, 8501)}/monitoring/prometheus/metrics"
    with Client(port_of(container, 8500), timeout=240) as client, ThreadPoolExecutor() as pool:
        slow = pool.submit(client.predict, "m", {"steps": np.asarray(10_000, np.int32)}, "spin")

        def in_progress() -> bool:
            lines = [
                line
                for line in fetch(metrics).splitlines()
                if line.startswith("spikeless_calls_in_progress{")
            ]
            return sum(float(line.split()[-1]) for line in lines) > 0

        wait_for(container, in_progress, "the request to be in progress")
        stopped: Future[None] = pool.submit(container.stop, timeout=240)
        assert not slow.done()
        assert slow.result(240)["y"].shape == ()
        stopped.result(240)
    assert state_of(container)["ExitCode"] == 0, logs_of(container)


def test_the_serving_image_starts_a_server_as_the_base_would_not(
    containers: Engine, images: Images, run: Runner, tmp_path: Path, saved_models: Path
) -> None:
    """On a stand-in for its base: entrypoint, user, health and allocator."""
    models = tmp_path / "models"
    publishing.publish(saved_models / "times_one", models, "m")
    container = run(images.serving, models, "--tensorflow_intra_op_parallelism=1")
    wait_healthy(container)

    status = inside(container, "cat", "/proc/1/status")
    assert "Uid:\t10001\t10001\t10001\t10001" in status
    pid = inside(container, "cat", "/tmp/spikeless-pid").strip()
    assert "libjemalloc.so.2" in inside(container, "cat", f"/proc/{pid}/maps")
    assert "--num_load_threads=1" in inside(container, "cat", f"/proc/{pid}/cmdline").split("\0")
    assert "available: m" in inside(container, "/usr/local/bin/health")
    config = inside(container, "cat", "/tmp/spikeless-platform.config")
    assert "intra_op_parallelism_threads: 1" in config
    assert "session_run_load_threadpool_index { value: -1 }" in config
    with Client(port_of(container, 8500)) as client:
        assert client.predict("m", {"x": np.asarray([2.0], np.float32)})["y"].tolist() == [2.0]

    # The other allocator, the official image's way to name a model, and an init process
    # before the server.
    environment = {"SPIKELESS_ALLOCATOR": "glibc", "MODEL_NAME": "m"}
    container = run(images.serving, models, "--rest_api_port=8501", environment=environment, init=True)
    wait_healthy(container)
    maps = inside(container, "sh", "-c", "cat /proc/[0-9]*/maps")
    assert "/usr/bin/" in maps
    assert "jemalloc" not in maps

    # jemalloc that is there and does not load.
    found = containers.run(images.serving, "-c", "ls /usr/lib/*/libjemalloc.so.2", entrypoint="sh")
    library = found.output.strip()
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    empty.chmod(0o644)
    container = run(images.serving, models, volumes=(f"{empty}:{library}:ro",))
    assert container.wait()["StatusCode"] == 1
    assert "jemalloc does not load" in logs_of(container)


@pytest.mark.skipif(not Path(ENGINE).is_file(), reason="SPIKELESS_SERVER names no TensorFlow Serving")
def test_tensorflow_serving_loads_versions_apart_in_the_serving_image(
    images: Images, run: Runner, tmp_path: Path, saved_models: Path
) -> None:
    """A real server in the image, as it starts when nothing is said."""
    models = tmp_path / "models"
    publishing.publish(saved_models / "times_one", models, "m")
    server = Path(ENGINE).resolve()
    # With the libraries that it has beside it, where it looks for them.
    place = f"{server.parents[1]}:{server.parents[1]}:ro"
    path = f"{server.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    container = run(images.serving, models, volumes=(place,), environment={"PATH": path})
    wait_healthy(container)
    pid = inside(container, "cat", "/tmp/spikeless-pid").strip()
    maps = inside(container, "cat", f"/proc/{pid}/maps")
    for library in ("libspikeless-isolate.so", "libjemalloc.so.2"):
        assert library in maps, logs_of(container)
    assert "spikeless" not in inside(container, "cat", f"/proc/{pid}/cmdline").split("\0")[0]
    with Client(port_of(container, 8500)) as client:
        assert client.predict("m", {"x": np.asarray([2.0], np.float32)})["y"].tolist() == [2.0]
        publishing.publish(saved_models / "times_two", models, "m")
        let_read(models)
        wait_for(container, lambda: client.version_of("m") == 2, "the next version")
        assert client.predict("m", {"x": np.asarray([2.0], np.float32)})["y"].tolist() == [4.0]


def test_a_container_is_launched_like_any_server(
    containers: Engine, images: Images, tmp_path: Path, saved_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publishing.publish(saved_models / "times_one", tmp_path / "models", "m")
    let_read(tmp_path)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    if "DOCKER_HOST" in containers.environment:
        monkeypatch.setenv("DOCKER_HOST", containers.environment["DOCKER_HOST"])
    monkeypatch.setenv(launch.IMAGE_VARIABLE, images.embedded)
    settings = launch.LaunchSettings(
        "m", tmp_path / "models" / "m", rest=True, engine=launch.DOCKER, allocator="jemalloc"
    )
    with launch.start(settings) as server, Client(server.target) as client:
        assert server.engine_version == images.embedded
        assert server.allocator().name == "jemalloc"
        assert client.predict("m", {"x": np.asarray([2.0], np.float32)})["y"].tolist() == [2.0]
        assert "AVAILABLE" in fetch(f"{server.rest_url}/v1/models/m")
        assert server.exit_code is None
    assert server.exit_code == 0
    assert "entrypoint: allocator jemalloc" in server.log_path.read_text()
    failing = replace(settings, flags=("--no_such_flag",))
    with pytest.raises(Unavailable, match=r"exited with code 1[\s\S]*no flag --no_such_flag"):
        launch.start(failing)
    listed = containers.client.containers.list(all=True, filters={"ancestor": images.embedded})
    assert not [container for container in listed if "com.docker.compose.project" not in container.labels]


# Load ---------------------------------------------------------------------------------


class Seen:
    """What a load saw: served versions and errors."""

    def __init__(self) -> None:
        self.versions: Counter[int] = Counter()
        self.errors: list[str] = []


@contextmanager
def load(stack: Stack, name: str, users: int = 4) -> Iterator[Seen]:
    """Several users, each with one request at a time, for a ``with`` block."""
    seen, ended = Seen(), threading.Event()

    def user() -> None:
        with Client(f"127.0.0.1:{stack.ports['GRPC_PORT']}") as client:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = name
            request.inputs["features"].CopyFrom(to_proto(np.full((1, FEATURES), 0.5, np.float32)))
            while not ended.is_set():
                try:
                    response = client.call(client.prediction.Predict, request)
                    seen.versions[response.model_spec.version.value] += 1
                except SpikelessError as error:
                    seen.errors.append(f"{error.code.name}: {error}")

    threads = [threading.Thread(target=user) for _ in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()
