"""``spikeless serve`` refuses numbers that make no sense before it loads anything."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from spikeless.cli.serve import command


@pytest.mark.parametrize(
    "flag",
    [
        "--port=-1",
        "--port=65536",
        "--rest_api_port=99999",
        "--rest_api_num_threads=0",
        "--grpc_max_threads=0",
        "--num_load_threads=-1",
        "--max_num_load_retries=-1",
        "--tensorflow_session_parallelism=-5",
    ],
)
def test_numbers_out_of_range(flag: str) -> None:
    result = CliRunner().invoke(command, [flag, "--model_config_file=/no/such/file"])
    assert result.exit_code == 2
    assert flag.partition("=")[0] in result.output
    assert "is not in the range" in result.output
