"""What a server imports and loads: a fork server does it once for all its children."""

from spikeless import runtime
from spikeless.cli import serve
from spikeless.engine import rest_api, rest_server

__all__ = ["rest_api", "rest_server", "serve"]

runtime.version()
