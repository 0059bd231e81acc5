"""The stream of one call, as HTTP/2 sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from spikeless.engine.transport.headers import RequestHeaders


@dataclass(eq=False, slots=True)
class Stream:
    """One call of a client."""

    number: int
    headers: RequestHeaders
    #: Bytes that the client may still be sent.
    window: int
    #: What has arrived and nobody has taken.
    received: list[bytes | bytearray | memoryview] = field(default_factory=list)
    #: Bytes in ``received``.
    size: int = 0
    #: The client has said everything.
    ended: bool = False
    #: The stream is over, for one side or both: nothing can be sent.
    closed: bool = False
    #: It is in the list of those with news.
    has_news: bool = False
    #: Its headers were looked at.
    is_known: bool = False
    #: What comes before the first message was sent.
    has_head: bool = False
    #: What the windows held back.
    waiting: deque[bytes | memoryview] = field(default_factory=deque)
    #: The block that ends it, once all is sent that waits.
    trailers: bytes | None = None

    def drop_received(self) -> None:
        """Nobody will take what has arrived."""
        self.received.clear()
        self.size = 0

    @property
    def held(self) -> int:
        """Bytes that it makes the server hold."""
        return self.size + self.headers.size + sum(map(len, self.waiting))
