"""Writing one object: a single PUT, or parts in a bounded window."""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Protocol

from dcp_resume.errors import KeyNotFound, StorageError
from dcp_resume.storage.concurrency import ByteBudget, for_each
from dcp_resume.storage.memory_body import MemoryBody
from dcp_resume.storage.object_store import check_size
from dcp_resume.storage.part_policy import (
    BUDGET_BYTES,
    WHOLE_BYTES,
    PartPlan,
    PartRate,
    plan_parts,
)
from dcp_resume.storage.retry import Operation
from dcp_resume.storage.s3_client import S3Client
from dcp_resume.storage.s3_errors import refusal_in

__all__ = ["Uplink", "crc32_header", "upload"]

_log = logging.getLogger("dcp_resume")

_MIB = 1 << 20
_MARK = "dcp-resume-upload"
"""Metadata name under which an upload leaves a token, to recognise its own object by."""


def crc32_header(data: bytes | memoryview) -> str:
    """Checksum that the server verifies on receipt, as ``x-amz-checksum-crc32`` wants it."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


class Uplink:
    """What all uploads to one store share: the rate that was measured, and the bytes in flight."""

    def __init__(self) -> None:
        self.rate = PartRate()
        self.budget = ByteBudget(BUDGET_BYTES)


async def upload(
    client: S3Client,
    uplink: Uplink,
    operation: Operation,
    key: str,
    buffers: Iterable[memoryview],
    size: int | None = None,
) -> int:
    """Write one object, whole or not at all.

    Args:
        client: Where to send it.
        uplink: Of the store.
        operation: For messages.
        key: Full key in the bucket.
        buffers: Contents; of a sequence read until the call ends, of any other iterable used up
            one by one, in a thread.
        size: Bytes in all; needed unless the buffers are a sequence.

    Returns:
        Bytes written.

    Raises:
        ValueError: The buffers gave another number of bytes than ``size``.
        StorageError: In whichever subclass fits; no upload of ours is left open unless the store
            did not answer the abort either.
    """
    content = _Joined(buffers) if isinstance(buffers, Sequence) else _Streamed(buffers, size or 0)
    check_size(len(content), size)
    if len(content) <= WHOLE_BYTES:
        async with uplink.budget.taken(len(content)):
            body = await content.take(0, len(content))
            await client.request(
                operation,
                "put_object",
                Key=key,
                Body=MemoryBody(body),
                ChecksumCRC32=await asyncio.to_thread(crc32_header, body),
            )
    else:
        plan = plan_parts(len(content), rate=uplink.rate.bytes_per_s)
        await _Multipart(client, uplink, operation, key, content, plan).run()
    return len(content)


class _Multipart:
    """One multipart upload, from its creation to its completion or abort."""

    def __init__(
        self,
        client: S3Client,
        uplink: Uplink,
        operation: Operation,
        key: str,
        content: _Content,
        plan: PartPlan,
    ) -> None:
        self._client = client
        self._uplink = uplink
        self._operation = operation
        self._key = key
        self._content = content
        self._plan = plan
        self._token = secrets.token_hex(16)
        self._parts: dict[int, dict[str, Any]] = {}

    async def run(self) -> None:
        created = await self._client.request(
            self._operation,
            "create_multipart_upload",
            Key=self._key,
            ChecksumAlgorithm="CRC32",
            Metadata={_MARK: self._token},
        )
        upload_id: str = created["UploadId"]
        count = -(-len(self._content) // self._plan.part_bytes)
        try:
            await for_each(
                range(1, count + 1),
                lambda number: self._send_part(upload_id, number),
                width=self._plan.width,
            )
            await self._complete(upload_id)
        except BaseException:  # cancellation too: an open upload costs money until someone looks
            await self._abort(upload_id)
            raise

    async def _send_part(self, upload_id: str, number: int) -> None:
        start = (number - 1) * self._plan.part_bytes
        stop = min(start + self._plan.part_bytes, len(self._content))
        async with self._uplink.budget.taken(stop - start):
            body = await self._content.take(start, stop)
            checksum = await asyncio.to_thread(crc32_header, body)

            async def attempt() -> dict[str, Any]:
                started_ns = time.monotonic_ns()
                answer = await self._client.send(
                    "upload_part",
                    Key=self._key,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=MemoryBody(body),
                    ChecksumCRC32=checksum,
                )
                self._uplink.rate.note(stop - start, time.monotonic_ns() - started_ns)
                return answer

            answer = await self._client.retrying(self._operation, attempt)
        self._parts[number] = {
            "PartNumber": number,
            "ETag": answer["ETag"],
            "ChecksumCRC32": checksum,
        }

    async def _complete(self, upload_id: str) -> None:
        parts = [self._parts[number] for number in sorted(self._parts)]
        try:
            await self._client.request(
                self._operation,
                "complete_multipart_upload",
                Key=self._key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except StorageError as error:
            refusal = refusal_in(error)
            # The answer to an earlier try was lost, and that try has used the upload up.
            if refusal is None or refusal.code != "NoSuchUpload" or not await self._is_there():
                raise

    async def _is_there(self) -> bool:
        """Whether the object under the key is the one that this very upload made."""
        try:
            found = await self._client.request(self._operation, "head_object", Key=self._key)
        except KeyNotFound:
            return False
        size_fits = found["ContentLength"] == len(self._content)
        token = found.get("Metadata", {}).get(_MARK)
        return bool(size_fits and token == self._token)

    async def _abort(self, upload_id: str) -> None:
        """Give the parts back; a failure here must not hide the one that led here."""
        try:
            await self._client.request(
                self._operation, "abort_multipart_upload", Key=self._key, UploadId=upload_id
            )
        except StorageError as error:
            refusal = refusal_in(error)
            if refusal is None or refusal.code != "NoSuchUpload":
                _log.warning("an upload stays open until `discard` removes it: %s", error)


class _Content(Protocol):
    """What an object is written from."""

    def __len__(self) -> int:
        """Bytes in all."""

    async def take(self, start: int, stop: int) -> memoryview:
        """A range in one piece."""


class _Streamed:
    """Buffers that exist one at a time. Ranges must not leave gaps; each waits for those before."""

    def __init__(self, buffers: Iterable[memoryview], size: int) -> None:
        self._buffers = iter(buffers)
        self._size = size
        self._rest = memoryview(b"")
        self._position = 0
        self._turn = asyncio.Condition()

    def __len__(self) -> int:
        return self._size

    async def take(self, start: int, stop: int) -> memoryview:
        """The next ``stop - start`` bytes; in a thread, because the buffers may come from afar."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._position == start)
            body = await asyncio.to_thread(self._next, stop - start, stop == self._size)
            self._position = stop
            self._turn.notify_all()
            return body

    def _next(self, length: int, is_last: bool) -> memoryview:
        body = bytearray()
        while len(body) < length:
            if not len(self._rest):
                following = next(self._buffers, None)
                if following is None:
                    raise ValueError(
                        f"the buffers end early; {length - len(body)} bytes are missing"
                    )
                self._rest = following
            piece = self._rest[: length - len(body)]
            self._rest = self._rest[len(piece) :]
            body += piece
        if is_last and (len(self._rest) or any(map(len, self._buffers))):
            raise ValueError(f"the buffers give more than {self._size} bytes")
        return memoryview(body)


class _Joined:
    """Slices of the concatenation of several buffers, without joining them all."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = [buffer for buffer in buffers if len(buffer)]
        self._ends = list(accumulate(map(len, self._buffers)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    async def take(self, start: int, stop: int) -> memoryview:
        """A range; in place where one buffer holds it, else copied together."""
        pieces = self._pieces(start, stop)
        if len(pieces) == 1:
            return pieces[0]
        if stop - start < _MIB:
            return memoryview(b"".join(pieces))
        return memoryview(await asyncio.to_thread(b"".join, pieces))

    def _pieces(self, start: int, stop: int) -> list[memoryview]:
        pieces = []
        index = bisect_right(self._ends, start)
        while start < stop:
            buffer = self._buffers[index]
            offset = start - (self._ends[index] - len(buffer))
            piece = buffer[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
            index += 1
        return pieces
