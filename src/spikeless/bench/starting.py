"""One start of a server under load: from its exec to the first answers.

In: settings, and what to start. Out: a `Run` whose offset zero is the moment before the
exec. Requests leave from then on, so those that nobody listens to yet end at once as
UNAVAILABLE. The load is so small that one thread of this process drives it.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
import threading
import time

import numpy as np

from spikeless import launch
from spikeless.bench.machine import describe_machine, source_commit
from spikeless.bench.recorded import planned
from spikeless.bench.run_file import Facts, Floor, Run, Settings
from spikeless.bench.servers import from_here, portable, server_facts
from spikeless.bench.watch import Watcher
from spikeless.channels import endpoint
from spikeless.errors import Code, DeadlineExceeded, Unavailable
from spikeless.openloop.loop import OpenLoop

#: How long requests leave after the first answer that is within the SLO.
AFTER_SECONDS = 3.0
_POLL_SECONDS = 0.02


def start_under_load(
    scenario: str,
    settings: Settings,
    launched: launch.LaunchSettings,
    floor: Floor | None = None,
    note: str = "",
) -> Run:
    """Start a server, and stop it a few seconds after it answers within the SLO.

    Args:
        scenario: the name that the report groups runs by.
        settings: the load; its duration is how long to wait for such an answer.
        launched: the server.
        floor: the generator's own latency.
        note: what else is to be said of the engine.

    Raises:
        Unavailable: the server exited; says how its log ends.
        DeadlineExceeded: it did not answer within the SLO.
        SpikelessError: the requests cannot be read, or the engine is not installed.
    """
    plan = planned(settings)
    server = launch.ServerProcess(launched)
    target, tls = endpoint(server.target)
    load = OpenLoop(plan.offsets, plan.requests, target, settings.timeout, plan.numbers, tls=tls)
    now = datetime.datetime.now(datetime.timezone.utc)
    with server:
        start = time.monotonic()
        server.start()
        thread = threading.Thread(target=load.run, args=(start,))
        with Watcher(server.target, settings.model_name, server.pid) as watcher:
            thread.start()
            try:
                _wait(server, load, settings, start)
                server.wait_ready()
                facts = server_facts(server, note)
            finally:
                load.stop()
                thread.join()
    columns = load.columns.ended()
    # Those that were in flight at the end.
    whole = columns["code"] != Code.CANCELLED
    columns = {name: values[whole] for name, values in columns.items()}
    return Run(
        Facts(
            scenario=scenario,
            started=now.isoformat(timespec="milliseconds"),
            commit=source_commit(),
            settings=dataclasses.replace(
                settings,
                requests=from_here(settings.requests),
                seconds=float(np.max(columns["intended"] + columns["latency"])),
            ),
            machine=describe_machine(),
            server=facts,
            generator=portable([sys.executable, "-m", "spikeless", *sys.argv[1:]]),
            states=tuple(watcher.state_changes(start)),
            floor=floor,
        ),
        columns,
        watcher.samples(start),
    )


def _wait(server: launch.ServerProcess, load: OpenLoop, settings: Settings, start: float) -> None:
    """Until a while after the first answer within the SLO."""
    latency, code = load.columns.latency, load.columns.code
    until = start + settings.seconds
    good = False
    while time.monotonic() < until:
        if server.exit_code is not None:
            raise Unavailable(
                f"the server exited with code {server.exit_code} before it answered; its log ends:\n"
                f"{server.log_tail()}"
            )
        while load.finished and not good:
            index = load.finished.popleft()
            if code[index] == Code.OK and latency[index] * 1e3 <= settings.slo_ms:
                good = True
                until = time.monotonic() + AFTER_SECONDS
        time.sleep(_POLL_SECONDS)
    if not good:
        raise DeadlineExceeded(
            f"no answer within {settings.slo_ms:g} ms came in {settings.seconds:g} s after the start; the "
            f"server's log ends:\n{server.log_tail()}"
        )
