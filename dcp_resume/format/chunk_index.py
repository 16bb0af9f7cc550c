"""The chunk index: every chunk's tensor and box, and every block's digest, as columns.

Chunks are sorted by file and position, so where a chunk lies is derived, not stored.

F files, C chunks, B distinct boxes, N blocks; D is the largest number of dimensions of a box.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.box_table import (
    MAX_TOTAL_BYTES,
    box_table_fault,
    decode_boxes,
    encode_boxes,
    shape_fault,
)
from dcp_resume.format.columns import Schema, pack_columns, unpack_columns
from dcp_resume.format.digests import BlockRule, DigestAlgorithm, FileBlocks, fold
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.tiling import tiling_faults
from dcp_resume.manifest.models import Catalog, Manifest

__all__ = ["INDEX_MAGIC", "UNUSED", "ChunkIndex", "check_index"]

Int64s: TypeAlias = npt.NDArray[np.int64]

INDEX_MAGIC = b"DCPRIDX1"
UNUSED = 2**32 - 1
"""Tensor id of a chunk that lies in an ancestor's file and that this checkpoint does not use. Its
box is ``(0,), (bytes,)``: it keeps the places and blocks of the chunks behind it derivable."""

MAX_REPORTED = 50
"""Most problems of one kind that are spelled out."""

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
    ) -> ChunkIndex:
        """Make an index of chunks sorted by file and position; equal chunks give equal columns.

        Args:
            file_chunk_count: int[F].
            chunk_tensor: int[C].
            offsets: int64[C, D]; 0 beyond a chunk's dimensions.
            sizes: int64[C, D]; 1 beyond a chunk's dimensions.
            ndims: int[T], dimensions of each tensor of the catalog.
            block_digest: u8[N, 16].
        """
        tensors = np.asarray(chunk_tensor, np.uint32)
        ndim = np.append(np.asarray(ndims, np.int64), 1)
        chunk_ndim = ndim[np.minimum(tensors, len(ndim) - 1)]
        box_ndim, box_values, chunk_box = encode_boxes(chunk_ndim, offsets, sizes)
        return cls(
            np.asarray(file_chunk_count, np.uint32),
            tensors,
            chunk_box,
            box_ndim,
            box_values,
            np.asarray(block_digest, np.uint8).reshape(-1, 16),
        )

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
        order, tensors = self._by_tensor
        begin, stop = np.searchsorted(tensors, np.array([tensor, tensor + 1], np.uint64))
        return order[begin:stop]

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


def check_index(index: ChunkIndex, catalog: Catalog, manifest: Manifest) -> list[Problem]:
    """Prove that an index describes exactly the tensors and files of the catalog.

    Five stages, each safe only after the one before: counts, ids, boxes, bytes and blocks, and
    that the chunks of each tensor cover it exactly once.

    Args:
        index: As read by ``from_bytes``.
        catalog: The catalog of the same checkpoint, digest proved.
        manifest: Its manifest.

    Returns:
        Every problem of the first stage that found any, with FQN, file key and chunk; empty if
        all is well.
    """
    check = _Check(index, catalog, manifest)
    for stage in (check.counts, check.ids, check.boxes, check.data, check.tiling):
        problems = stage()
        if problems:
            return problems
    return []


@dataclass(frozen=True)
class _Check:
    index: ChunkIndex
    catalog: Catalog
    manifest: Manifest

    def counts(self) -> list[Problem]:
        index, counts = self.index, self.manifest.counts
        pairs = {
            "tensors": (counts.tensors, len(self.catalog.tensors)),
            "files of the catalog": (counts.files, len(self.catalog.files)),
            "files": (counts.files, len(index.file_chunk_count)),
            "chunks": (counts.chunks, len(index.chunk_tensor)),
            "boxes": (counts.boxes, len(index.box_ndim)),
            "blocks": (counts.blocks, len(index.block_digest)),
        }
        return [
            Problem("chunk-index", "count", f"the manifest says {said} {name}, found {found}")
            for name, (said, found) in pairs.items()
            if said != found
        ]

    def ids(self) -> list[Problem]:
        index, tensors = self.index, self.catalog.tensors
        problems = [
            Problem(entry.fqn, "tensor", message)
            for entry in tensors
            if (message := shape_fault(entry.global_shape, ITEMSIZES.get(entry.dtype)))
        ]
        chunk_tensor = index.chunk_tensor
        is_alias = np.array([entry.kind == "alias" for entry in tensors] + [False])
        is_own = np.array([file.base == "self" for file in self.catalog.files], bool)
        is_unused = chunk_tensor == UNUSED
        unknown = (chunk_tensor >= len(tensors)) & ~is_unused
        aliased = is_alias[np.minimum(chunk_tensor, len(tensors))]
        wasted = is_unused & is_own[index.chunk_file]
        problems += self._report(unknown, "id", "has an unknown tensor id")
        problems += self._report(aliased, "alias", "belongs to an alias, which has no bytes")
        problems += self._report(wasted, "unused", "is unused in a file of our own")
        return problems

    def boxes(self) -> list[Problem]:
        index, row = self.index, np.minimum(self.index.chunk_tensor, len(self.catalog.tensors))
        shapes = [entry.global_shape for entry in self.catalog.tensors] + [(2**63 - 1,)]
        ndim = np.array([len(shape) for shape in shapes])
        unequal = index.box_ndim[index.chunk_box] != ndim[row]
        problems = self._report(unequal, "ndim", "has another number of dimensions")
        outside = np.zeros(len(row), bool)
        for dim in range(index.box_offsets.shape[1]):
            extent = np.array([shape[dim] if dim < len(shape) else 1 for shape in shapes])
            # By subtraction: the sum of a hostile offset and size would overflow.
            room = extent[row] - index.box_sizes[index.chunk_box, dim]
            outside |= (room < 0) | (index.box_offsets[index.chunk_box, dim] > room)
        return problems + self._report(outside & ~unequal, "bounds", "reaches out of its tensor")

    def data(self) -> list[Problem]:
        index, files = self.index, self.catalog.files
        sizes = np.array([file.size for file in files], np.int64)
        headers = np.array([file.header_bytes for file in files], np.int64)
        itemsizes = [ITEMSIZES[entry.dtype] for entry in self.catalog.tensors]
        claimed = np.append(np.asarray(itemsizes, float), 1.0)
        row = np.minimum(index.chunk_tensor, len(itemsizes))
        volume = np.prod(index.box_sizes, axis=1, dtype=np.float64)[index.chunk_box]
        if max((volume * claimed[row]).sum(), sizes.sum(dtype=float)) > MAX_TOTAL_BYTES:
            message = f"files or chunks of more than {MAX_TOTAL_BYTES} bytes in all"
            return [Problem("chunk-index", "size", message)]
        ends = np.append(0, np.cumsum(index.chunk_bytes(itemsizes)))
        held = np.diff(ends[index.file_first_chunk])
        problems = [
            Problem(
                files[f].key,
                "size",
                f"is {sizes[f]} bytes, chunks hold {held[f]} behind a header of {headers[f]}",
            )
            for f in np.flatnonzero(sizes - headers != held)[:MAX_REPORTED].tolist()
        ]
        return problems or self._block_digests(itemsizes, headers)

    def _block_digests(self, itemsizes: list[int], headers: Int64s) -> list[Problem]:
        index, files, digests = self.index, self.catalog.files, self.index.block_digest
        algorithm = DigestAlgorithm(self.manifest.digest.algorithm)
        block_size = self.manifest.digest.block_size
        total = sum(file.size for file in files)
        # Before the blocks are laid out, which allocates for each of them.
        if total > len(digests) * block_size:
            message = f"{len(digests)} blocks of {block_size} do not cover {total} bytes"
            return [Problem("chunk-index", "blocks", message)]
        first = index.blocks(itemsizes, headers, block_size).first
        if first[-1] != len(digests):
            message = f"expected digests of {first[-1]} blocks, found {len(digests)}"
            return [Problem("chunk-index", "blocks", message)]
        return [
            Problem(file.key, "digest", f"the catalog says {file.digest}, its blocks {found}")
            for f, file in enumerate(files)
            if (found := fold(digests[first[f] : first[f + 1]].tobytes(), algorithm)) != file.digest
        ][:MAX_REPORTED]

    def tiling(self) -> list[Problem]:
        index, tensors = self.index, self.catalog.tensors
        used = np.flatnonzero(index.chunk_tensor != UNUSED)
        faults = tiling_faults(
            index.chunk_tensor[used].astype(np.int64),
            index.chunk_box[used],
            index.box_offsets,
            index.box_sizes,
            [None if entry.kind == "alias" else entry.global_shape for entry in tensors],
        )
        return [
            Problem(
                tensors[fault.tensor].fqn,
                fault.kind,
                " and ".join([*(self._place(used[c]) for c in fault.chunks), fault.message]),
            )
            for fault in faults[:MAX_REPORTED]
        ]

    def _place(self, chunk: int) -> str:
        key = self.catalog.files[int(self.index.chunk_file[chunk])].key
        return f"chunk {chunk} (in {key})"

    def _report(self, is_wrong: npt.NDArray[np.bool_], kind: str, what: str) -> list[Problem]:
        chunks = np.flatnonzero(is_wrong)
        problems = [
            Problem(self._fqn(chunk), kind, f"{self._place(chunk)} {what}")
            for chunk in chunks[:MAX_REPORTED].tolist()
        ]
        if len(chunks) > MAX_REPORTED:
            more = f"{len(chunks) - MAX_REPORTED} more chunks: {what}"
            problems.append(Problem("chunk-index", kind, more))
        return problems

    def _fqn(self, chunk: int) -> str:
        tensor = int(self.index.chunk_tensor[chunk])
        known = self.catalog.tensors
        return known[tensor].fqn if tensor < len(known) else "chunk-index"
