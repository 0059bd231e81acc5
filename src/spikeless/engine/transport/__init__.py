"""A gRPC server of small latency: HTTP/2, calls, and the loop that answers them."""

from spikeless.engine.transport.calls import Context
from spikeless.engine.transport.server import SUPPORTED_OPTIONS, FastServer

__all__ = ["SUPPORTED_OPTIONS", "Context", "FastServer"]
