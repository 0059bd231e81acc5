"""Loaded versions, lent to requests without a lock.

In: versions that can be closed. Out: a handle on one (``Shelf.use``). A version that is
taken away is found by no later look-up, and is closed after the last request that uses
it has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from spikeless.errors import NotFound


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Loaded(Generic[T]):
    """A loaded version and the number of requests that are using it.

    Once acquired, it can be the context of one ``with`` statement, at whose end it is
    released.
    """

    def __init__(self, version: int, model: T) -> None:
        self.version = version
        self.model = model
        self._users = 0
        self._retired = False
        # Taken by each request: a lock costs less than a condition around one.
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)

    def acquire(self) -> bool:
        """Count one more user; False when the version is on its way out."""
        with self._lock:
            if self._retired:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._retired and not self._users:
                self._idle.notify_all()

    def __enter__(self) -> T:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.release()

    def retire(self) -> None:
        """Admit no new users and wait until the last one is gone."""
        with self._idle:
            self._retired = True
            self._idle.wait_for(lambda: not self._users)


class Shelf(Generic[T]):
    """The versions that requests find. Its writers take turns by a lock of theirs."""

    def __init__(self) -> None:
        # Replaced as a whole, never changed, so that a look-up needs no lock.
        self._available: Mapping[str, Mapping[int, Loaded[T]]] = {}

    def use(self, name: str, version: int | None = None) -> AbstractContextManager[T]:
        """Lend a loaded version, by default the highest, to one ``with`` statement.

        It is not closed while it is lent.

        Raises:
            NotFound: no such version is available.
        """
        while True:
            versions = self._available.get(name) or {}
            if version is not None:
                loaded = versions.get(version)
            else:
                loaded = versions[max(versions)] if versions else None
            if loaded is None:
                request = f"Latest({name})" if version is None else f"Specific({name}, {version})"
                raise NotFound(f"Servable not found for request: {request}")
            if loaded.acquire():
                return loaded

    def versions(self, name: str) -> list[int]:
        """The versions of ``name`` that can be used now, lowest first."""
        return sorted(self._available.get(name) or ())

    def is_empty(self) -> bool:
        """Whether no model has a version."""
        return not any(self._available.values())

    def put(self, name: str, loaded: Loaded[T]) -> None:
        """Let requests find a version."""
        by_version = {**self._available.get(name, {}), loaded.version: loaded}
        self._available = {**self._available, name: by_version}

    def withdraw(self, name: str, version: int) -> None:
        """Let no request find a version any more."""
        rest = {number: one for number, one in self._available.get(name, {}).items() if number != version}
        self._available = {**self._available, name: rest}
