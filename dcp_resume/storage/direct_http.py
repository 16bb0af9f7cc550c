"""HTTP exchanges in threads, between a socket and memory that is already there.

On an event loop each byte is copied three times on its way, by one thread for all requests. Here
the kernel puts it where it belongs, and requests share nothing but the pool of connections.
"""

from __future__ import annotations

import asyncio
import http.client
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

__all__ = ["DirectHttp", "Exchange", "Request"]

T = TypeVar("T")

_SLICE_BYTES = 1 << 20
"""Sent within one time-out: a socket's limit is for the whole of what is handed to it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, signed and ready."""

    method: str
    url: str
    headers: Mapping[str, str]
    """All of them, but Host."""
    body: memoryview
    """Format ``B``; must not change until the exchange has ended."""


class DirectHttp:
    """Exchanges with some servers, over connections that are kept.

    Args:
        context: Makes the settings of TLS, at the first use of it.
        connect_timeout_s: For a connection to be opened.
        read_timeout_s: Without any progress.
        width: Exchanges at a time; further ones wait.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        width: int,
    ) -> None:
        self._make_context = context
        self._context: ssl.SSLContext | None = None
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._is_closed = False
        self._threads = ThreadPoolExecutor(width, "dcp-resume-http")

    async def exchange(self, request: Request) -> Exchange:
        """Send a request, and wait for the head of its answer.

        Raises:
            OSError: The connection failed, or nothing happened for too long.
            HTTPException: What came back is no HTTP.
        """
        exchange = Exchange(self, request)
        await exchange.run(exchange.open)
        return exchange

    async def run(self, work: Callable[[], T], abort: Callable[[], None]) -> T:
        """Work in a thread. A cancelled wait aborts it, and ends when the thread is done."""
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError as error:  # no new work after ``close``
            raise ConnectionAbortedError("the store was closed") from error
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            abort()
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            future.exception()  # expected: retrieved, so that nobody logs it
            raise

    def connect(self, request: Request) -> http.client.HTTPConnection:
        """An open connection, kept or new."""
        parts = urlsplit(request.url)
        place = (parts.scheme, parts.netloc)
        while True:
            with self._lock:
                kept = self._idle.get(place, [])
                connection = kept.pop() if kept else None
            if connection is None:
                return self._connected(parts.scheme, parts.netloc)
            if not _is_stale(connection.sock):
                return connection
            connection.close()

    def keep(self, request: Request, connection: http.client.HTTPConnection) -> None:
        """Take a connection back that has nothing under way."""
        parts = urlsplit(request.url)
        with self._lock:
            if not self._is_closed:
                self._idle.setdefault((parts.scheme, parts.netloc), []).append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Let kept connections go, and every other one at the end of its exchange."""
        with self._lock:
            self._is_closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
        for connection in idle:
            connection.close()
        self._threads.shutdown(wait=False)

    def _connected(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection
        if scheme == "https":
            with self._lock:
                self._context = self._context or self._make_context()
            connection = http.client.HTTPSConnection(
                netloc, timeout=self._connect_timeout_s, context=self._context
            )
        else:
            connection = http.client.HTTPConnection(netloc, timeout=self._connect_timeout_s)
        connection.connect()
        connection.sock.settimeout(self._read_timeout_s)
        return connection


class Exchange:
    """One request and its answer. The parts that wait for the network run in threads.

    Args:
        owner: Has the connections.
        request: To be sent.
    """

    def __init__(self, owner: DirectHttp, request: Request) -> None:
        self._owner = owner
        self._request = request
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        self._answer: http.client.HTTPResponse | None = None
        self._is_aborted = False
        self._is_broken = False

    @property
    def url(self) -> str:
        """Of the request."""
        return self._request.url

    @property
    def status(self) -> int:
        """Of the answer."""
        return self._answer.status if self._answer else 0

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer, names in lower case."""
        found = self._answer.getheaders() if self._answer else []
        return {name.lower(): value for name, value in found}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def run(self, work: Callable[[], T]) -> T:
        """Do a part of this exchange in a thread, and abort it if the wait is cancelled."""
        try:
            return await self._owner.run(work, self._abort)
        except BaseException:
            self.close()
            raise

    async def read(self) -> bytes:
        """The rest of the answer's body."""
        return await self.run(self._read)

    async def read_into(self, into: Sequence[memoryview]) -> None:
        """Fill memory with the next bytes of the answer's body.

        Raises:
            OSError: The connection failed, or nothing happened for too long.
            IncompleteRead: The body ended early.
        """
        await self.run(lambda: self._read_into(into))

    def open(self) -> None:
        """Send the request, and read the head of the answer."""
        self._check_wanted()
        connection = self._owner.connect(self._request)
        with self._lock:
            self._connection = connection
        request = self._request
        connection.putrequest(request.method, _target(request.url), skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        with self._lock:
            # The connection forgets it as soon as the answer says that nothing will follow, which
            # is before the body is read.
            self._socket = connection.sock
        self._check_wanted()
        try:
            for piece in _slices(request.body):
                connection.sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            # The server may refuse without reading on: its answer says more than the broken pipe.
            self._is_broken = True
        self._answer = connection.getresponse()
        self._give_back_if_done()

    def close(self) -> None:
        """Let the connection go, if it still has something under way."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            if self._answer is not None:
                self._answer.close()

    def _read(self) -> bytes:
        found = self._answer.read() if self._answer else b""
        self._give_back_if_done()
        return found

    def _read_into(self, into: Sequence[memoryview]) -> None:
        answer = self._answer
        for view in into:
            rest = view
            while len(rest):
                count = answer.readinto(rest) if answer else 0
                if not count:
                    raise http.client.IncompleteRead(b"", len(rest))
                rest = rest[count:]
        self._give_back_if_done()

    def _give_back_if_done(self) -> None:
        answer = self._answer
        if answer is None or not (answer.isclosed() or answer.length == 0):
            return
        answer.close()
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is None:
            return
        if answer.will_close or self._is_aborted or self._is_broken:
            connection.close()
        else:
            self._owner.keep(self._request, connection)

    def _abort(self) -> None:
        """End the thread's wait, whatever it waits for; the thread closes."""
        with self._lock:
            self._is_aborted = True
            used = self._socket
        if used is not None:
            with suppress(OSError):  # it has ended already
                socket.socket.shutdown(used, socket.SHUT_RDWR)

    def _check_wanted(self) -> None:
        if self._is_aborted:
            raise ConnectionAbortedError("the exchange was aborted")


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _slices(body: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(body), _SLICE_BYTES):
        yield body[start : start + _SLICE_BYTES]


def _is_stale(sock: socket.socket) -> bool:
    """Whether the server has closed the connection, or speaks out of turn."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
