"""The body of a request is a file to botocore, and slices of the very memory to the socket."""

from __future__ import annotations

import asyncio
import io
import os

import pytest

from dcp_resume.storage.memory_body import MemoryBody


async def slices_of(body: MemoryBody) -> list[memoryview]:
    return [piece async for piece in body.slices()]


@pytest.mark.parametrize("size", [0, 1, 256 << 10, (256 << 10) + 1, 1_000_001])
def test_slices_are_the_memory_itself_and_all_of_it(size):
    memory = bytearray(os.urandom(size))
    pieces = asyncio.run(slices_of(MemoryBody(memoryview(memory))))
    assert b"".join(pieces) == memory
    assert all(piece.obj is memory for piece in pieces)


def test_it_reads_and_rewinds_like_a_file():
    content = os.urandom(1000)
    body, file = MemoryBody(memoryview(content)), io.BytesIO(content)
    for offset, whence in ((0, io.SEEK_END), (10, io.SEEK_SET), (5, io.SEEK_CUR)):
        assert body.seek(offset, whence) == file.seek(offset, whence) == body.tell()
        assert body.read(7) == file.read(7)
    assert body.read() == file.read()
    assert body.read(1) == b""
    assert len(body) == 1000
    with pytest.raises(ValueError, match="-1"):
        body.seek(-1)
