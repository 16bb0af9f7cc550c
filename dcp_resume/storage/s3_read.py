"""Reading ranges of one object into memory that is already there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Protocol

from dcp_resume.storage.concurrency import for_each
from dcp_resume.storage.direct_http import Exchange
from dcp_resume.storage.object_store import RangeRead
from dcp_resume.storage.os_errors import short_read
from dcp_resume.storage.retry import Operation, TransientFault
from dcp_resume.storage.s3_client import S3Client
from dcp_resume.storage.s3_errors import refusal_in

__all__ = ["Body", "drain", "read_ranges"]

_MAX_GET_BYTES = 16 << 20
_WIDTH = 8
_CHUNK_BYTES = 1 << 18


class Body(Protocol):
    """Body of an answer as it arrives."""

    async def read(self, amount: int) -> bytes:
        """Return at most ``amount`` bytes; none at the end."""


@dataclass(slots=True)
class _Get:
    """One GET: a range, and the memory it goes to, piece after piece."""

    start: int
    stop: int
    into: list[memoryview] = field(default_factory=list)


async def read_ranges(
    client: S3Client, operation: Operation, key: str, reads: Sequence[RangeRead]
) -> None:
    """Read the ranges, several requests at a time; empty ranges make no request.

    Raises:
        StorageError: In whichever subclass fits; ``ShortRead`` past the end.
    """
    await for_each(
        _gets(reads),
        lambda get: client.retrying(operation, lambda: _fetch(client, operation, key, get)),
        width=_WIDTH,
    )


def _gets(reads: Sequence[RangeRead]) -> Iterator[_Get]:
    """Split big ranges, and join ranges that touch: a request costs as much as a MiB."""
    current = _Get(0, 0)
    for read in sorted(reads, key=lambda read: read.byte_range):
        start, stop = read.byte_range.start, read.byte_range.stop
        done = start
        while done < stop:
            if done != current.stop or current.stop - current.start >= _MAX_GET_BYTES:
                if current.into:
                    yield current
                current = _Get(done, done)
            end = min(stop, current.start + _MAX_GET_BYTES)
            current.into.append(read.into[done - start : end - start])
            current.stop = done = end
    if current.into:
        yield current


async def _fetch(client: S3Client, operation: Operation, key: str, get: _Get) -> None:
    expected = get.stop - get.start
    try:
        answer = await client.send("get_object", Key=key, Range=f"bytes={get.start}-{get.stop - 1}")
    except Exception as error:
        refusal = refusal_in(error)
        if refusal is not None and (refusal.code == "InvalidRange" or refusal.status == 416):
            raise _past_end(operation, get, 0) from error
        raise
    found = answer["ContentLength"]
    async with answer["Body"]:
        # A server that ignores Range sends the object from its beginning.
        honoured = answer.get("ContentRange", "").startswith(f"bytes {get.start}-")
        if found < expected:
            raise _past_end(operation, get, found)
        if found > expected or not (honoured or get.start == 0):
            raise short_read(
                url=operation.url,
                key=operation.key,
                expected_bytes=expected,
                found_bytes=found,
                where=f"the server ignored the range from byte {get.start}",
            )
        await drain(answer["Body"], get.into)


def _past_end(operation: Operation, get: _Get, found: int) -> Exception:
    return short_read(
        url=operation.url,
        key=operation.key,
        expected_bytes=get.stop - get.start,
        found_bytes=found,
        where=f"the range from byte {get.start} reaches past its end",
    )


async def drain(body: Body, into: Sequence[memoryview]) -> None:
    """Read a body of exactly the right length into memory.

    Raises:
        TransientFault: The body ended early.
    """
    # aiobotocore 2 wraps what it reads from, and stands in for it; 3 names it.
    exchange = getattr(body, "raw_stream", body)
    if isinstance(exchange, Exchange):
        try:
            await exchange.read_into(into)
        except (OSError, HTTPException) as error:
            raise TransientFault(f"the body of the answer broke off: {error!r}") from error
        return
    for view in into:
        done = 0
        while done < len(view):
            chunk = await body.read(min(_CHUNK_BYTES, len(view) - done))
            if not chunk:
                raise TransientFault("the body of the answer ended early")
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
