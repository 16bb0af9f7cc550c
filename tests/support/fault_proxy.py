"""A loopback HTTP proxy in front of an S3 server that does harm on request, request by request.

with FaultProxy(server.endpoint) as proxy:
    proxy.inject("PUT", "log/", Fault.DROP_ANSWER)     # the next such request, and only it
    proxy.inject("GET", "", Fault.SLOW_DOWN, times=3)
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

__all__ = ["Fault", "FaultProxy"]

_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "expect"})


class Fault(Enum):
    """What happens to one request."""

    INTERNAL_ERROR = auto()
    """Answer 500 without asking the server."""
    SLOW_DOWN = auto()
    """Answer 503 SlowDown without asking the server."""
    CONFLICT = auto()
    """Answer 409 ConditionalRequestConflict without asking the server."""
    DENIED = auto()
    """Answer 403 AccessDenied without asking the server."""
    EXPIRED = auto()
    """Answer 400 ExpiredToken without asking the server."""
    SKEWED = auto()
    """Answer 403 RequestTimeTooSkewed without asking the server."""
    NO_BUCKET = auto()
    """Answer 404 NoSuchBucket without asking the server."""
    RESET = auto()
    """Reset the connection without asking the server."""
    STALL = auto()
    """Never answer; the connection stays open until the proxy ends."""
    TRUNCATE = auto()
    """Ask the server, promise the whole body of its answer, send half of it and close."""
    DROP_ANSWER = auto()
    """Ask the server, and reset the connection instead of passing its answer on."""
    CORRUPT = auto()
    """Invert one bit of the body: of the answer to a GET, of any other request."""
    WRONG_ETAG = auto()
    """Ask the server, and pass its answer on with another ETag."""
    SLOW = auto()
    """Pass request and answer on as they are, late."""


_REFUSALS = {
    Fault.INTERNAL_ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.CONFLICT: (409, "ConditionalRequestConflict"),
    Fault.DENIED: (403, "AccessDenied"),
    Fault.EXPIRED: (400, "ExpiredToken"),
    Fault.SKEWED: (403, "RequestTimeTooSkewed"),
    Fault.NO_BUCKET: (404, "NoSuchBucket"),
}
_LATE_S = 0.2


@dataclass(slots=True)
class _Rule:
    method: str
    part: str
    fault: Fault
    times: int


class FaultProxy:
    """Passes requests on unless a rule matches; keeps a list of what came.

    Args:
        endpoint: URL of the real server.
    """

    def __init__(self, endpoint: str) -> None:
        self.upstream = urlsplit(endpoint).netloc
        self.requests: list[tuple[str, str]] = []
        """Method and target of every request so far."""
        self.num_harmed = 0
        """Requests that a rule matched since the last ``heal``."""
        self.stalling = threading.Event()
        """Set once a request is being stalled."""
        self.ended = threading.Event()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            """Bound to this proxy."""

            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def inject(self, method: str, part: str, fault: Fault, *, times: int = 1) -> None:
        """Do harm to the next ``times`` requests of a method whose target contains ``part``."""
        with self._lock:
            self._rules.append(_Rule(method, part, fault, times))

    def heal(self) -> None:
        """Do no more harm, and forget what was done."""
        with self._lock:
            self._rules.clear()
            self.num_harmed = 0

    def take(self, method: str, target: str) -> Fault | None:
        """Record a request and use up a rule that matches it."""
        with self._lock:
            self.requests.append((method, target))
            for rule in self._rules:
                if rule.times > 0 and rule.method == method and rule.part in target:
                    rule.times -= 1
                    self.num_harmed += 1
                    return rule.fault
        return None

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; may be called again."""
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client gave up; so do we
            self.close_connection = True

    def _handle(self) -> None:
        fault = self.owner.take(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault in _REFUSALS:
            self._refuse(*_REFUSALS[fault])
        elif fault is Fault.RESET:
            self._reset()
        elif fault is Fault.STALL:
            self.owner.stalling.set()
            self.owner.ended.wait()
            self.close_connection = True
        else:
            if fault is Fault.SLOW:
                self.owner.ended.wait(_LATE_S)
            if fault is Fault.CORRUPT and self.command != "GET":
                body = _corrupted(body)
            self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - names of http.server

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # closing sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        try:
            # Headers go on as they are, Host included: the signature covers it.
            upstream.request(self.command, self.path, body=body, headers=headers)
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if fault is Fault.DROP_ANSWER:
            self._reset()
            return
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() == "etag" and fault is Fault.WRONG_ETAG:
                value = f'"{"0" * 32}"'
            if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        if answer.status != 204:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if fault is Fault.CORRUPT and self.command == "GET":
            content = _corrupted(content)
        if fault is Fault.TRUNCATE:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def _corrupted(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body
