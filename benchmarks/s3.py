"""``python -m benchmarks.s3``: our store beside other clients of S3, on one server, in one run.

The limit is the same bytes in parallel requests to presigned URLs, timed just before each call.
Server and clients share the cores, so look at the client's CPU seconds too.
Bytes are those of all network devices: what the server's parts tell each other is in them.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from benchmarks.cost import Cost
from benchmarks.names import OBJECT
from benchmarks.results import table, write_json
from benchmarks.samples import Findings, Sample
from dcp_resume.storage import ByteRange, ObjectStore, RangeRead, open_store
from tests.support.s3_server import S3Server

_BUCKET = "benchmark"
_MIB = 1 << 20
_PART_BYTES = 16 * _MIB
_WIDTH = 8


class Client(Protocol):
    """One client of S3: a file up, the same file down."""

    def up(self, data: memoryview) -> None:
        """Upload."""

    def down(self, into: memoryview) -> None:
        """Download into memory that is kept."""


class Presigned:
    """The standard library's HTTP, one object a part: no signature, no checksum, no multipart."""

    def __init__(self, server: S3Server) -> None:
        self._client = server.client()

    def up(self, data: memoryview) -> None:
        """PUT the parts."""
        self._parallel(data, lambda number, part: self._send("put_object", "PUT", number, part))

    def down(self, into: memoryview) -> None:
        """GET the parts."""
        self._parallel(into, self._get)

    def _parallel(self, memory: memoryview, work: Callable[[int, memoryview], None]) -> None:
        parts = [memory[at : at + _PART_BYTES] for at in range(0, len(memory), _PART_BYTES)]
        with ThreadPoolExecutor(_WIDTH) as pool:
            list(pool.map(work, range(len(parts)), parts))

    def _send(
        self,
        name: str,
        method: str,
        number: int,
        body: memoryview | None = None,
        into: memoryview | None = None,
    ) -> None:
        where = {"Bucket": _BUCKET, "Key": f"presigned/{number}"}
        url = urlsplit(self._client.generate_presigned_url(name, Params=where))
        connection = http.client.HTTPConnection(url.netloc)
        connection.request(method, f"{url.path}?{url.query}", body=body)
        answer = connection.getresponse()
        while into:
            into = into[answer.readinto(into) :]
        answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"{method} {where['Key']} was answered {answer.status}")

    def _get(self, number: int, into: memoryview) -> None:
        self._send("get_object", "GET", number, into=into)


class Ours:
    """dcp_resume's store: multipart with checksums, ranged reads into memory."""

    def __init__(self, server: S3Server) -> None:
        options = server.storage_options
        self._store: ObjectStore = open_store(f"s3://{_BUCKET}/ours", storage_options=options)

    def up(self, data: memoryview) -> None:
        """Write one object."""
        self._store.write("file", [data])

    def down(self, into: memoryview) -> None:
        """Read one range."""
        self._store.read_into("file", [RangeRead(ByteRange(0, len(into)), into)])


class _Memory(io.RawIOBase):
    """Memory as a file, without a copy of its own."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._at = memory, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._memory)}
        self._at = origin[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        found = self._memory[self._at : self._at + len(into)]
        memoryview(into).cast("B")[: len(found)] = found
        self._at += len(found)
        return len(found)

    def write(self, data: Any) -> int:
        self._memory[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)


class Boto3:
    """boto3's managed transfers, in parts as large as ours; it reads each part into bytes."""

    def __init__(self, server: S3Server) -> None:
        from boto3.s3.transfer import TransferConfig

        self._client = server.client()
        self._config = TransferConfig(multipart_chunksize=_PART_BYTES, max_concurrency=_WIDTH)

    def up(self, data: memoryview) -> None:
        """Upload a file in memory."""
        self._client.upload_fileobj(_Memory(data), _BUCKET, "boto3", Config=self._config)

    def down(self, into: memoryview) -> None:
        """Download into the memory."""
        self._client.download_fileobj(_BUCKET, "boto3", _Memory(into), Config=self._config)


class Obstore:
    """obstore, which is Rust below."""

    def __init__(self, server: S3Server) -> None:
        import obstore
        from obstore.store import S3Store

        options = server.storage_options
        self._obstore: Any = obstore
        self._store = S3Store(
            _BUCKET,
            endpoint=server.endpoint,
            access_key_id=options["key"],
            secret_access_key=options["secret"],
            region="us-east-1",
            unsigned_payload=True,
            client_options={"allow_http": True},
        )

    def up(self, data: memoryview) -> None:
        """Put one object in parts."""
        array = np.frombuffer(data, np.uint8)
        sizes = {"chunk_size": _PART_BYTES, "max_concurrency": _WIDTH}
        self._obstore.put(self._store, "obstore", array, **sizes)

    def down(self, into: memoryview) -> None:
        """Get ranges, in threads."""

        def get(start: int) -> None:
            length = min(_PART_BYTES, len(into) - start)
            found = self._obstore.get_range(self._store, "obstore", start=start, length=length)
            into[start : start + length] = memoryview(found)

        with ThreadPoolExecutor(_WIDTH) as pool:
            list(pool.map(get, range(0, len(into), _PART_BYTES)))


def _cost(call: Callable[[], None]) -> Cost:
    wall, cpu, before = time.monotonic(), time.process_time(), _transferred()
    call()
    sent, received = (new - old for new, old in zip(_transferred(), before, strict=True))
    return Cost(time.monotonic() - wall, time.process_time() - cpu, 0, received, sent)


def _transferred() -> tuple[int, int]:
    """Bytes out of and into this machine's network devices, loopback among them."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    fields = [line.partition(":")[2].split() for line in lines]
    return sum(int(f[8]) for f in fields), sum(int(f[0]) for f in fields)


def race(server: S3Server, num_bytes: int, repetitions: int) -> list[Sample]:
    """Limit, client, limit, next client, and again; repetition 0 is the cold one."""
    data = np.frombuffer(os.urandom(num_bytes), np.uint8)
    into = np.zeros(num_bytes, np.uint8)
    raw = Presigned(server)
    clients: dict[str, Client] = {"dcp_resume": Ours(server), "boto3": Boto3(server)}
    if find_spec("obstore"):
        clients["obstore"] = Obstore(server)
    samples: list[Sample] = []
    for repetition in range(repetitions + 1):
        for name, client in clients.items():
            limit = _cost(lambda: raw.up(data.data))
            cost = _cost(lambda: client.up(data.data))  # noqa: B023 - called at once
            samples.append(Sample(name, "up", repetition, cost, limit))
            limit = _cost(lambda: raw.down(into.data))
            into.fill(0)
            cost = _cost(lambda: client.down(into.data))  # noqa: B023 - called at once
            samples.append(Sample(name, "down", repetition, cost, limit))
            if not np.array_equal(into, data):
                raise SystemExit(f"{name} loaded other bytes than it saved")
    return samples


def main() -> None:
    """Parse, race, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.s3", description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3, help="besides the cold one")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    num_bytes = arguments.mebibytes * _MIB
    with S3Server() as server:
        server.make_bucket(_BUCKET)
        samples = race(server, num_bytes, arguments.repetitions)
    findings = Findings("s3", OBJECT, 1, num_bytes, samples)
    print(table(findings))
    if arguments.json:
        write_json(arguments.json, [findings], Path(server.endpoint))


if __name__ == "__main__":
    main()
