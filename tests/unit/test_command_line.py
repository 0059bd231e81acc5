"""The command as a whole: names, completion, TensorFlow's log, and quick help."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest
from trained_models import spikeless

from spikeless.cli import COMMANDS, cli
from spikeless.cli.options import Duration
from spikeless.errors import InvalidArgument, NotFound, nearest
from spikeless.formats import savedmodel
from spikeless.launch import free_port
from spikeless.warmup import BuildSettings, make_requests

#: Commands that read, and whose result a program would read.
ANSWERING = ("publish", "push", "pull", "map", "keep", "inspect", "promote", "rollback", "status", "prune")
CHANGING = ("publish", "promote", "rollback", "prune")


def commands() -> dict[str, click.Command]:
    context = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {sub}": command.commands[sub] for sub in command.commands}
    return found


def options(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def test_one_thing_has_one_name_and_one_form_everywhere() -> None:
    """But for `serve`, which spells as TensorFlow Serving does.

    A model of a repository is the argument NAME, after the SavedModel where there is
    one; servers, repositories, durations and sizes are options of one type each.
    """
    found = commands()
    forms: dict[str, set[tuple[object, ...]]] = {}
    for name in found.keys() - {"serve"}:
        for parameter in found[name].params:
            option = parameter.opts[0]
            assert option == option.lower(), (name, option)
            assert "_" not in option or isinstance(parameter, click.Argument), (name, option)
            assert not option.endswith(("-ms", "-seconds", "seconds", "-minutes")), (name, option)
            is_flag = isinstance(parameter, click.Option) and parameter.is_flag
            forms.setdefault(option, set()).add((repr(parameter.type.name), is_flag))
    differing = {option: form for option, form in forms.items() if len(form) > 1}
    assert not differing, "an option means something else elsewhere"
    assert not {"--target", "--model-name", "--repository", "--host-port"} & forms.keys()
    # What requests in a file say, which no server looks at.
    assert [name for name, command in found.items() if "--name" in options(command)] == ["warmup build"]
    named = {
        name: [parameter.name for parameter in command.params if isinstance(parameter, click.Argument)]
        for name, command in found.items()
        if "--models" in options(command)
    }
    assert named == {
        "publish": ["saved_model", "name"],
        "follow": ["uri", "name"],
        "push": ["version_dir", "store", "name"],
        "promote": ["name", "version"],
        "pull": ["store", "name"],
        **{key: ["name"] for key in ("rollback", "status", "prune", "bench run", "bench gate")},
        **{key: [] for key in ("keep", "exporter")},
    }
    durations = {option for option, form in forms.items() if form == {("'duration'", False)}}
    assert durations == {
        *(
            "--duration",
            "--settle",
            "--slo-latency",
            "--timeout",
            "--publish-at",
            "--publish-every",
            "--poll",
            "--spread",
            "--file-time",
        ),
        *("--soak", "--stagger", "--load-timeout", "--patience", "--max-first-request"),
        *("--report", "--max-p99"),
    }
    assert all("--json" in options(found[name]) for name in ANSWERING)
    assert all("--dry-run" in options(found[name]) for name in CHANGING)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("promot", "boston", "2"), "did you mean promote?"),
        (("exporter", "--target", "a:1"), "did you mean --server?"),
        (("bench", "run", "--model-name", "a"), "did you mean the argument NAME?"),
        (("publish", "model", "--name", "a"), "did you mean the argument NAME?"),
        (("bench", "run", "a", "--seconds", "9"), "did you mean --duration?"),
        (("status", "--target", "a:1"), "did you mean --servers?"),
        (("promote", "boston", "2", "--dryrun"), "--dry-run"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(arguments: tuple[str, ...], hint: str) -> None:
    done = spikeless(*arguments)
    assert done.returncode == 2
    assert hint in done.stderr


def test_the_nearest_name() -> None:
    assert nearest("bostn", ["boston", "ctr"]) == ": did you mean boston?"
    assert nearest("nothing", ["boston", "ctr"]) == ""


def test_a_mistyped_model_and_script_are_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "boston").mkdir()
    for command in (
        ("promote", "bostn", "1"),
        ("rollback", "bostn"),
        ("prune", "bostn", "--keep=1"),
        ("bench", "run", "bostn"),
    ):
        done = spikeless(*command, "--models", tmp_path)
        assert done.returncode == 1
        assert "did you mean boston?" in done.stderr
    assert "did you mean mnist?" in spikeless("train", "mnits").stderr


@pytest.mark.parametrize(
    "command", [("capture", "--out=records"), ("exporter", "--port=0"), ("bench", "run", "boston")]
)
@pytest.mark.parametrize("server", ["a", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:65536"])
def test_a_server_is_a_host_and_a_port(command: tuple[str, ...], server: str, tmp_path: Path) -> None:
    """It is refused before anything is created."""
    done = spikeless(*command, "--server", server, cwd=tmp_path)
    assert done.returncode == 2
    assert f"'{server}' is not [grpcs://]HOST:PORT, such as 127.0.0.1:8500" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_store_cannot_be_given(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for pushed, message in (("file", "is a file; give"), ("nosuch", "does not exist; give")):
        done = spikeless("push", tmp_path / pushed, tmp_path / "store", "boston")
        assert (done.returncode, message in done.stderr) == (1, True), done.stderr
    done = spikeless("pull", "s4://bucket", "boston", "--models", tmp_path / "models")
    assert done.returncode == 1
    assert "there is no store s4://; there is abfs" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exporter", "--port=65536"), "65536 is not in the range"),
        (("pull", "store", "--follow", "--metrics-port=65536"), "65536 is not in the range"),
        (("pull", "store", "--keep=0"), "so 1 or more"),
        (("pull", "store", "--serving-root=models"), "must be an absolute path"),
    ],
)
def test_an_option_is_checked_before_a_store_is_asked(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = spikeless(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_registry_is_made_up(tmp_path: Path) -> None:
    """MLflow makes a database in the working directory where no server is named."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = spikeless("follow", "models:/boston@champion", "--once", cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "set MLFLOW_TRACKING_URI" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_completion_imports_no_command() -> None:
    environment = {**os.environ, "_SPIKELESS_COMPLETE": "bash_complete", "PYTHONPROFILEIMPORTTIME": "1"}
    done = spikeless(env=environment | {"COMP_WORDS": "spikeless pro", "COMP_CWORD": "1"})
    assert done.stdout == "plain,promote\n"
    assert "spikeless.cli.promote" not in done.stderr
    done = spikeless(env=environment | {"COMP_WORDS": "spikeless prune --ke", "COMP_CWORD": "2"})
    assert done.stdout == "plain,--keep\n"
    assert "_SPIKELESS_COMPLETE=bash_source" in spikeless("--help").stdout


@pytest.mark.parametrize("script", ["ctr", "factorization_machine", "mnist", "tagger"])
def test_the_help_of_a_training_script_needs_no_tensorflow(script: str) -> None:
    done = spikeless("train", script, "--help", env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert f"spikeless train {script}" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "spikeless.training.settings" in imported
    assert not imported & {"tensorflow", "keras", "numpy", "sklearn"}


def test_tensorflow_logs_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train_loud.py").write_text('"""Log."""\nimport tensorflow as tf\ntf.constant(1)\n')
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    arguments = ("train", "--training", tmp_path, "loud")
    quiet, loud = spikeless(*arguments), spikeless("-v", *arguments)
    assert quiet.returncode == 0, quiet.stderr
    # TensorFlow 2.21 writes these before it reads what is asked for.
    early = re.compile(r"WARNING: All log messages before absl|I0000 \S+ +\d+ (port|cudart_stub)\.cc:")
    assert [line for line in quiet.stderr.splitlines() if not early.match(line)] == []
    assert "This TensorFlow binary" in loud.stderr


def test_a_file_is_not_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    with pytest.raises(NotFound, match="is a file, not a SavedModel"):
        savedmodel.read(tmp_path / "README.md")


@pytest.mark.parametrize("samples", ["requests.jsonl", ("requests.jsonl",)])
def test_samples_are_files_with_a_type(samples: object, saved_models: Path) -> None:
    with pytest.raises(InvalidArgument, match="SampleFile"):
        make_requests(saved_models / "signatures", BuildSettings(samples=samples))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "seconds"), [("12", 12.0), ("1.5s", 1.5), ("10m", 600.0)])
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


def test_a_duration_that_is_too_short() -> None:
    with pytest.raises(click.BadParameter, match="1s or more"):
        Duration(at_least=1).convert("10ms", None, None)


def on_a_terminal(columns: int, *arguments: str, code: int = 0) -> list[str]:
    """The lines that the command shows on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "spikeless", *arguments],
        stdout=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": str(columns)},
    ) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while part := os.read(ours, 4096):
                text += part
    os.close(ours)
    assert process.returncode == code
    return re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()


def test_a_table_fits_a_narrow_terminal(saved_models: Path) -> None:
    """Names are folded and never cut; columns without content are left out."""
    lines = on_a_terminal(60, "inspect", str(saved_models / "signatures"))
    assert lines
    assert all(len(line) <= 60 for line in lines), lines
    assert not any("…" in line for line in lines)
    assert not any("resident" in line for line in lines), "nothing is mapped"


def test_a_status_without_any_model_is_a_failure(tmp_path: Path) -> None:
    """Nothing is served then, whether a server answers or not."""
    done = spikeless("status", "--json", "--models", tmp_path, "--servers", f"127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "[]\n")


def test_a_status_that_is_too_wide_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "boston" / "7").mkdir(parents=True)
    nobody = f"127.0.0.1:{free_port()}"
    narrow, wide = (
        on_a_terminal(columns, "status", "--models", str(tmp_path), "--servers", nobody, code=1)
        for columns in (40, 160)
    )
    assert [line.split() for line in narrow[:2]] == [["boston"], ["version", "7"]]
    assert all(len(line) <= 40 for line in narrow if not line.startswith("  !")), narrow
    assert any(line.split()[:3] == ["version", "labels", "size"] for line in wide), wide
