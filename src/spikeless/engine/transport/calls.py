"""One call: its messages, its context, and how a method of ``grpc`` answers it.

Codes and texts of errors are those of grpcio's own server.
"""

from __future__ import annotations

import base64
import logging
import math
import queue
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from spikeless.engine.transport.streams import Stream
from spikeless.http2.headers import HeaderList

if TYPE_CHECKING:
    from spikeless.engine.transport.peer import Peer

_log = logging.getLogger(__name__)
_PREFIX = struct.Struct(">BI")
#: What zlib calls the formats; ``identity`` is none.
_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


class MethodDetails(grpc.HandlerCallDetails):
    """What a handler goes by that may have the method of this path."""

    def __init__(self, path: str) -> None:
        self.method = path
        self.invocation_metadata = ()


class Refused(Exception):
    """A call that ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


def take_message(stream: Stream, limit: int) -> bytes | None:
    """The next whole message of a stream; None when it has not arrived.

    Raises:
        Refused: it is larger than ``limit``, or is not what its headers say.
    """
    if stream.size < _PREFIX.size:
        return None
    parts = stream.received
    if len(parts[0]) < _PREFIX.size:
        parts[:] = [b"".join(parts)]
    flag, size = _PREFIX.unpack_from(parts[0])
    if size > limit:
        raise Refused(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"SERVER: Received message larger than max ({size} vs. {limit})",
        )
    whole = _PREFIX.size + size
    if stream.size < whole:
        return None
    if stream.size > whole and len(parts) > 1:
        parts[:] = [b"".join(parts)]
    # A large message is copied once, here.
    rest = parts[0][whole:] if len(parts) == 1 else b""
    parts[0] = memoryview(parts[0])[_PREFIX.size : whole] if size else b""
    message = b"".join(parts)
    stream.received = [rest] if rest else []
    stream.size -= whole
    return _unpacked(message, stream.headers.fields.get(b"grpc-encoding"), limit) if flag & 1 else message


def _unpacked(message: bytes, encoding: bytes | None, limit: int) -> bytes:
    if encoding is None or encoding not in _WINDOW_BITS:
        raise Refused(grpc.StatusCode.INTERNAL, "Compression bit set but no encoding configured")
    unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = unpacker.decompress(message, limit + 1)
    except zlib.error:
        raise Refused(grpc.StatusCode.INTERNAL, "Decompression failed due to data error") from None
    if len(content) > limit:
        raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "Decompressed message larger than max")
    if not unpacker.eof:
        raise Refused(grpc.StatusCode.INTERNAL, "Decompression failed due to data error")
    return content


def _binary(value: bytes) -> bytes:
    """The value of a header whose name ends in ``-bin``: base64, maybe unpadded."""
    try:
        return base64.b64decode(value + b"==")
    except ValueError:
        return value


class Context(grpc.ServicerContext):
    """What a method may ask of its call, and say about it."""

    def __init__(self, client: Peer, stream: Stream, has_deadline: bool = True) -> None:
        self.client = client
        self.stream = stream
        timeout = stream.headers.timeout if has_deadline else None
        self.deadline = None if timeout is None else time.monotonic() + timeout
        #: The method runs on the loop, which waits for it.
        self.is_inline = False
        #: Set by methods of which the loop may wait, if they take no time to speak of.
        self.may_be_inline = False
        #: It has been handed to the method.
        self.is_running = False
        #: There is a timer for its deadline.
        self.has_timer = False
        #: The handler of its method, None where there is none.
        self.method: Any = None
        #: Of a method that takes a stream: what has arrived; None ends it.
        self.requests: queue.SimpleQueue[bytes | None] | None = None
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: HeaderList = ()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []

    # --- of grpc.RpcContext -----------------------------------------------------------

    def is_active(self) -> bool:
        return self._callbacks is not None

    def time_remaining(self) -> float:
        return math.inf if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    def cancel(self) -> None:
        self.client.fail(self, grpc.StatusCode.CANCELLED, "Cancelled on the server side")

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def ended(self) -> None:
        """Tell whoever wants to know, once."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
        if self.requests is not None:
            self.requests.put(None)
        for callback in callbacks or ():
            callback()

    # --- of grpc.ServicerContext ------------------------------------------------------

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return tuple(
            (name.decode("latin-1"), _binary(value) if name.endswith(b"-bin") else value.decode("latin-1"))
            for name, value in self.stream.headers.metadata
        )

    def peer(self) -> str:
        return self.client.peer

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> dict[str, Any]:
        return {}

    def send_initial_metadata(self, initial_metadata: Any) -> None:
        raise NotImplementedError

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._trailing = tuple(
            (name.encode(), value if isinstance(value, bytes) else value.encode())
            for name, value in trailing_metadata
        )

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Refused(code, details)

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        self.set_trailing_metadata(status.trailing_metadata or ())
        raise Refused(status.code, status.details)

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    # --- of the loop ------------------------------------------------------------------

    def open_requests(self) -> None:
        """The method takes a stream of requests."""
        self.requests = queue.SimpleQueue()

    # --- answering --------------------------------------------------------------------

    def read(self, content: bytes) -> Any:
        """A request of the method; raises Refused where it is none."""
        try:
            return self.method.request_deserializer(content) if self.method.request_deserializer else content
        except Exception:
            raise Refused(grpc.StatusCode.INTERNAL, "Exception deserializing request!") from None

    def written(self, response: Any) -> bytes:
        """A response of the method; raises Refused where it is none."""
        serializer = self.method.response_serializer
        try:
            content = serializer(response) if serializer else response
            if not isinstance(content, bytes):
                raise TypeError(type(content))
        except Exception:
            _log.exception("a response of %s", self.stream.headers.path)
            raise Refused(grpc.StatusCode.INTERNAL, "Failed to serialize response!") from None
        return content

    def run(self, content: bytes | None) -> None:
        """Answer with the method; nothing that fails there gets out.

        Args:
            content: the request; None where the method takes a stream of them.
        """
        try:
            if content is not None and not self.method.response_streaming:
                response = self.method.unary_unary(self.read(content), self)
                if self._code is None:
                    self.client.answer(self, self.written(response))
                    return
            else:
                self._stream(content)
                if self.requests is None and content is not None and self._is_held():
                    return
            if self._code is not None:
                raise Refused(self._code, self._details)
            self.client.finish(self)
        except Refused as refused:
            self.client.fail(self, refused.code, refused.details, self._trailing)
        except Exception as error:
            _log.exception("%s failed", self.stream.headers.path)
            self.client.fail(self, grpc.StatusCode.UNKNOWN, f"Exception calling application: {error}")

    def _is_held(self) -> bool:
        """The method goes on sending after it has returned."""
        return bool(getattr(self.method.unary_stream, "experimental_non_blocking", False))

    def _stream(self, content: bytes | None) -> None:
        method = self.method
        if content is None:
            behavior = method.stream_stream if method.response_streaming else method.stream_unary
            responses = behavior(self._incoming(), self)
            responses = responses if method.response_streaming else [responses]
        elif self._is_held():
            method.unary_stream(self.read(content), self, send_response_callback=self._send_or_finish)
            return
        else:
            responses = method.unary_stream(self.read(content), self)
        for response in responses:
            if not self.is_active():
                return
            self.client.send(self, self.written(response))

    def _send_or_finish(self, response: Any) -> None:
        if response is None:
            self.client.finish(self)
        else:
            self.client.send(self, self.written(response))

    def _incoming(self) -> Iterator[Any]:
        assert self.requests is not None
        while (content := self.requests.get()) is not None:
            yield self.read(content)
