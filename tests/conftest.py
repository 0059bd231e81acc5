"""What all tests share: fixtures, and that Ctrl-C means something to the processes that tests start."""

import os
import signal

# Tests fork only to start other programs. What gRPC does for more than that breaks those that PySpark starts.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

pytest_plugins = ("saved_models", "trained_models", "promotion_models")


def pytest_configure() -> None:
    """Undo what a shell does to the commands that a script runs in the background: they ignore Ctrl-C.

    Children would inherit that, and the tests that interrupt one would wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
