"""A trial: a version is loaded and asked in a process of its own.

In: the directory of a version, perhaps the stable version that it is to follow. Out:
what it took, or the gate at which it failed. ``python -m spikeless.repository.trial
VERSION [STABLE]`` is the process: it may crash or run out of memory without harm, and
prints its findings as one JSON object. With ``--no-load`` before them it only looks at
the operations.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path

from spikeless.disk import children
from spikeless.disk.proc import private_memory
from spikeless.errors import FailedPrecondition, SpikelessError
from spikeless.formats import savedmodel
from spikeless.formats.session_overrides import session_config
from spikeless.repository import golden, target
from spikeless.repository.journal import Findings
from spikeless.runtime import Session, op_names
from spikeless.runtime.model import Model
from spikeless.warmup.records import Record, read, warmup_file
from spikeless.warmup.replay import answer, replay

#: The process; the version and the stable one follow.
_COMMAND = (sys.executable, "-m", "spikeless.repository.trial")
_NO_LOAD = "--no-load"
#: Requests whose median is the steady latency.
_STEADY_REQUESTS = 30


class GateError(FailedPrecondition):
    """A version that may not be published; names the gate."""

    def __init__(self, gate: str, problem: str) -> None:
        super().__init__(f"gate {gate}: {problem}")
        self.gate = gate
        self.problem = problem


def run(version: Path, stable: Path | None = None, *, load: bool = True) -> Findings:
    """Try a version in a process of its own.

    Args:
        version: its directory, with the warmup records and golden requests that it
            carries.
        load: load it and ask it; otherwise only look at its operations.
        stable: the version that its callers use now: its warmup records are asked, too.

    Raises:
        GateError: TensorFlow has not all of its operations, it cannot be loaded, or it
            fails on a request or answers a golden one wrongly.
    """
    command = [
        *_COMMAND,
        *([] if load else [_NO_LOAD]),
        str(version),
        *([] if stable is None else [str(stable)]),
    ]
    done = children.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        result = json.loads(done.stdout)
    except ValueError:
        died = f"TensorFlow died of {signal.Signals(-done.returncode).name}\n" if done.returncode < 0 else ""
        result = {"gate": "load", "problem": f"the model cannot be loaded: {died}{done.stderr[-2000:]}"}
    if "gate" in result:
        # Names inside the model: where it is staged is of no use to the caller.
        raise GateError(result["gate"], result["problem"].replace(f"{version}/", ""))
    return Findings(**result)


def _check_ops(version: Path) -> None:
    problem = target.ops_without_kernel(savedmodel.read(version).meta_graph().graph_def, op_names())
    if problem:
        raise GateError("ops", f"{problem}; where servers have it, publish without a trial, by --no-load")


def _try(version: Path, stable: Path | None) -> Findings:
    _check_ops(version)
    findings = Findings()
    before, started = private_memory(), time.monotonic()
    try:
        session = Session.load(version, config=session_config(version))
    except SpikelessError as error:
        raise GateError("load", f"the model cannot be loaded: {error}") from None
    with session:
        findings.load = time.monotonic() - started
        model = Model(session)
        with _gate("warmup", "build the warmup file again with `spikeless warmup build`"):
            findings.warmup = replay(model, warmup_file(version))
        findings.memory = max(0, private_memory() - before)
        with _gate("golden", "the golden requests or their tolerance are wrong, or the model is"):
            given = golden.of_version(version)
        asked = given.records[:1] or tuple(_requests(version))[:1]
        if asked:
            with _gate("first request", "the model or the request is wrong"):
                findings.first, findings.steady = _latencies(model, asked[0])
        with _gate("golden", "the golden requests or their tolerance are wrong, or the model is"):
            golden.check(model, given)
            findings.golden = len(given.records)
        if stable is not None:
            for record in _requests(stable):
                with _gate(
                    "signatures",
                    f"callers of {stable} send such requests (its warmup record {record.number}); keep "
                    "answering them, or say --allow-breaking",
                ):
                    answer(model, record)
                findings.stable_requests += 1
    return findings


@contextmanager
def _gate(name: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except SpikelessError as error:
        raise GateError(name, f"{error}; {remedy}") from None


def _requests(version: Path) -> Iterator[Record]:
    if warmup_file(version).exists():
        yield from (record for record in read(warmup_file(version)) if record.kind)


def _latencies(model: Model, record: Record) -> tuple[float, float]:
    latencies = []
    for _ in range(1 + _STEADY_REQUESTS):
        started = time.monotonic()
        answer(model, record)
        latencies.append(time.monotonic() - started)
    return latencies[0], statistics.median(latencies[1:])


def main() -> None:
    load = _NO_LOAD not in sys.argv
    version, *rest = (argument for argument in sys.argv[1:] if argument != _NO_LOAD)
    # Whatever else is printed must not get between.
    with redirect_stdout(sys.stderr):
        try:
            if load:
                result = asdict(_try(Path(version), Path(rest[0]) if rest else None))
            else:
                _check_ops(Path(version))
                result = asdict(Findings())
        except GateError as error:
            result = {"gate": error.gate, "problem": error.problem}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
