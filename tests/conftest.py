"""What all tests share: fixtures, and that child processes react to Ctrl-C."""

import os
import signal
import sys

import hypothesis
from places import ROOT

from spikeless import launch

# Tests fork only to start other programs. What gRPC does for more than that breaks
# those that PySpark starts.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

#: Training scripts import each other by their bare names, as scripts do; tests import
#: them the same way.
sys.path.append(str(ROOT / "training"))

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

pytest_plugins = (
    "fleet_models",
    "saved_models",
    "trained_models",
    "promotion_models",
    "prometheus",
    "registered_models",
)


# Processes that test at the same time take ports of their own for servers.
_number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
launch._SERVER_PORTS = launch._SERVER_PORTS[_number::_count]


def pytest_configure() -> None:
    """Let Ctrl-C work where a shell started the tests in the background.

    Children would inherit that, and the tests that interrupt one would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
