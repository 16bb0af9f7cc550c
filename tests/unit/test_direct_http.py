"""Exchanges in threads: straight into memory, over TLS, kept connections, and ends on request."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dcp_resume.errors import StorageUnavailable
from dcp_resume.storage import ByteRange, RangeRead, RetryPolicy, open_store
from dcp_resume.storage.direct_http import DirectHttp, Request

CONTENT = bytes(range(256)) * 8192  # 2 MiB


class Handler(BaseHTTPRequestHandler):
    """Ranges of ``CONTENT``; keeps what is put. Of ``/endless`` the last byte never comes."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self.server.peers.add(self.client_address)
        start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        body = CONTENT[int(start) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{last}/{len(CONTENT)}")
        if self.path.endswith("last"):
            self.send_header("Connection", "close")
        self.end_headers()
        if self.path.startswith("/endless"):
            self.wfile.write(body[:-1])
            self.server.is_waiting.set()
            self.server.is_over.wait()
            return
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.put = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """On loopback, with or without TLS."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.peers: set[tuple[str, int]] = set()
        self.put = b""
        self.is_waiting, self.is_over = threading.Event(), threading.Event()
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no error here."""

    def stop(self) -> None:
        self.is_over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed one for 127.0.0.1, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "here")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "here.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(context)
    yield server
    server.stop()


def direct_http() -> DirectHttp:
    return DirectHttp(ssl.create_default_context, connect_timeout_s=5, read_timeout_s=60, width=4)


def ranged(server: Server, path: str, start: int, stop: int) -> Request:
    headers = {"Range": f"bytes={start}-{stop - 1}"}
    return Request("GET", f"http://{server.netloc}{path}", headers, memoryview(b""))


def test_a_body_fills_memory_piece_by_piece_and_its_connection_is_used_again(
    server: Server,
) -> None:
    direct, memory = direct_http(), bytearray(3 << 19)
    pieces = [memoryview(memory)[: 1 << 19], memoryview(memory)[1 << 19 :]]

    async def read_twice() -> None:
        for start in (5, 7):
            request = ranged(server, "/a", start, start + len(memory))
            async with await direct.exchange(request) as exchange:
                assert exchange.status == 206
                assert exchange.headers["content-length"] == str(len(memory))
                await exchange.read_into(pieces)
            assert memory == CONTENT[start : start + len(memory)]

    asyncio.run(read_twice())
    assert len(server.peers) == 1
    direct.close()


@pytest.mark.parametrize("path", ["/endless", "/endless-and-last"])
def test_a_cancelled_read_ends_at_once_and_touches_its_memory_no_more(
    server: Server, path: str
) -> None:
    direct, memory = direct_http(), bytearray(100)

    async def cancel() -> None:
        exchange = await direct.exchange(ranged(server, path, 0, 100))
        task = asyncio.create_task(exchange.read_into([memoryview(memory)]))
        await asyncio.to_thread(server.is_waiting.wait)
        task.cancel()  # the read time-out is a minute away, and the server waits for us
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    memory.append(0)  # no view of it is left, so that it may grow
    direct.close()


def test_an_exchange_of_a_closed_client_ends_as_one_that_the_network_cut(server: Server) -> None:
    direct = direct_http()
    direct.close()

    async def ask() -> None:
        await direct.exchange(ranged(server, "/", 0, 100))

    with pytest.raises(ConnectionAbortedError):
        asyncio.run(ask())


def test_a_store_writes_and_reads_over_tls(tls_server: Server, certificate: Path) -> None:
    options: dict[str, Any] = {
        "endpoint_url": f"https://{tls_server.netloc}",
        "key": "k",
        "secret": "s",
        "client_kwargs": {"region_name": "us-east-1", "verify": str(certificate)},
    }
    store = open_store("s3://bucket/run", storage_options=options)
    memory = bytearray(1 << 20)
    store.read_into("a", [RangeRead(ByteRange(3, 3 + len(memory)), memoryview(memory))])
    assert memory == CONTENT[3 : 3 + len(memory)]
    store.write("a", [memoryview(CONTENT)])
    assert tls_server.put == CONTENT
    store.close()


def test_through_a_proxy_aiohttp_carries_the_same_bytes(server: Server) -> None:
    options: dict[str, Any] = {
        "endpoint_url": "http://storage.invalid",
        "key": "k",
        "secret": "s",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"proxies": {"http": f"http://{server.netloc}"}},
    }
    store = open_store("s3://bucket/run", storage_options=options)
    memory = bytearray(1 << 20)
    store.read_into("a", [RangeRead(ByteRange(3, 3 + len(memory)), memoryview(memory))])
    assert memory == CONTENT[3 : 3 + len(memory)]
    store.write("a", [memoryview(CONTENT)])
    assert server.put == CONTENT
    store.close()


def test_a_server_that_no_authority_knows_is_not_talked_to(tls_server: Server) -> None:
    options: dict[str, Any] = {
        "endpoint_url": f"https://{tls_server.netloc}",
        "key": "k",
        "secret": "s",
        "client_kwargs": {"region_name": "us-east-1"},
    }
    # Given up after the first try, because the delay after it would last as long as all may.
    retry = RetryPolicy(deadline_s=30, first_delay_s=30, max_delay_s=30, uniform=max)
    store = open_store("s3://bucket/run", storage_options=options, retry=retry)
    with pytest.raises(StorageUnavailable, match=r"(?i)certificate"):
        store.write("a", [memoryview(b"secret")])
    assert tls_server.put == b""
    store.close()
