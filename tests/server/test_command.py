"""``spikeless serve``: TensorFlow Serving's flags, taken, ignored or refused."""

from __future__ import annotations

import re

import pytest

from spikeless.cli import main
from spikeless.engine.flags import FLAGS, Flag


def run(*arguments: str) -> int:
    """The exit code of the command; it never gets as far as serving anything."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--model_config_file=/no/such/file", *arguments])
    return int(ended.value.code or 0)


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 1
    assert (
        capsys.readouterr().err == "spikeless: error: cannot read /no/such/file: No such file or directory\n"
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(
        r"TensorFlow ModelServer: .*spikeless \S+\nTensorFlow Library: \d+\.\d+\.\d+\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("ignored", [flag for flag in FLAGS if flag.ignored], ids=lambda flag: flag.name)
def test_flags_that_change_nothing_are_named(ignored: Flag, capsys: pytest.CaptureFixture[str]) -> None:
    # With a value, as in TensorFlow Serving's documentation, and as a bare switch.
    for flag in (f"--{ignored.name}=true", f"--{ignored.name}"):
        assert run(flag) == 1
        assert f"--{ignored.name} is ignored: {ignored.ignored}\n" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.refused], ids=lambda flag: flag.name)
def test_flags_that_promise_secrecy_are_refused(flag: Flag, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"--{flag.name}=true") == 2
    assert flag.refused in capsys.readouterr().err
    assert run(f"--{flag.name}=false") == 1, "off is what it is"


@pytest.mark.parametrize(
    "flag",
    [
        "--rest_api_port=many",
        "--enable_model_warmup=no",
        "--enable_model_warmup=",
        "--grpc_channel_arguments=grpc.something",
    ],
)
def test_wrong_usage(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flag) == 2
    assert "Usage: spikeless serve" in capsys.readouterr().err


def test_unknown_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--grpc_max_thread=5", "positional", "--no_such=1", "-x") == 1
    assert capsys.readouterr().err.splitlines()[:4] == [
        "unknown argument: --grpc_max_thread=5 is ignored: did you mean --grpc_max_threads?",
        "unknown argument: positional is ignored",
        "unknown argument: --no_such=1 is ignored",
        "unknown argument: -x is ignored",
    ]


@pytest.mark.parametrize("word", ["true", "True", "1", "false", "FALSE", "0"])
def test_booleans(word: str) -> None:
    assert run(f"--enable_model_warmup={word}") == 1, "it got as far as reading the configuration"


def test_values_behind_a_space_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--port", "99999") == 2
    assert "99999 is not in the range" in capsys.readouterr().err


def test_fractions_of_seconds() -> None:
    for flag in ("file_system_poll_wait_seconds", "model_config_file_poll_wait_seconds"):
        assert run(f"--{flag}=0.5") == 1
