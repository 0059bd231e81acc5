"""The objects of a store, over fsspec: a bucket, a folder, SFTP, or HTTP for reading.

In: a URL, and the credentials that the libraries for it find by themselves. Out: bytes.
An object appears whole or not at all, a read never takes more memory than it was asked
for, and what fails is tried again. Messages name a store without its credentials.

Networks fail in more ways than one library knows, so errors are translated here, once.
"""

from __future__ import annotations

import importlib
import os
import random
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from spikeless.disk import atomic
from spikeless.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SpikelessError,
    Unavailable,
)
from spikeless.formats.urls import redacted
from spikeless.store.addresses import require_address
from spikeless.store.libraries import LIBRARIES, Found, code_of, found, is_final, is_missing, known_hosts
from spikeless.store.pieces import digest
from spikeless.store.settings import StoreSettings
from spikeless.store.throttle import Throttle

_T = TypeVar("_T")
_READ_ONLY = ("http", "https")
#: What libraries say of an object that changes when it does.
_STAMPS = (
    *("ETag", "etag", "mtime", "LastModified", "last_modified"),
    *("updated", "created", "ino", "size"),
)
#: Those whose libraries pass on that an object must not be there.
_EXCLUSIVE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0


class Store:
    """A store; safe to use from several threads.

    Raises:
        InvalidArgument: the URL is none, or of no known kind; or a file is there.
        ModuleNotFoundError: the library for it is missing
            (`spikeless.errors.missing_extra`).
    """

    def __init__(
        self,
        url: str,
        settings: StoreSettings | None = None,
        interrupted: threading.Event | None = None,
    ) -> None:
        self.settings = settings or StoreSettings()
        require_address(url)
        #: The URL, for people.
        self.shown = redacted(url)
        self._url = url.rstrip("/")
        self._protocol = fsspec.utils.get_protocol(url)
        self._interrupted = interrupted or threading.Event()
        self._throttle = Throttle(self.settings.bandwidth, self._interrupted)
        self._local = threading.local()
        if self._protocol in LIBRARIES:
            importlib.import_module(LIBRARIES[self._protocol])
        if self._protocol not in fsspec.available_protocols():
            raise InvalidArgument(
                f"{self.shown}: there is no store {self._protocol}://; there is "
                f"{', '.join(sorted(LIBRARIES))}, or a folder"
            )
        self._fs: Any = self._tried("open", "", self._connect)
        self._root = str(self._fs._strip_protocol(self._url))
        if self._protocol in ("file", "local") and Path(self._root).is_file():
            raise InvalidArgument(f"{self.shown} is a file, and no store: give a folder, or a URL")

    def _connect(self) -> Any:
        try:
            fs, _ = fsspec.core.url_to_fs(self._url, **self._options())
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{self.shown} is no address of a store: {self._said(error)}") from None
        if self._protocol in ("sftp", "ssh"):
            fs.ftp.get_channel().settimeout(self.settings.timeout)
        return fs

    def _options(self) -> dict[str, Any]:
        if self._protocol in ("sftp", "ssh"):
            # One connection answers one call at a time, so each thread has its own.
            timeouts = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), self.settings.timeout)
            return {**timeouts, "skip_instance_cache": True, "host_key_policy": known_hosts()}
        if self._protocol in ("file", "local", "memory"):
            return {}
        if self._protocol in _READ_ONLY:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=self.settings.timeout)
            client: dict[str, Any] = {"timeout": timeout, "trust_env": True}
            return {"client_kwargs": client, "skip_instance_cache": True}
        # What others write is found at once.
        return {"use_listings_cache": False, "skip_instance_cache": True}

    @property
    def _filesystem(self) -> Any:
        if self._protocol not in ("sftp", "ssh"):
            return self._fs
        if not hasattr(self._local, "fs"):
            self._local.fs = self._connect()
        return self._local.fs

    def show(self, path: str) -> str:
        """What an object is called in messages."""
        return f"{self.shown}/{path}"

    def read(self, path: str, limit: int) -> bytes:
        """A small object.

        Raises:
            NotFound: there is none.
            DataLoss: it is larger than ``limit`` bytes.
            Unavailable: the store does not answer.
        """
        data = self._tried("read", path, lambda: self._read(path, limit + 1))
        if len(data) > limit:
            raise DataLoss(f"{self.show(path)} has more than {limit} bytes")
        return data

    def fetch(self, path: str, size: int, sha256: str) -> bytes:
        """An object of known content.

        Raises:
            NotFound: there is none.
            DataLoss: it has another content, however often it is asked for.
            Unavailable: the store does not answer.
        """

        def once() -> bytes:
            self._throttle.take(size)
            data = self._read(path, size)
            if len(data) != size:
                raise DataLoss(f"{self.show(path)} has {len(data)} bytes instead of {size}")
            if digest(data) != sha256:
                raise DataLoss(f"{self.show(path)} has another content than its manifest says")
            return data

        return self._tried("read", path, once)

    def write(self, path: str, data: bytes) -> None:
        """Write an object, in place of what is there."""
        self._throttle.take(len(data))
        self._tried("write", path, lambda: self._write(path, data))

    def create(self, path: str, data: bytes) -> None:
        """Write an object where none is.

        Raises:
            AlreadyExists: one is there, with this or another content.
        """
        self._tried("write", path, lambda: self._create(path, data))

    def find(self, path: str) -> Found | None:
        """An object, if it is there."""

        def once() -> Found | None:
            try:
                return found(self._info(path))
            except FileNotFoundError:
                return None

        return self._tried("look for", path, once)

    def below(self, path: str) -> dict[str, Found]:
        """All objects below a path, named from the store; one may be listed late."""

        def once() -> dict[str, Found]:
            try:
                listed = self._call("find", self._path(path), detail=True)
            except FileNotFoundError:
                return {}
            start = len(self._path("x")) - 1
            return {str(name)[start:]: found(info) for name, info in listed.items()}

        return self._tried("list", path, once)

    def remove(self, path: str) -> None:
        """Remove an object, if it is there."""

        def once() -> None:
            with suppress(FileNotFoundError):
                self._call("rm_file", self._path(path))

        self._tried("remove", path, once)

    def names(self, path: str) -> list[str]:
        """The names directly below a path; a store may list an object late."""

        def once() -> list[str]:
            try:
                found = self._call("ls", self._path(path), detail=False)
            except FileNotFoundError:
                return []
            names = (str(name).rstrip("/").rpartition("/")[2] for name in found)
            return sorted({name for name in names if name and not name.endswith(atomic.UNFINISHED_SUFFIX)})

        return self._tried("list", path, once)

    def token(self, path: str) -> str:
        """What changes when an object does: its ETag, where the store has one.

        Raises:
            NotFound: there is no such object.
        """
        info = self._tried("look at", path, lambda: self._info(path))
        return "|".join(f"{key}={info[key]}" for key in _STAMPS if info.get(key) is not None)

    # What differs between kinds of stores ---------------------------------------------

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        fs = self._filesystem
        if fs.async_impl:
            options["timeout"] = self.settings.timeout
        return getattr(fs, method)(*arguments, **options)

    def _info(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self._call("info", self._path(path))
        return found

    def _read(self, path: str, size: int) -> bytes:
        """At most the first ``size`` bytes, whatever the store sends."""
        if self._protocol in _READ_ONLY:
            # A server may ignore the range: this kind of file stops reading there.
            with self._fs.open(self._path(path), size=size, block_size=size, cache_type="none") as file:
                return bytes(file.read(size))
        data: bytes = self._call("cat_file", self._path(path), start=0, end=size)
        return data[:size]

    def _write(self, path: str, data: bytes) -> None:
        if self._protocol in _READ_ONLY:
            raise FailedPrecondition(f"{self.shown} can be pulled from only: push to the store behind it")
        target = self._path(path)
        if self._protocol in ("file", "local"):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            atomic.write_atomically(target, data)
        elif self._protocol in ("sftp", "ssh"):
            unfinished = self._unfinished(target)
            fs = self._filesystem
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            with fs.ftp.open(unfinished, "wb") as file:
                file.set_pipelined(True)
                file.write(data)
            fs.ftp.posix_rename(unfinished, target)
        else:
            self._call("pipe_file", target, data)

    def _create(self, path: str, data: bytes) -> None:
        target = self._path(path)
        try:
            if self._protocol in ("file", "local"):
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                unfinished = Path(self._unfinished(target))
                try:
                    atomic.write_atomically(unfinished, data)
                    os.link(unfinished, target)  # fails where something is
                    atomic.sync(unfinished.parent)
                finally:
                    unfinished.unlink(missing_ok=True)
                return
            if self._exists(path):
                raise FileExistsError
            if self._protocol in _EXCLUSIVE:
                # Of those that try at the same time, one gets there.
                self._call("pipe_file", target, data, mode="create")
            else:
                self._write(path, data)
        except OSError as error:
            if not isinstance(error, FileExistsError) and code_of(error) != "PreconditionFailed":
                raise
            raise AlreadyExists(f"{self.show(path)} is there already") from None

    def _exists(self, path: str) -> bool:
        try:
            self._info(path)
        except FileNotFoundError:
            return False
        return True

    def _unfinished(self, target: str) -> str:
        folder, _, name = target.rpartition("/")
        return f"{folder}/.{name}.{secrets.token_hex(8)}{atomic.UNFINISHED_SUFFIX}"

    # Errors ---------------------------------------------------------------------------

    def _tried(self, verb: str, path: str, act: Callable[[], _T]) -> _T:
        """Do something until it works, and say what failed when it does not."""
        what = f"cannot {verb} {self.show(path) if path else self.shown}"
        pause = _FIRST_PAUSE
        for left in reversed(range(self.settings.attempts)):
            if self._interrupted.is_set():
                raise Cancelled("interrupted")
            try:
                return act()
            except DataLoss:
                if not left:  # perhaps only the way here was bad
                    raise
            except SpikelessError:
                raise
            except Exception as error:
                if is_missing(error, self._protocol in _READ_ONLY):
                    raise NotFound(f"{what}: it is not there") from None
                if is_final(error):
                    raise FailedPrecondition(
                        f"{what}: {self._said(error)}; check the credentials and rights"
                    ) from None
                if isinstance(error, OSError) and self._protocol in ("file", "local"):
                    with atomic.reported_errors(what.removeprefix("cannot ")):
                        raise
                if not left:
                    raise Unavailable(
                        f"{what}: {self._said(error)} (tried {self.settings.attempts} times)"
                    ) from None
            if hasattr(self._local, "fs"):
                del self._local.fs  # a connection that failed is not used again
            self._interrupted.wait(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _said(self, error: BaseException) -> str:
        text = str(error) or type(error).__name__
        return text.replace(self._url, self.shown) if self._url != self.shown else text
