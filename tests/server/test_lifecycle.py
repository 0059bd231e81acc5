"""Versions: states, reload under load, policies, labels, failed loads, warmup."""

from __future__ import annotations

import ctypes
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from harness import (
    IS_EMBEDDED,
    Config,
    Running,
    ServerFactory,
    model_config,
    put_version,
    refused,
    run_server,
    states,
)

from spikeless.client import Client, model_spec
from spikeless.errors import Code, SpikelessError
from spikeless.formats import tfrecord
from spikeless.formats.protos import (
    get_model_status_pb2,
    model_server_config_pb2,
    predict_pb2,
    prediction_log_pb2,
)
from spikeless.formats.states import State
from spikeless.formats.tensors import to_proto

T = TypeVar("T")
X = {"x": np.array([1.0, 2.0], np.float32)}
#: The default polling interval of both engines; zero would look only once.
POLL = "--file_system_poll_wait_seconds=1"
THREADS = ("--num_load_threads=1", "--num_unload_threads=1")


def answer(client: Client, **choice: Any) -> list[float]:
    values: list[float] = client.predict("times", X, **choice)["y"].tolist()
    return values


# --- hot reload -----------------------------------------------------------------------


def test_a_swap_under_load_fails_no_request(saved_models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    models = tmp_path / "times"
    put_version(saved_models / "times_one", models, 1)
    # TensorFlow Serving has few threads; where they wait for a processor, it refuses.
    flags = (POLL, *THREADS, "--grpc_max_threads=64")
    with serve(*flags, model_name="times", model_base_path=models) as running:
        assert states(running.client, "times") == {1: State.AVAILABLE}
        stop = threading.Event()
        failures: list[Exception] = []
        seen: list[set[Any]] = [set(), set(), set(), set()]

        def load(number: int) -> None:
            request = predict_pb2.PredictRequest(model_spec=model_spec("times"))
            request.inputs["x"].CopyFrom(to_proto(X["x"]))
            with Client(running.server.target, timeout=60.0) as client:
                while not stop.is_set():
                    try:
                        response = client.call(client.prediction.Predict, request)
                    except SpikelessError as error:
                        failures.append(error)
                        return
                    seen[number].add(
                        (response.model_spec.version.value, tuple(response.outputs["y"].float_val))
                    )

        threads = [threading.Thread(target=load, args=(number,)) for number in range(len(seen))]
        for thread in threads:
            thread.start()
        try:
            for version in (1, 2, 3):
                if version > 1:
                    put_version(saved_models / "times_two", models, version)
                running.wait("times", {version: State.AVAILABLE})
                # Every client goes on to the new version without being told.
                running.server.wait_for(
                    lambda version=version: (
                        bool(failures)  # type: ignore[misc]
                        or all(any(number == version for number, _ in answers) for answers in seen)
                    ),
                    f"version {version} to answer all clients",
                )
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures
        expected = {(1, (1.0, 2.0)), (2, (2.0, 4.0)), (3, (2.0, 4.0))}
        assert all(answers == expected for answers in seen)
        with refused(Code.NOT_FOUND, r"^Servable not found for request: Specific\(times, 1\)$"):
            answer(running.client, version=1)


# --- version policies and GetModelStatus ----------------------------------------------


@pytest.fixture(scope="module")
def times(saved_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 1, 2 (twice as much), 3 and 7, beside names that are no versions."""
    models = tmp_path_factory.mktemp("policies") / "times"
    for version in (1, 3):
        put_version(saved_models / "times_one", models, version)
    put_version(saved_models / "times_two", models, 2)
    put_version(saved_models / "times_one", models, 7).rename(models / "0000007")
    for name in ("staging-9", "9.tmp", "v9", "nine"):
        shutil.copytree(saved_models / "times_one", models / name)
    return models


@pytest.fixture(scope="module")
def reloaded(times: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    """One server whose configuration the tests below replace, each as a whole."""

    with run_server(
        tmp_path_factory.mktemp("reloaded") / "server.log", POLL, model_name="times", model_base_path=times
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, {7}),
        ({"latest": {"num_versions": 2}}, {3, 7}),
        ({"latest": {"num_versions": 100}}, {1, 2, 3, 7}),
        ({"specific": {"versions": [2]}}, {2}),
        ({"specific": {"versions": [1, 3]}}, {1, 3}),
        ({"all": {}}, {1, 2, 3, 7}),
        ({"latest": {}}, {7}),
    ],
    ids=str,
)
def test_version_policies(
    reloaded: Running, times: Path, policy: dict[str, object], expected: set[int]
) -> None:
    config = model_config(("times", times), model_version_policy=policy)
    if "all" in policy:
        config.model_config_list.config[0].model_version_policy.all.SetInParent()
    reloaded.client.reload_config(config)
    reloaded.wait("times", dict.fromkeys(expected, State.AVAILABLE))
    assert answer(reloaded.client) == ([2, 4] if max(expected) == 2 else [1, 2])
    for version in {1, 2, 3, 7} - expected:
        with refused(Code.NOT_FOUND, rf"^Servable not found for request: Specific\(times, {version}\)$"):
            answer(reloaded.client, version=version)


def test_the_state_of_one_version(reloaded: Running, times: Path) -> None:
    reloaded.client.reload_config(model_config(("times", times)))
    reloaded.wait("times", {7: State.AVAILABLE})
    (status,) = reloaded.client.statuses("times", version=7)
    assert (status.version, status.state, status.error) == (7, State.AVAILABLE, None)
    with refused(Code.NOT_FOUND, "^Could not find version 99 of model times$"):
        reloaded.client.statuses("times", version=99)
    with refused(Code.NOT_FOUND, "^Could not find any versions of model nobody$"):
        reloaded.client.statuses("nobody")
    client = reloaded.client
    with refused(Code.INVALID_ARGUMENT, "^Missing ModelSpec$"):
        client.call(client.models.GetModelStatus, get_model_status_pb2.GetModelStatusRequest())


# --- labels and HandleReloadConfigRequest ---------------------------------------------


def test_labels(reloaded: Running, times: Path) -> None:
    client = reloaded.client

    def reload(versions: list[int], **labels: int) -> None:
        client.reload_config(
            model_config(
                ("times", times),
                model_version_policy={"specific": {"versions": versions}},
                version_labels=labels,
            )
        )

    def refusal(version: int) -> str:
        return (
            rf"^Request to assign label to version {version} of model times, "
            "which is not currently available for inference$"
        )

    reload([1])
    reloaded.wait("times", {1: State.AVAILABLE})
    reload([1], stable=1)
    assert answer(client, label="stable") == [1, 2]
    with refused(Code.FAILED_PRECONDITION, refusal(2)):
        reload([1, 2], stable=2)
    assert answer(client, label="stable") == [1, 2], "a refused configuration changes nothing"
    reload([1, 2], stable=1)
    reloaded.wait("times", {1: State.AVAILABLE, 2: State.AVAILABLE})
    reload([1, 2], stable=1, canary=2)
    assert answer(client, label="canary") == [2, 4]
    assert answer(client) == [2, 4], "requests without a label go to the highest version"
    by_label, all_versions = (
        client.call(client.models.GetModelStatus, get_model_status_pb2.GetModelStatusRequest(model_spec=spec))
        for spec in (model_spec("times", label="canary"), model_spec("times"))
    )
    assert by_label == all_versions, "labels say nothing here"
    (status,) = client.statuses("times", version=2)
    assert status.version == 2
    reload([1, 2], stable=2)
    assert answer(client, label="stable") == [2, 4]
    with refused(Code.INVALID_ARGUMENT, "^Unrecognized servable version label: canary$"):
        answer(client, label="canary")
    with refused(Code.FAILED_PRECONDITION, refusal(99)):
        reload([1, 2], beta=99)


def test_labels_of_versions_that_are_not_available(shared: Running) -> None:
    """With ``--allow_version_labels_for_unavailable_models``."""
    assert answer(shared.client, label="stable") == [1, 2]
    assert answer(shared.client, label="canary") == [2, 4]


def test_models_come_and_go(reloaded: Running, times: Path, saved_models: Path, tmp_path: Path) -> None:
    client = reloaded.client
    put_version(saved_models / "signatures", tmp_path / "other", 1)
    client.reload_config(model_config(("times", times), ("other", tmp_path / "other")))
    # A new model is available when the call returns.
    assert client.predict("other", {"x": np.ones([1, 4], np.float32)})["scores"].shape == (1, 2)
    client.reload_config(model_config(("times", times)))
    reloaded.wait("other", {1: State.END})
    with refused(Code.NOT_FOUND, r"^Servable not found for request: Latest\(other\)$"):
        client.predict("other", X)
    # A name that comes back is loaded again.
    client.reload_config(model_config(("times", times), ("other", tmp_path / "other")))
    assert states(client, "other") == {1: State.AVAILABLE}


def test_configurations_that_are_refused(reloaded: Running, times: Path) -> None:
    client = reloaded.client
    client.reload_config(model_config(("times", times)))
    reloaded.wait("times", {7: State.AVAILABLE})
    before = answer(client)
    with refused(
        Code.INVALID_ARGUMENT, "^ServerModelConfig type not supported by HandleReloadConfigRequest."
    ):
        client.reload_config(Config())
    with refused(Code.INVALID_ARGUMENT, "times"):
        client.reload_config(model_config(("times", times), ("times", times)))
    with refused(Code.INVALID_ARGUMENT, "^Expected model times to have an absolute path or URI; got "):
        client.reload_config(model_config(("times", Path("models/times"))))
    platforms: list[tuple[dict[str, Any], str]] = [
        ({"name": "new", "model_platform": "caffe"}, "^Model new requests unsupported platform caffe$"),
        ({"model_type": 1}, "^Illegal setting both .*model_type .*, model name is times$"),
        ({"model_platform": "", "model_type": 2}, "^ModelServerConfig::model_type choice 2 not supported.$"),
        ({"model_platform": ""}, "^Illegal setting neither .*model_type .*, model name is times$"),
    ]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"logging_config": {}}, "^No request-logger-creator provided"),
        # TensorFlow Serving compares later configurations with one that it refused.
        *(platforms if IS_EMBEDDED else []),
        ({"model_platform": "caffe"}, "^Illegal to change a model's platform. For model times platform was "),
    ]
    for changes, message in cases:
        changed = model_config(("times", times))
        for name, value in changes.items():
            if isinstance(value, dict):
                getattr(changed.model_config_list.config[0], name).SetInParent()
            else:
                setattr(changed.model_config_list.config[0], name, value)
        with refused(Code.INVALID_ARGUMENT, message):
            client.reload_config(changed)
    assert answer(client) == before


def test_the_deprecated_type_is_a_platform(times: Path, tmp_path: Path, serve: ServerFactory) -> None:
    config = model_config(("times", times))
    config.model_config_list.config[0].model_platform = ""
    config.model_config_list.config[0].model_type = model_server_config_pb2.TENSORFLOW
    file = tmp_path / "models.config"
    file.write_text(str(config))
    with serve(f"--model_config_file={file}", wait_for=["times"]) as running:
        assert states(running.client, "times") == {7: State.AVAILABLE}


def test_models_without_a_name(embedded: None, reloaded: Running, times: Path) -> None:
    with refused(Code.INVALID_ARGUMENT, "has no name"):
        reloaded.client.reload_config(model_config(("", times)))


def test_folders_that_are_no_versions(
    embedded: None, reloaded: Running, saved_models: Path, tmp_path: Path
) -> None:
    models = tmp_path / "odd"
    put_version(saved_models / "times_one", models, 3)
    for name in ("-4", "+5", "7 ", " 8", "0x9", "1e1", str(2**63)):
        (models / name).symlink_to(models / "3")
    reloaded.client.reload_config(model_config(("odd", models)))
    assert set(states(reloaded.client, "odd")) == {3}


def test_the_configuration_file_is_watched(times: Path, tmp_path: Path, serve: ServerFactory) -> None:
    file = tmp_path / "models.config"

    def write(text: str) -> None:
        (tmp_path / "next").write_text(text)
        (tmp_path / "next").replace(file)

    policy = {"specific": {"versions": [1]}}
    write(str(model_config(("times", times), model_version_policy=policy)))
    flags = (f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=1")
    with serve(POLL, *flags, wait_for=["times"]) as running:
        assert answer(running.client) == [1, 2]
        write("this is { no configuration")
        running.server.wait_for(
            lambda: (
                "Error parsing text-format tensorflow.serving.ModelServerConfig" in running.server.log_tail()
            ),
            "the broken file to be noticed",
        )
        assert answer(running.client) == [1, 2]
        policy = {"specific": {"versions": [2]}}
        write(str(model_config(("times", times), model_version_policy=policy)))
        running.wait("times", {2: State.AVAILABLE})
        assert answer(running.client) == [2, 4]


# --- loads that fail ------------------------------------------------------------------


def damage_truncated(version: Path) -> None:
    file = version / "saved_model.pb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_garbage(version: Path) -> None:
    (version / "saved_model.pb").write_bytes(b"\xff" * 1000)


def damage_no_model(version: Path) -> None:
    (version / "saved_model.pb").unlink()


def damage_no_variables(version: Path) -> None:
    (version / "variables" / "variables.data-00000-of-00001").unlink()


def damage_short_variables(version: Path) -> None:
    file = version / "variables" / "variables.data-00000-of-00001"
    file.write_bytes(file.read_bytes()[:-1])


def damage_index(version: Path) -> None:
    file = version / "variables" / "variables.index"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def damage_empty(version: Path) -> None:
    shutil.rmtree(version)
    version.mkdir()


def damage_dangling(version: Path) -> None:
    """What a directory looks like that was deleted after it was found."""
    shutil.rmtree(version)
    version.symlink_to(version.parent / "nowhere")


def damage_permission(version: Path) -> None:
    (version / "saved_model.pb").chmod(0)


def damage_warmup_record(version: Path) -> None:
    write_warmup(version, [warmup_record("times", z=X["x"])])


def damage_warmup_count(version: Path) -> None:
    write_warmup(version, [warmup_record("times", **X)] * 1001)


def damage_warmup_file(version: Path) -> None:
    write_warmup(version, [warmup_record("times", **X)])
    file = version / "assets.extra" / "tf_serving_warmup_requests"
    file.write_bytes(file.read_bytes()[:-3])


DAMAGES = {
    name.removeprefix("damage_"): function
    for name, function in sorted(globals().items())
    if name.startswith("damage_")
}

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2


def bound_by_permissions(start: Callable[[], T]) -> T:
    """Call ``start`` on a thread whose child processes obey permissions, root's too.

    The set of capabilities that a program may get is one thread's, and passed on to its
    children.
    """

    def drop_and_start() -> T:
        for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # not root: nothing to drop
        return start()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(drop_and_start).result()


def warmup_record(name: str, **inputs: np.ndarray[Any, Any]) -> prediction_log_pb2.PredictionLog:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = name
    for alias, value in inputs.items():
        log.predict_log.request.inputs[alias].CopyFrom(to_proto(value))
    return log


def write_warmup(version: Path, records: list[prediction_log_pb2.PredictionLog]) -> None:
    (version / "assets.extra").mkdir(exist_ok=True)
    tfrecord.write(
        version / "assets.extra" / "tf_serving_warmup_requests",
        [record.SerializeToString() for record in records],
    )


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    saved_models: Path, tmp_path: Path, serve: ServerFactory
) -> None:
    models, staged = tmp_path / "times", tmp_path / "staged"
    put_version(saved_models / "times_one", models, 1)
    server = serve(POLL, *THREADS, "--max_num_load_retries=0", model_name="times", model_base_path=models)
    with ExitStack() as stack:
        running = bound_by_permissions(lambda: stack.enter_context(server))
        version = 1
        for name, damage in DAMAGES.items():
            version += 1
            damage(put_version(saved_models / "times_two", staged, version))
            (staged / str(version)).rename(models / str(version))

            def ended(version: int = version) -> bool:
                return states(running.client, "times").get(version) is State.END

            running.server.wait_for(ended, f"the version with damage {name!r} to fail")
            (status,) = running.client.statuses("times", version=version)
            assert status.error is not None, name
            assert status.error.code is not Code.OK, name
            assert str(status.error), name
            assert answer(running.client) == [1, 2], name
            with refused(Code.NOT_FOUND):
                answer(running.client, version=version)
            assert str(version) in running.server.log_tail()
        put_version(saved_models / "times_two", models, version + 1)
        running.wait("times", {version + 1: State.AVAILABLE})
        assert answer(running.client) == [2, 4]


def test_a_version_without_its_variables_is_not_loaded(
    embedded: None, saved_models: Path, tmp_path: Path, serve: ServerFactory
) -> None:
    """TensorFlow loads it as a model that restores nothing, and fails its requests."""
    models = tmp_path / "times"
    put_version(saved_models / "times_one", models, 1)
    with serve(POLL, "--max_num_load_retries=0", model_name="times", model_base_path=models) as running:
        staged = put_version(saved_models / "times_two", tmp_path / "staged", 2)
        shutil.rmtree(staged / "variables")
        staged.rename(models / "2")
        running.server.wait_for(
            lambda: states(running.client, "times").get(2) is State.END, "version 2 to be given up"
        )
        (status,) = running.client.statuses("times", version=2)
        assert status.error is not None
        assert status.error.code is Code.NOT_FOUND
        assert "variables.index is missing, but the graph restores it" in str(status.error)
        assert answer(running.client) == [1, 2]


def test_a_failed_load_is_tried_again(saved_models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    models = tmp_path / "times"
    put_version(saved_models / "times_one", models, 1)
    retries = ("--max_num_load_retries=1000", "--load_retry_interval_micros=100000")
    with serve(POLL, *THREADS, *retries, model_name="times", model_base_path=models) as running:
        broken = put_version(saved_models / "times_two", models.parent / "staged", 2)
        (broken / "saved_model.pb").rename(tmp_path / "kept.pb")
        broken.rename(models / "2")
        running.server.wait_for(
            lambda: states(running.client, "times").get(2) is State.LOADING, "version 2 to be loading"
        )
        assert answer(running.client) == [1, 2]
        (tmp_path / "kept.pb").rename(models / "2" / "saved_model.pb")
        running.wait("times", {2: State.AVAILABLE})


def test_a_version_directory_that_is_removed_is_unloaded_only_with_a_successor(
    saved_models: Path, tmp_path: Path, serve: ServerFactory
) -> None:
    models = tmp_path / "times"
    put_version(saved_models / "times_two", models, 1)
    put_version(saved_models / "times_one", models, 2)
    with serve(POLL, model_name="times", model_base_path=models) as running:
        running.wait("times", {2: State.AVAILABLE})
        shutil.rmtree(models / "2")
        # Version 1 is the newest that is left: it is loaded before version 2 goes.
        running.wait("times", {1: State.AVAILABLE})
        assert answer(running.client) == [2, 4]


def test_a_server_whose_only_model_cannot_be_loaded_ends(tmp_path: Path, serve: ServerFactory) -> None:
    (tmp_path / "times" / "1").mkdir(parents=True)
    with (
        pytest.raises(SpikelessError, match=r"exited with code [1-9-]"),
        serve("--max_num_load_retries=0", model_name="times", model_base_path=tmp_path / "times"),
    ):
        pass


# --- warmup ---------------------------------------------------------------------------


def test_warmup_comes_before_availability(saved_models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    models = tmp_path / "times"
    staged = put_version(saved_models / "times_one", tmp_path / "staged", 1)
    write_warmup(staged, [warmup_record("any name", **X), warmup_record("times", **X)])
    models.mkdir()
    staged.rename(models / "1")
    with serve(POLL, model_name="times", model_base_path=models) as running:
        assert answer(running.client) == [1, 2]
        log = running.server.log_path.read_text()
        assert "warmed times version 1 with 2 records" in log or "warmup records read: 2" in log


def test_warmup_can_be_switched_off(saved_models: Path, tmp_path: Path, serve: ServerFactory) -> None:
    models = tmp_path / "times"
    damage_warmup_record(put_version(saved_models / "times_one", models, 1))
    flags = ("--enable_model_warmup=false", "--max_num_load_retries=0")
    with serve(*flags, model_name="times", model_base_path=models) as running:
        assert answer(running.client) == [1, 2]
