"""A container engine for the tests, even without an engine or an image registry.

In: nothing but the machine. Out: an `Engine` with the base image, whose environment
makes ``docker compose`` and ``docker buildx`` work. An engine that already runs is used
as it is, or not at all: a second one would share its bridge and its firewall rules.
Where none runs, as root on Debian or Ubuntu, one is started from packages:

- The packages are downloaded and unpacked below the cache, nothing is installed.
  Addresses, keys and proxies are those of the machine's own apt.
- A base image is built from the same archive (debootstrap) and tagged with the name
  that a Dockerfile asks for. The label `STAND_IN` tells it from the published image.

Cache: ``$SPIKELESS_CACHE``, by default ``spikeless`` in ``$XDG_CACHE_HOME`` or
``~/.cache``. It keeps packages, image layers and build caches, 13 GB in all; a second
run starts in seconds. The daemon is stopped on leaving, and by the kernel when its
starter is killed; the next run removes the containers that it had then.

    python tests/support/engine.py docker compose up      # any command, with an engine
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.models.containers import Container

#: The label that every base image built here carries; its value says what the image
#: really is.
STAND_IN = "io.github.spikeless.stand-in"
BASE = "debian:bookworm-slim"
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
#: Variables and settings that name a file of further certificate authorities, most
#: specific first.
CA_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
KEEP_BUILD_CACHE = 8 << 30
FREE_BYTES = 16 << 30
START_SECONDS = 60.0
#: Removing an image with everything below it can take this long.
API_SECONDS = 300


class NoEngine(Exception):
    """There is no engine and none can be started here; the message says why."""


@dataclass(frozen=True)
class Engine:
    """An engine that runs."""

    #: Variables for every command that is to use it.
    environment: Mapping[str, str]
    client: docker.DockerClient
    #: Whether it was started here, from packages, with stand-in bases.
    private: bool
    #: Certificate authorities that builds need in addition, or None.
    ca_file: Path | None

    def build(self, image: str, folder: Path, *arguments: str, timeout: float = 900.0) -> None:
        """Build an image with BuildKit, which only the command can drive."""
        secret = [f"--secret=id=pip_ca,src={self.ca_file}"] if self.ca_file else []
        command = ["docker", "buildx", "build", "--load", *secret, *arguments, f"--tag={image}", str(folder)]
        _run(command, env=self.environment, timeout=timeout)

    def run(self, image: str, *command: str, timeout: float = 120.0, **options: Any) -> Finished:
        """Run a command in a container of its own, which is removed afterwards."""
        container: Container = self.client.containers.run(image, list(command), detach=True, **options)
        try:
            code = container.wait(timeout=timeout)["StatusCode"]
            return Finished(code, container.logs().decode())
        finally:
            container.remove(force=True, v=True)

    def has(self, image: str) -> bool:
        """Whether an image is there."""
        try:
            self.client.images.get(image)
        except docker.errors.ImageNotFound:
            return False
        return True

    def pull(self, image: str) -> bool:
        """Pull an image, if its registry can be reached."""
        try:
            self.client.images.pull(image)
        except docker.errors.APIError:
            return False
        return True


@dataclass(frozen=True)
class Finished:
    """What a command in a container left."""

    code: int
    #: What it printed on both streams.
    output: str


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """An engine with its base image, for a ``with`` block. Raises NoEngine."""
    ca_file = _ca_file()
    environment = dict(os.environ)
    if ca_file is not None:
        environment["PIP_CA_FILE"] = str(ca_file)
    client = _connected(environment)
    if client is not None:
        running = Engine(environment, client, private=False, ca_file=ca_file)
        _require_usable(running)
        yield running
        return
    _require_packages()
    cache = cache_folder() / "engine"
    cache.mkdir(parents=True, exist_ok=True)
    _require_space(cache)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # One daemon for one data folder: a second caller waits its turn.
        environment = _unpacked(cache, environment)
        with _daemon(cache, environment) as (environment, client):
            started = Engine(environment, client, private=True, ca_file=ca_file)
            _forget_containers(client)
            if not started.has(BASE):
                _import_base(started)
            yield started
            # What earlier builds left behind and nothing refers to any more.
            with contextlib.suppress(docker.errors.DockerException):
                client.images.prune()
                client.api.prune_builds(keep_storage=KEEP_BUILD_CACHE)


def _connected(environment: Mapping[str, str]) -> docker.DockerClient | None:
    """A client of the engine that answers, or None."""
    try:
        return docker.from_env(environment=dict(environment), timeout=API_SECONDS)
    except docker.errors.DockerException:
        return None


def _run(
    command: Sequence[str],
    check: bool = True,
    timeout: float = 120.0,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    result: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )
    if check and result.returncode:
        raise RuntimeError(
            f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout}\n{result.stderr}"
        )
    return result


def _require_usable(running: Engine) -> None:
    reason = "a Docker engine answers, but "
    for plugin in ("compose", "buildx"):
        try:
            _run(["docker", plugin, "version"], env=running.environment, timeout=30)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            raise NoEngine(f"{reason}`docker {plugin}` does not work: is the plugin installed?") from None
    if not running.has(BASE) and not running.pull(BASE):
        raise NoEngine(f"{reason}cannot pull {BASE}")


def _require_packages() -> None:
    reason = "no Docker engine answers, and none can be started here: "
    if sys.platform != "linux" or shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise NoEngine(reason + "that takes Debian or Ubuntu")
    if os.geteuid() != 0:
        raise NoEngine(reason + "that takes root")


def _require_space(cache: Path) -> None:
    """Images need room; what an earlier run left is room already."""
    free = shutil.disk_usage(cache).free
    if free < FREE_BYTES and not (cache / "data").is_dir():
        raise NoEngine(
            f"{cache} has {free >> 30} GB of space and {FREE_BYTES >> 30} are needed: set SPIKELESS_CACHE"
        )


def cache_folder() -> Path:
    """Where what tests download is kept between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPIKELESS_CACHE") or Path(home) / "spikeless")


def _ca_file() -> Path | None:
    """The file of certificate authorities that pip is told to use, if any."""
    for name in CA_VARIABLES:
        if os.environ.get(name):
            return Path(os.environ[name])
    answer = _run([sys.executable, "-m", "pip", "config", "get", "global.cert"], check=False)
    return Path(answer.stdout.strip()) if answer.returncode == 0 else None


# Packages -----------------------------------------------------------------------------


def _unpacked(cache: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Download and unpack the packages, once; returns their programs' environment."""
    release = platform.freedesktop_os_release()
    root = cache / f"packages-{release['ID']}-{release.get('VERSION_CODENAME', '')}"
    if not root.is_dir():
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _unpack(_download(partial, release), partial / "root")
        (partial / "root").rename(root)
        shutil.rmtree(partial)
    libraries = next((root / "usr/lib").glob("*-linux-gnu"), root / "usr/lib")
    return {
        **environment,
        "PATH": ":".join([str(root / "bin"), *(str(root / "usr" / name) for name in ("sbin", "bin"))])
        + f":{environment['PATH']}:/usr/sbin:/sbin",
        "LD_LIBRARY_PATH": str(libraries),
        "XTABLES_LIBDIR": f"{libraries / 'xtables'}:/{libraries.relative_to(root) / 'xtables'}",
        "DEBOOTSTRAP_DIR": str(root / "usr/share/debootstrap"),
        "DOCKER_CONFIG": str(cache / "config"),
    }


def _download(folder: Path, release: Mapping[str, str]) -> list[Path]:
    """Fetch the packages; apt reads the machine's sources and writes only here."""
    codename = release["VERSION_CODENAME"]
    sources = _sources(codename)
    names = ["docker.io", "debootstrap", "docker-buildx"]
    if release["ID"] == "ubuntu":
        names.append("docker-compose-v2")
    elif codename != "bookworm":
        names += ["docker-cli", "docker-compose"]
    foreign: list[str] = []
    if codename == "bookworm":
        # Its docker-compose is version 1 and it has no buildx: both come from the
        # release after it. They are Go programs that need nothing but the C library, so
        # their dependencies are left alone.
        names.remove("docker-buildx")
        foreign = ["docker-compose/trixie", "docker-buildx/trixie"]
        sources += [_of_suite(line, codename, "trixie") for line in sources if f" {codename} " in line]
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text("\n".join(sources) + "\n")
    options = [
        f"Dir::Etc::SourceList={folder / 'sources.list'}",
        "Dir::Etc::SourceParts=-",
        f"Dir::State::Lists={folder / 'lists'}",
        f"Dir::Cache={folder}",
        f"Dir::Cache::Archives={folder / 'archives'}",
        "APT::Sandbox::User=root",
        f"APT::Default-Release={codename}",
        "Debug::NoLocking=true",
    ]
    apt = ["apt-get", "--quiet", *(f"--option={option}" for option in options)]
    install = [*apt, "install", "--yes", "--no-install-recommends", "--download-only", "--reinstall"]
    try:
        _run([*apt, "update", "--error-on=any"], timeout=300)
        _run([*install, *names], timeout=600)
        if foreign:
            _run([*apt, "download", *foreign], timeout=300, cwd=folder / "archives")
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise NoEngine(f"the packages of an engine cannot be downloaded: {error}") from None
    return sorted((folder / "archives").glob("*.deb"))


def _of_suite(source: str, codename: str, other: str) -> str:
    """The same archive's source of another release."""
    return source.replace(f" {codename}", f" {other}")


def _sources(codename: str) -> list[str]:
    """The machine's own apt sources, one line for each suite and component."""
    form = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)"
    answer = _run(["apt-get", "indextargets", "--format", form, "Created-By: Packages"])
    lines = [line.split("\t") for line in answer.stdout.splitlines()]
    found = {
        f"deb {uri} {suite} {component}": None
        for uri, suite, component in lines
        if suite == codename or suite.startswith(codename + "-")
    }
    if not found:
        raise NoEngine(f"apt knows no source of {codename}: is this machine's own archive configured?")
    return list(found)


def _unpack(packages: Sequence[Path], root: Path) -> None:
    for package in packages:
        _run(["dpkg", "--extract", str(package), str(root)])
    # What the packages' own scripts would have linked.
    links = root / "bin"
    links.mkdir(exist_ok=True)
    (links / "iptables").symlink_to("../usr/sbin/xtables-nft-multi")
    (links / "ip6tables").symlink_to("../usr/sbin/xtables-nft-multi")


# The daemon ---------------------------------------------------------------------------


@contextlib.contextmanager
def _daemon(
    cache: Path, environment: Mapping[str, str]
) -> Iterator[tuple[dict[str, str], docker.DockerClient]]:
    """Run dockerd on its own socket; yields the commands' environment and a client."""
    _write_client_config(cache / "config", environment)
    pidfile = cache / "docker.pid"
    _end_orphan(pidfile)
    with tempfile.TemporaryDirectory(prefix="spikeless-engine-") as name:
        run = Path(name)  # Short: the path of a socket may have 107 characters at most.
        host = f"unix://{run / 'docker.sock'}"
        command = [
            # It ends with the process that started it, however that ends. Tests that
            # measure something while it builds come first.
            "setpriv",
            "--pdeathsig=TERM",
            "nice",
            "-n10",
            "dockerd",
            f"--host={host}",
            f"--data-root={cache / 'data'}",
            f"--exec-root={run / 'exec'}",
            f"--pidfile={pidfile}",
            # Small enough for whatever tunnel the machine's own network runs through.
            "--mtu=1400",
        ]
        with (cache / "dockerd.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        commands = {**environment, "DOCKER_HOST": host}
        commands.pop("DOCKER_CONTEXT", None)
        commands.pop("LD_LIBRARY_PATH", None)
        try:
            deadline = time.monotonic() + START_SECONDS
            while (client := _connected(commands)) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = "\n".join((cache / "dockerd.log").read_text(errors="replace").splitlines()[-20:])
                    raise NoEngine(f"dockerd did not start; its log ends:\n{tail}")
                time.sleep(0.2)
            if client.info()["Driver"] == "vfs":
                raise NoEngine(
                    f"the file system of {cache} cannot lay one image layer over another: "
                    "set SPIKELESS_CACHE to a folder on ext4 or xfs"
                )
            yield commands, client
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _unmount_below(run)


def _unmount_below(folder: Path) -> None:
    """Unmount what the daemon left, such as the network of containers."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in reversed(mounted):
        if path.startswith(f"{folder}/"):
            _run(["umount", "--lazy", path], check=False)


def _forget_containers(client: docker.DockerClient) -> None:
    """Remove what a killed run left: the daemon would start its services again."""
    for container in client.containers.list(all=True):
        container.remove(force=True)
    for volume in client.volumes.list():
        volume.remove(force=True)
    client.networks.prune()


def _end_orphan(pidfile: Path) -> None:
    """Stop a daemon whose starter was killed: we hold the lock, so nobody uses it."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pidfile.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if f"--pidfile={pidfile}" in command:
            os.kill(pid, signal.SIGTERM)
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.2)


def _write_client_config(folder: Path, environment: Mapping[str, str]) -> None:
    """The client's plugins, and the machine's proxies for builds and containers."""
    plugins = folder / "cli-plugins"
    plugins.mkdir(parents=True, exist_ok=True)
    root = Path(environment["DEBOOTSTRAP_DIR"]).parents[2]
    for plugin in (
        *root.glob("usr/lib*/docker/cli-plugins/*"),
        *root.glob("usr/libexec/docker/cli-plugins/*"),
    ):
        link = plugins / plugin.name
        link.unlink(missing_ok=True)
        link.symlink_to(plugin)
    keys = {"http_proxy": "httpProxy", "https_proxy": "httpsProxy", "no_proxy": "noProxy"}
    proxies = {keys[name.lower()]: environment[name] for name in PROXY_VARIABLES if environment.get(name)}
    (folder / "config.json").write_text(json.dumps({"proxies": {"default": proxies}} if proxies else {}))


# Base images --------------------------------------------------------------------------


def _import_base(started: Engine) -> None:
    """A base from the machine's own archive: Debian 12, or the Ubuntu that runs."""
    release = platform.freedesktop_os_release()
    codename = release["VERSION_CODENAME"]
    suite = "bookworm" if release["ID"] == "debian" else codename
    sources = [_of_suite(line, codename, suite) for line in _sources(codename)]
    uri, components = next(
        (line.split()[1], sorted(other.split()[3] for other in sources if other.split()[2] == suite))
        for line in sources
        if line.split()[2] == suite
    )
    with tempfile.TemporaryDirectory(prefix="spikeless-base-") as name:
        root = Path(name) / "root"
        bootstrap = [
            "debootstrap",
            "--variant=minbase",
            f"--components={','.join(components)}",
            f"--keyring=/usr/share/keyrings/{release['ID']}-archive-keyring.gpg",
            suite,
            str(root),
            uri,
        ]
        _run(bootstrap, timeout=600, env=started.environment)
        (root / "etc/apt/sources.list").write_text("\n".join(sources) + "\n")
        (root / "etc/apt/apt.conf.d/90stand-in").write_text(_apt_settings())
        shutil.rmtree(root / "var/cache/apt/archives")
        shutil.rmtree(root / "var/lib/apt/lists")
        for folder in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial"):
            (root / folder).mkdir(parents=True)
        archive = Path(name) / "root.tar"
        _run(["tar", "--create", "--file", str(archive), "--directory", str(root), "."], timeout=120)
        repository, tag = BASE.split(":")
        changes = ['CMD ["bash"]', f"LABEL {STAND_IN}=debootstrap-minbase-{suite}"]
        started.client.api.import_image_from_file(str(archive), repository, tag, changes)


def _apt_settings() -> str:
    """How the machine's own apt reaches its archive: proxies, checks of dates."""
    lines = _run(["apt-config", "dump"]).stdout.splitlines()
    kept = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-")
    return "".join(line + "\n" for line in lines if line.startswith(kept))


def main() -> None:
    """Run the command that is given, with an engine; the exit code is the command's."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        with engine() as started:
            sys.exit(subprocess.run(sys.argv[1:], env=started.environment, check=False).returncode)
    except NoEngine as error:
        sys.exit(f"engine: {error}")


if __name__ == "__main__":
    main()
