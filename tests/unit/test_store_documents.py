"""Documents of a store, read by several threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: A hundred times: kinds of documents that no thread has read one of yet, and the
#: reports of eight machines read at once.
PROGRAM = """
import importlib
import sys

sys.setswitchinterval(1e-6)
nodes = [f"node-{number}" for number in range(8)]
for _ in range(100):
    for name in [name for name in sys.modules if name.startswith("spikeless.store")]:
        del sys.modules[name]
    store = importlib.import_module("spikeless.store.objects").Store(sys.argv[1])
    module = importlib.import_module("spikeless.store.reports")
    reports = module.Reports(store)
    for node in nodes:
        reports.write(module.NodeReport(1, node, 1, 1.0, 60.0, 1, False, 1, ()))
    found = reports.read_all(nodes)
    assert [found[node].node for node in nodes] == nodes, found
"""


def test_threads_read_the_first_documents_at_once(tmp_path: Path) -> None:
    """The process ended with SIGSEGV when msgspec met a kind in two threads at once."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert ran.returncode == 0, (ran.returncode, ran.stderr)
