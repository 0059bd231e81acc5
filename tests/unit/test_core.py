"""Configurations that change while the folders of models are looked at."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spikeless.engine.core import ServerCore
from spikeless.engine.flags import ServerFlags
from spikeless.formats.protos import model_server_config_pb2
from spikeless.formats.states import State
from spikeless.formats.versions import aspired_versions

TIMEOUT = 30.0


def config_of(folder: Path, *names: str) -> model_server_config_pb2.ModelServerConfig:
    config = model_server_config_pb2.ModelServerConfig()
    for name in names:
        (folder / name / "1").mkdir(parents=True, exist_ok=True)
        config.model_config_list.config.add(
            name=name, base_path=str(folder / name), model_platform="tensorflow"
        )
    return config


def test_a_model_that_is_removed_during_a_poll_stays_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poll has read the folder of a model that the new configuration has not."""
    served = ServerCore(
        lambda name, version, path: SimpleNamespace(close=lambda: None),
        ServerFlags(file_system_poll_wait_seconds=0),
    )
    ended, removed = threading.Event(), threading.Event()
    served.add_listener(
        lambda name, status: ended.set() if (name, status.state) == ("gone", State.END) else None
    )
    served.start(config_of(tmp_path, "kept", "gone"))
    reload = threading.Thread(target=served.reload_config, args=(config_of(tmp_path, "kept"),))
    want = served.manager.set_aspired

    def look_while_reloading(config: Any, complain: Any) -> Any:
        found = aspired_versions(config, complain)
        if config.name == "gone" and not reload.is_alive():
            reload.start()
            # Where the reload does not wait for this poll, its part is over by then.
            removed.wait(0.5)
        return found

    def note(name: str, versions: Any) -> None:
        want(name, versions)
        if name == "gone" and not versions:
            assert ended.wait(TIMEOUT)
            removed.set()

    monkeypatch.setattr("spikeless.engine.core.aspired_versions", look_while_reloading)
    monkeypatch.setattr(served.manager, "set_aspired", note)
    served.poll()
    reload.join(TIMEOUT)
    assert not reload.is_alive()
    found = {status.state for status in served.manager.statuses("gone")}
    served.stop()
    assert removed.is_set()
    assert found == {State.END}, "the model is loaded for ever"
