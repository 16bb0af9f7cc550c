"""The chunk index: every chunk's tensor and box, and every block's digest, as columns.

Chunks are sorted by file and position, so where a chunk lies is derived, not stored.

F files, C chunks, B distinct boxes, N blocks; D is the largest number of dimensions of a box.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.box_table import (
    box_table_fault,
    decode_boxes,
    encode_boxes,
)
from dcp_resume.format.columns import Schema, pack_columns, unpack_columns
from dcp_resume.format.digests import BlockRule, FileBlocks

__all__ = ["INDEX_MAGIC", "UNUSED", "ChunkIndex"]

Int64s: TypeAlias = npt.NDArray[np.int64]

INDEX_MAGIC = b"DCPRIDX1"
UNUSED = 2**32 - 1
"""Tensor id of a chunk that lies in an ancestor's file and that this checkpoint does not use. Its
box is ``(0,), (bytes,)``: it keeps the places and blocks of the chunks behind it derivable."""

_SCHEMA: Schema = {
    "file_chunk_count": ("u4", ()),
    "chunk_tensor": ("u4", ()),
    "chunk_box": ("u4", ()),
    "box_ndim": ("u1", ()),
    "box_values": ("u8", ()),
    "block_digest": ("u1", (16,)),
}


@dataclass(frozen=True, eq=False)
class ChunkIndex:
    """The columns as they are stored; the rest is derived when asked for."""

    file_chunk_count: npt.NDArray[np.uint32]
    """u32[F]: chunks of each file."""
    chunk_tensor: npt.NDArray[np.uint32]
    """u32[C]: position of each chunk's tensor in the catalog, or ``UNUSED``."""
    chunk_box: npt.NDArray[np.uint32]
    """u32[C]: its box."""
    box_ndim: npt.NDArray[np.uint8]
    """u8[B]: dimensions of each box."""
    box_values: npt.NDArray[np.uint64]
    """u64[2 * sum(box_ndim)]: per box its offsets, then its sizes, in elements."""
    block_digest: npt.NDArray[np.uint8]
    """u8[N, 16]: raw digests of all blocks, by file and position."""

    @classmethod
    def build(
        cls,
        file_chunk_count: npt.ArrayLike,
        chunk_tensor: npt.ArrayLike,
        offsets: Int64s,
        sizes: Int64s,
        ndims: npt.ArrayLike,
        block_digest: npt.ArrayLike,
        chunk_box: npt.ArrayLike | None = None,
    ) -> ChunkIndex:
        """Make an index of chunks sorted by file and position; equal chunks give equal columns.

        Args:
            file_chunk_count: int[F].
            chunk_tensor: int[C].
            offsets: int64[B, D] of boxes; 0 beyond their dimensions.
            sizes: int64[B, D]; 1 beyond their dimensions.
            ndims: int[T], dimensions of each tensor of the catalog.
            block_digest: u8[N, 16].
            chunk_box: int[C], the box of each chunk; by default the one at its own place.
        """
        tensors = np.asarray(chunk_tensor, np.uint32)
        ndim = np.append(np.asarray(ndims, np.int64), 1)
        # One box is several if tensors of several numbers of dimensions have it.
        depth = int(ndim.max()) + 1
        key = np.arange(len(tensors)) if chunk_box is None else np.array(chunk_box, np.int64)
        key *= depth
        key += ndim[np.minimum(tensors, np.uint32(len(ndim) - 1))]
        is_used = np.zeros(len(offsets) * depth, bool)
        is_used[key] = True
        used = np.flatnonzero(is_used)
        box, box_depth = np.divmod(used, depth)
        box_ndim, box_values, code = encode_boxes(box_depth, offsets[box], sizes[box])
        code_of_key = np.zeros(len(is_used), np.uint32)
        code_of_key[used] = code
        return cls(
            np.asarray(file_chunk_count, np.uint32),
            tensors,
            code_of_key[key],
            box_ndim,
            box_values,
            np.asarray(block_digest, np.uint8).reshape(-1, 16),
        )

    def with_digests(self, block_digest: npt.NDArray[np.uint8]) -> ChunkIndex:
        """The same chunks, with the digests (u8[N, 16]) of their blocks."""
        return replace(self, block_digest=block_digest)

    def to_bytes(self) -> bytes:
        """The file ``chunk-index``."""
        columns = {name: getattr(self, name) for name in _SCHEMA}
        return pack_columns(INDEX_MAGIC, columns, {})

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, where: str) -> ChunkIndex:
        """Read an index whose columns fit together; the columns are views of ``data``.

        What the columns say is proved by ``check_index``; before that nothing may be derived.

        Raises:
            InvalidDocument: The table is malformed or its columns contradict each other.
        """
        _, columns = unpack_columns(INDEX_MAGIC, data, where, _SCHEMA)
        index = cls(**columns)
        problem = index._contradiction()
        if problem:
            found = Problem(where, "columns", problem)
            raise InvalidDocument(f"{where}: {problem}", problems=(found,))
        return index

    def _contradiction(self) -> str | None:
        if len(self.chunk_tensor) != len(self.chunk_box):
            return f"{len(self.chunk_tensor)} chunks have tensors, {len(self.chunk_box)} boxes"
        in_files = int(self.file_chunk_count.sum(dtype=np.uint64))
        if in_files != len(self.chunk_tensor):
            return f"files hold {in_files} chunks, {len(self.chunk_tensor)} are listed"
        if int(self.chunk_box.max(initial=0)) >= max(1, len(self.box_ndim)):
            return f"a chunk has box {self.chunk_box.max()}, {len(self.box_ndim)} are listed"
        if not np.bincount(self.chunk_box, minlength=len(self.box_ndim)).all():
            return "a box is listed that no chunk has"
        return box_table_fault(self.box_ndim, self.box_values)

    @cached_property
    def _boxes(self) -> tuple[Int64s, Int64s]:
        return decode_boxes(self.box_ndim, self.box_values)

    @property
    def box_offsets(self) -> Int64s:
        """int64[B, D], padded with 0."""
        return self._boxes[0]

    @property
    def box_sizes(self) -> Int64s:
        """int64[B, D], padded with 1."""
        return self._boxes[1]

    @property
    def chunk_offsets(self) -> Int64s:
        """int64[C, D], padded with 0."""
        return self.box_offsets[self.chunk_box]

    @property
    def chunk_sizes(self) -> Int64s:
        """int64[C, D], padded with 1."""
        return self.box_sizes[self.chunk_box]

    @cached_property
    def file_first_chunk(self) -> Int64s:
        """int64[F + 1]: each file's first chunk; the last entry is C."""
        return np.append(0, np.cumsum(self.file_chunk_count, dtype=np.int64))

    @cached_property
    def chunk_file(self) -> Int64s:
        """int64[C]: the file of each chunk."""
        return np.repeat(np.arange(len(self.file_chunk_count)), self.file_chunk_count)

    @cached_property
    def _by_tensor(self) -> tuple[Int64s, npt.NDArray[np.uint32]]:
        order = np.argsort(self.chunk_tensor, kind="stable")
        return order, self.chunk_tensor[order]

    def chunks_of(self, tensor: int) -> Int64s:
        """int64[n]: the chunks of a tensor, in the order of the index."""
        return self.chunks_of_each([tensor])[0]

    def chunks_of_each(self, tensors: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """The chunks of several tensors, end to end, and int64[T] how many each has."""
        order, by_tensor = self._by_tensor
        keys = np.asarray(tensors, np.uint64)
        begin = np.searchsorted(by_tensor, keys, side="left")
        count = np.searchsorted(by_tensor, keys, side="right") - begin
        before = np.cumsum(count) - count
        return order[np.repeat(begin - before, count) + np.arange(count.sum())], count

    def chunk_bytes(self, itemsizes: npt.ArrayLike) -> Int64s:
        """int64[C]: bytes of each chunk, from the bytes of an element of each tensor (int[T])."""
        sizes = np.append(np.asarray(itemsizes, np.int64), 1)
        volume = np.prod(self.box_sizes, axis=1, dtype=np.int64)
        itemsize = sizes[np.minimum(self.chunk_tensor, len(sizes) - 1)]
        length: Int64s = volume[self.chunk_box] * itemsize
        return length

    def chunk_begin(self, itemsizes: npt.ArrayLike, header_bytes: npt.ArrayLike) -> Int64s:
        """int64[C]: where each chunk begins in its file.

        Args:
            itemsizes: int[T], bytes of an element of each tensor.
            header_bytes: int[F], bytes before each file's first chunk.
        """
        length = self.chunk_bytes(itemsizes)
        begin = np.append(0, np.cumsum(length))
        headers = np.asarray(header_bytes, np.int64)
        shift = headers - begin[self.file_first_chunk[:-1]]
        chunk_begin: Int64s = begin[:-1] + shift[self.chunk_file]
        return chunk_begin

    def file_bounds(self, file: int) -> tuple[int, int]:
        """The first chunk of a file and the first behind it."""
        first = self.file_first_chunk
        return int(first[file]), int(first[file + 1])

    def blocks(
        self, itemsizes: npt.ArrayLike, header_bytes: npt.ArrayLike, block_size: int
    ) -> FileBlocks:
        """The blocks of all files; ``block_digest[b]`` is the digest of block ``b``.

        Args:
            itemsizes: int[T], bytes of an element of each tensor.
            header_bytes: int[F].
            block_size: Bytes, from the manifest.
        """
        headers = np.asarray(header_bytes, np.int64)
        counts = self.file_chunk_count.astype(np.int64)
        return BlockRule(block_size).cut(headers, counts, self.chunk_bytes(itemsizes))

    def tensors_in_block(
        self, file: int, block: int, *, blocks: FileBlocks, begins: Int64s
    ) -> list[int]:
        """Ids of the tensors that have bytes in a block; empty for a block of the header.

        Args:
            file: Number of the file.
            block: Number of the block in the file.
            blocks: From ``blocks``.
            begins: int64[C], from ``chunk_begin``.
        """
        start, stop = blocks.bounds(file)[block : block + 2]
        first, last = self.file_bounds(file)
        begin = begins[first:last]
        end = np.append(begin[1:], blocks.sizes[file])[: len(begin)]
        inside = (begin < stop) & (end > start) & (end > begin)
        tensors: list[int] = np.unique(self.chunk_tensor[first:last][inside]).tolist()
        return [tensor for tensor in tensors if tensor != UNUSED]
