"""Measure what a version swap does to latency: open loop, every request kept.

In: a running server and the model's warmup requests. Out: a raw result for each run
(`run_file`), its numbers (`analysis`, `folding`) and the page that shows them
(`report`).

load       the load: requests of models (`replayed`) sent by `spikeless.openloop`
protocols  how they are sent: gRPC, or JSON over HTTP
servers    the server that is measured
events     what happens to versions meanwhile, and changes what makes it happen
scenario   one run: load, changes, and what `watch` sees of the server
gate       a run judged by limits
capacity   the rate that a server keeps up with
hdr        a run as an HdrHistogram log
ladder     a run for each of the `rungs`
"""

from spikeless.bench.analysis import RULES, Reload, Startup, Summary, Window, analyse
from spikeless.bench.changes import publisher, served_config, staged, staged_in_turn, unloadable
from spikeless.bench.folding import FOLD_RULES, Estimate, Fold, fold
from spikeless.bench.load.generator_floor import FLOOR_SECONDS, measure_floor
from spikeless.bench.progress import progress_bar
from spikeless.bench.recorded import read_recording
from spikeless.bench.replayed import read_requests
from spikeless.bench.run_file import (
    Facts,
    Floor,
    Publish,
    Run,
    ServerFacts,
    Settings,
    merge,
    read_run,
    result_files,
)
from spikeless.bench.scenario import Moment, Progress, check_requests, result_path, run
from spikeless.bench.servers import SERVER_FLAGS, refusal, running_server, server_facts
from spikeless.bench.starting import start_under_load

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
    "Startup",
    "Summary",
    "Window",
    "analyse",
    "check_requests",
    "fold",
    "measure_floor",
    "merge",
    "progress_bar",
    "publisher",
    "read_recording",
    "read_requests",
    "read_run",
    "refusal",
    "result_files",
    "result_path",
    "run",
    "running_server",
    "served_config",
    "server_facts",
    "staged",
    "staged_in_turn",
    "start_under_load",
    "unloadable",
]
