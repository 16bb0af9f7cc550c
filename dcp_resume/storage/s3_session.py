"""The HTTP session below s3fs: who sends what, over which connection, and whether it was sent."""

from __future__ import annotations

import http.client
import ssl
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from dcp_resume.storage.direct_http import DirectHttp, Request
from dcp_resume.storage.memory_body import MemoryBody

__all__ = ["Connection", "http_session", "watch_connections"]


class Connection:
    """Whether the requests of one task were given a connection to send on."""

    def __init__(self) -> None:
        self.was_open = False

    def forget(self) -> None:
        """Start anew, before the next try."""
        self.was_open = False


_connection: ContextVar[Connection | None] = ContextVar("connection", default=None)


def watch_connections() -> Connection:
    """Watch the requests that the running task sends from now on.

    A request that is cut off while its connection is still being opened did nothing. Only the HTTP
    client knows the difference: to its caller both are a cancelled call.
    """
    connection = Connection()
    _connection.set(connection)
    return connection


async def _note_open(*_: object) -> None:
    connection = _connection.get()
    if connection is not None:
        connection.was_open = True


def http_session() -> type:
    """Aiobotocore's HTTP session: nothing is sent twice, and data goes straight to and from memory.

    aiohttp sends a PUT again, in silence, when the connection broke before the answer came. The
    retry policy would not learn that an exclusive create may have happened, and would report the
    refusal of the second as if nothing had.
    """
    import aiohttp
    from aiobotocore.httpsession import AIOHTTPSession

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(_note_open)
    trace.on_connection_reuseconn.append(_note_open)
    trace.freeze()

    class Session(AIOHTTPSession):  # type: ignore[misc]  # untyped upstream
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            # Proxies and certificates of clients are aiohttp's business.
            is_plain = not (options.get("proxies") or options.get("client_cert"))
            self._direct = _direct_http(options) if is_plain else None
            if self._direct is not None:
                # Not at exit: a forked child would wait for a lock that its parent held.
                weakref.finalize(self, self._direct.close).atexit = False

        async def __aexit__(self, *failure: Any) -> None:
            if self._direct is not None:
                self._direct.close()
            await super().__aexit__(*failure)

        async def _get_session(self, proxy_url: str | None) -> Any:
            session = await super()._get_session(proxy_url)
            # Private, and without a public switch; a fault test counts the requests.
            session._retry_connection = False
            if trace not in session.trace_configs:
                session.trace_configs.append(trace)
            return session

        async def send(self, request: Any) -> Any:
            is_body = isinstance(request.body, MemoryBody)
            if self._direct is not None and (is_body or "Range" in request.headers):
                return await _send_directly(self._direct, request)
            if is_body:
                request.body = request.body.slices()  # the headers hold its length already
            return await super().send(request)

    return Session


async def _send_directly(direct: DirectHttp, request: Any) -> Any:
    from aiobotocore.awsrequest import AioAWSResponse

    body = request.body.memory if request.body else memoryview(b"")
    # Nobody waits for "100 Continue": a server that refuses says so while the body is sent.
    headers = {name: _text(v) for name, v in request.headers.items() if name != "Expect"}
    try:
        exchange = await direct.exchange(Request(request.method, request.url, headers, body))
        answer = AioAWSResponse(request.url, exchange.status, exchange.headers, exchange)
        if not request.stream_output:
            await answer.content
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(error, request.url) from error
    return answer


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _direct_http(options: Mapping[str, Any]) -> DirectHttp:
    from botocore.httpsession import get_cert_path

    def context() -> ssl.SSLContext:
        verify = options.get("verify", True)
        if verify:
            return ssl.create_default_context(cafile=get_cert_path(verify))
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        return unverified

    connect_s, read_s = options["timeout"]
    return DirectHttp(
        context,
        connect_timeout_s=connect_s,
        read_timeout_s=read_s,
        width=options["max_pool_connections"],
    )


def _no_answer(error: Exception, url: str) -> Exception:
    """What botocore would have raised."""
    from botocore import exceptions

    kind: Callable[..., Exception] = exceptions.EndpointConnectionError
    if isinstance(error, TimeoutError):
        kind = exceptions.ReadTimeoutError
    elif isinstance(error, ssl.SSLError):
        kind = exceptions.SSLError
    elif isinstance(error, (ConnectionError, http.client.HTTPException)):
        kind = exceptions.ConnectionClosedError
    return kind(endpoint_url=url, error=error)
