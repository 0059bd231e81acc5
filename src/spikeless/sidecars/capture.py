"""Capture: a gRPC relay in front of a server that records a sample of the calls.

In: calls of any method of a model server, as bytes. Out: the server's answers as they
are, with their status and metadata, and a file of records (`recording`). Deadlines and
cancellations are passed on. Nothing is parsed on the way, and a call never waits for
its record.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from spikeless.channels import CHANNEL_OPTIONS, TLS, credentials
from spikeless.errors import InvalidArgument, SpikelessError, Unavailable
from spikeless.sidecars.recording import Recorder, RecorderSettings, RelayedCall

#: The one method of a model server that answers more than once; all others take one
#: message and give one.
_WATCH = "/grpc.health.v1.Health/Watch"
#: Metadata that belongs to one connection, not to the call.
_OWN_METADATA = frozenset({"user-agent", "te", "content-type", "accept-encoding"})
_SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


@dataclass(frozen=True)
class CaptureSettings:
    """Where calls come from and go to."""

    #: The server's gRPC address, ``host:port``.
    target: str
    #: Where callers connect, ``host:port``; port 0 picks a free one.
    listen: str
    recorder: RecorderSettings
    #: The share of calls that is recorded.
    sample: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise InvalidArgument(
                f"--sample {self.sample:g}: the share of calls must be above 0 and at most 1"
            )


class Capture(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """A relay on a thread of its own: ``start`` (returns the port), ``stop``."""

    #: Once it listens: before, no file is touched.
    recorder: Recorder

    def __init__(self, settings: CaptureSettings) -> None:
        self.settings = settings
        self.relayed = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._channel: grpc.aio.Channel | None = None

    def start(self) -> int:
        """Listen; returns the port.

        Raises:
            Unavailable: the address is taken.
            FailedPrecondition: the file cannot be written.
        """
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        except SpikelessError:
            self.stop(0.0)
            raise

    async def _start(self) -> int:
        target = self.settings.target
        if target.startswith(TLS):
            self._channel = grpc.aio.secure_channel(
                target.removeprefix(TLS), credentials(), options=CHANNEL_OPTIONS
            )
        else:
            self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        server = grpc.aio.server(options=_SERVER_OPTIONS)
        server.add_generic_rpc_handlers((self,))
        try:
            port = server.add_insecure_port(self.settings.listen)
        except RuntimeError:
            raise Unavailable(f"cannot listen on {self.settings.listen}: is it taken?") from None
        self.recorder = Recorder(self.settings.recorder, self.settings.sample)
        await server.start()
        self._server = server
        return int(port)

    def stop(self, grace: float = 10.0) -> None:
        """Wait ``grace`` seconds for calls in progress, and write what was recorded."""
        asyncio.run_coroutine_threadsafe(self._stop(grace), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._server is not None:
            self.recorder.close()

    async def _stop(self, grace: float) -> None:
        if self._server is not None:
            await self._server.stop(grace)
        if self._channel is not None:
            await self._channel.close(None)

    # --- calls ----------------------------------------------------------------------

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method, whichever it is: see `grpc.GenericRpcHandler`."""
        method = handler_call_details.method
        if method == _WATCH:
            return grpc.unary_stream_rpc_method_handler(self.watch)
        return grpc.unary_unary_rpc_method_handler(partial(self.one, method))

    async def one(self, method: str, request: bytes, context: Any) -> bytes:
        """Relay a call of one message and one answer."""
        assert self._channel is not None
        arrived = time.time_ns()
        self.relayed += 1
        call = self._channel.unary_unary(method, None, None)(
            request, timeout=context.time_remaining(), metadata=_passed_on(context.invocation_metadata())
        )
        try:
            response: bytes = await call
            await context.send_initial_metadata(_passed_on(await call.initial_metadata()))
            context.set_trailing_metadata(_passed_on(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            await _fail(context, error)
        finally:
            # The caller may have gone away: then so should the call.
            call.cancel()
        if random.random() < self.settings.sample:
            self.recorder.offer(RelayedCall(method, request, response, arrived))
        return response

    async def watch(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        """Relay a call with any number of answers."""
        assert self._channel is not None
        self.relayed += 1
        call = self._channel.unary_stream(_WATCH, None, None)(
            request, timeout=context.time_remaining(), metadata=_passed_on(context.invocation_metadata())
        )
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            await _fail(context, error)
        finally:
            call.cancel()


def _passed_on(metadata: Any) -> Sequence[tuple[str, str | bytes]]:
    return [
        (key, value)
        for key, value in metadata or ()
        if key not in _OWN_METADATA and not key.startswith(("grpc-", ":"))
    ]


async def _fail(context: Any, error: grpc.aio.AioRpcError) -> None:
    await context.abort(error.code(), error.details() or "", tuple(_passed_on(error.trailing_metadata())))
