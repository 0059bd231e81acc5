"""Measure what a version swap does to the latency of requests: open loop, every request kept.

In: a running server and the model's warmup requests. Out: a raw result per run (`record`), and its numbers
(`analysis`); `spikeless.report` draws them.

schedule -> openloop (connection, requests, recorder)    the load, inside Locust (locustfile)
scenario (watch, floor)                                   one run: load, publishing, states, memory
record, analysis, folding, progress                       what comes out of it
"""

from spikeless.bench.analysis import RULES, Reload, Summary, Window, analyse
from spikeless.bench.floor import FLOOR_SECONDS, measure_floor
from spikeless.bench.folding import FOLD_RULES, Estimate, Fold, fold
from spikeless.bench.progress import progress_bar
from spikeless.bench.record import Facts, Floor, Publish, Run, ServerFacts, Settings, load, merge
from spikeless.bench.scenario import (
    SERVER_FLAGS,
    Moment,
    Progress,
    publisher,
    result_path,
    run,
    running_server,
    server_facts,
    staged,
)

__all__ = [
    "FLOOR_SECONDS",
    "FOLD_RULES",
    "RULES",
    "SERVER_FLAGS",
    "Estimate",
    "Facts",
    "Floor",
    "Fold",
    "Moment",
    "Progress",
    "Publish",
    "Reload",
    "Run",
    "ServerFacts",
    "Settings",
    "Summary",
    "Window",
    "analyse",
    "fold",
    "load",
    "measure_floor",
    "merge",
    "progress_bar",
    "publisher",
    "result_path",
    "run",
    "running_server",
    "server_facts",
    "staged",
]
