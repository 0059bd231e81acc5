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
        "--no_such_flag=1",
        "--rest_api_port=many",
        "--enable_model_warmup=perhaps",
        "--grpc_channel_arguments=grpc.something",
    ],
)
def test_wrong_usage(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flag) == 2
    assert "Usage: spikeless serve" in capsys.readouterr().err
