"""The body of a request, sent from the memory that it lies in."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

__all__ = ["MemoryBody"]

_SLICE_BYTES = 256 << 10
"""Handed to the socket at once: what the kernel does not take, asyncio copies for later."""


class MemoryBody(io.RawIOBase):
    """A file that botocore may measure, hash and rewind, and that leaves without a copy.

    Of a ``bytes`` object botocore makes a ``BytesIO``, whose bytes aiohttp copies twice.

    Args:
        memory: Format ``B``, contiguous; must not change until the request has ended.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._position = 0

    @property
    def memory(self) -> memoryview:
        """The whole."""
        return self._memory

    def __len__(self) -> int:
        return len(self._memory)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes before the next read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the place of the next read.

        Raises:
            ValueError: The place lies before the beginning.
        """
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self)}[whence]
        if origin + offset < 0:
            raise ValueError(f"cannot seek to byte {origin + offset} of a body")
        self._position = origin + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Copy the next bytes out; for hashing, where a user turned that on."""
        stop = len(self) if size is None or size < 0 else self._position + size
        found = bytes(self._memory[self._position : stop])
        self._position += len(found)
        return found

    async def slices(self) -> AsyncIterator[memoryview]:
        """The whole, slice by slice, without a copy."""
        for start in range(0, len(self), _SLICE_BYTES):
            yield self._memory[start : start + _SLICE_BYTES]
