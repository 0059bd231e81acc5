"""The declarations of the server's flags, and what is made from them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from spikeless.cli.serve import command
from spikeless.engine.flags import DEFAULTS, FLAGS, ServerFlags, channel_arguments, reference
from spikeless.errors import InvalidArgument


def test_every_flag_is_an_option_and_a_row() -> None:
    rows = reference().splitlines()[2:]
    options = {option.name: option for option in command.params}
    assert len(rows) == len(FLAGS)
    for flag, row in zip(FLAGS, rows, strict=True):
        assert row.startswith(f"| `--{flag.name}` |")
        assert flag.help or flag.ignored or flag.refused
        assert options[flag.name].hidden is not flag.has_effect  # type: ignore[attr-defined]
        assert options[flag.name].default == getattr(DEFAULTS, flag.name)


def test_the_reference_tells_what_is_special() -> None:
    rows = dict(zip((flag.name for flag in FLAGS), reference().splitlines()[2:], strict=True))
    assert rows["port"].endswith(
        "| integer, 0 to 65535 | `8500` | Port of the gRPC API; 0 picks a free one. |"
    )
    assert rows["grace"].endswith("Not a flag of TensorFlow Serving. |")
    assert "| 4 for each processor |" in rows["grpc_max_threads"]
    assert "Ignored: it runs on the CPU." in rows["skip_initialize_tpu"]
    assert "Refused: this engine has no ALTS" in rows["use_alts_credentials"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("port", 65536, r"--port: 65536 is out of range \(0 to 65535\)"),
        ("num_load_threads", -1, r"-1 is out of range \(at least 0\)"),
        ("port", "8500", "'8500' is not of type integer"),
        ("port", True, "True is not of type integer"),
        ("enable_model_warmup", 1, "1 is not of type boolean"),
        ("grpc_channel_arguments", "grpc.something", "'grpc.something' is not name=value"),
        ("use_alts_credentials", "true", "--use_alts_credentials: this engine has no ALTS"),
    ],
)
def test_values_that_make_no_sense(name: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ServerFlags(**{name: value})


def test_flags_that_change_nothing_are_known() -> None:
    given = ServerFlags(skip_initialize_tpu="true", use_alts_credentials="false", grace=1)
    assert [flag.name for flag in given.ignored()] == ["skip_initialize_tpu"]


def test_channel_arguments() -> None:
    assert channel_arguments("a=1,b=-2,c=x=y") == [("a", 1), ("b", -2), ("c", "x=y")]


def test_the_declarations_are_cheap_to_import() -> None:
    program = (
        "import sys, spikeless.engine.flags\n"
        "assert not {'grpc', 'tensorflow', 'google.protobuf', 'numpy', 'click'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
