"""Which directories count as versions, and which of them a policy selects."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format

from spikeless.errors import NotFound
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.versions import aspired_versions, list_versions, parse_version


@pytest.mark.parametrize(
    ("name", "version"),
    [("0", 0), ("7", 7), ("00000007", 7), (str((1 << 63) - 1), (1 << 63) - 1)],
)
def test_integers_are_versions(name: str, version: int) -> None:
    assert parse_version(name) == version


@pytest.mark.parametrize(
    "name", ["", "-1", "+1", "1.0", " 1", "1e3", "v1", ".1", "٣", str(1 << 63), "9" * 40]
)
def test_anything_else_is_not(name: str) -> None:
    assert parse_version(name) is None


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("1", "3", "10", "0002", ".spikeless", "tmp-11", "latest"):
        (tmp_path / name).mkdir()
    return tmp_path


def select(base: Path, policy: str = "") -> list[int]:
    config = model_server_config_pb2.ModelConfig(name="m", base_path=str(base))
    text_format.Parse(policy, config.model_version_policy)
    return sorted(aspired_versions(config))


def test_versions_are_listed_in_numeric_order(base: Path) -> None:
    assert list(list_versions(base)) == [1, 2, 3, 10]
    assert list_versions(base)[2] == base / "0002"


@pytest.mark.parametrize(
    ("policy", "selected"),
    [
        ("", [10]),
        ("latest {}", [10]),
        ("latest { num_versions: 2 }", [3, 10]),
        ("latest { num_versions: 99 }", [1, 2, 3, 10]),
        ("all {}", [1, 2, 3, 10]),
        ("specific { versions: 1 versions: 3 versions: 4 }", [1, 3]),
    ],
)
def test_policies(base: Path, policy: str, selected: list[int]) -> None:
    assert select(base, policy) == selected


def test_an_empty_base_path_selects_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert select(tmp_path) == []
    assert "no versions of servable m found" in caplog.text


def test_a_missing_base_path_is_an_error_and_not_an_empty_selection(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="Could not find base path"):
        select(tmp_path / "gone")
