"""``spikeless serve``: TensorFlow Serving's flags, taken, ignored or refused."""

from __future__ import annotations

import re

import pytest

from spikeless.cli import main
from spikeless.cli.serve import IGNORED_FLAGS, REFUSED_FLAGS


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


@pytest.mark.parametrize("name", IGNORED_FLAGS)
def test_flags_that_change_nothing_are_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    # With a value, as TensorFlow Serving's documentation writes them, and as a bare switch.
    for flag in (f"--{name}=true", f"--{name}"):
        assert run(flag) == 1
        assert f"--{name} is ignored: {IGNORED_FLAGS[name]}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", REFUSED_FLAGS)
def test_flags_that_promise_secrecy_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"--{name}=true") == 2
    assert REFUSED_FLAGS[name] in capsys.readouterr().err
    assert run(f"--{name}=false") == 1, "off is what it is"


@pytest.mark.parametrize(
    "flag",
    [
        "--no_such_flag=1",
        "--rest_api_port=many",
        "--enable_model_warmup=perhaps",
        "--grpc_channel_arguments=grpc.something",
    ],
)
def test_wrong_usage(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flag) == 2
    assert "Usage: spikeless serve" in capsys.readouterr().err
