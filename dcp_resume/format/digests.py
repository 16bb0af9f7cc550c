"""Digests, and the rule that cuts a data file into the blocks that are digested.

The block rule. A file's header is a sequence of bytes of its own; so is each chunk of at least one
block size, and each longest run of consecutive smaller chunks. Every sequence is cut into blocks of
the block size, counted from its start; its last block is what remains. So a reshard, which begins
at chunk edges, reads few foreign bytes, and a large chunk keeps its digests wherever it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from dcp_resume.errors import CorruptData, Problem

__all__ = [
    "DIGEST_BYTES",
    "BlockRule",
    "DigestAlgorithm",
    "FileBlocks",
    "block_bounds",
    "check_digest",
    "choose_block_size",
    "digest_blocks",
    "digest_bytes",
    "digest_hex",
    "fold",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
Int64s: TypeAlias = npt.NDArray[np.int64]

DIGEST_BYTES = 16


class Hasher(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: Buffer, /) -> object:
        """Take more bytes."""

    def digest(self) -> bytes:
        """The digest of all bytes so far."""


class DigestAlgorithm(Enum):
    """How blocks, files and documents are digested; one for a whole checkpoint."""

    XXH3 = "xxh3-128"
    """Fast; proves against accidents, not against an adversary."""
    SHA256 = "sha256-128"
    """The first 128 bits of SHA-256: what a signature can rest on."""

    def new(self) -> Hasher:
        """An empty hasher; the first 16 bytes of its digest count."""
        return xxhash.xxh3_128() if self is DigestAlgorithm.XXH3 else hashlib.sha256()


MIN_BLOCK = 2**16
MAX_BLOCK = 2**24
MIN_BLOCK_OF_LARGE = 2**20
LARGE_BYTES = 2**26
DIGEST_BUDGET = 32 * 10**6
"""Bytes of all block digests of a checkpoint that the choice of block size aims to stay below."""


def digest_bytes(
    buffers: Iterable[Buffer], algorithm: DigestAlgorithm = DigestAlgorithm.XXH3
) -> bytes:
    """The 16 raw bytes (of xxHash the canonical, big-endian ones) over buffers laid end to end."""
    state = algorithm.new()
    for buffer in buffers:
        state.update(buffer)
    return state.digest()[:DIGEST_BYTES]


def digest_hex(data: Buffer, algorithm: DigestAlgorithm = DigestAlgorithm.XXH3) -> str:
    """The digest of exact bytes as documents spell it: ``xxh3-128:<32 hex digits>``."""
    return f"{algorithm.value}:{digest_bytes([data], algorithm).hex()}"


def check_digest(data: Buffer, expected: str, where: str) -> None:
    """Prove that bytes are the recorded ones.

    Args:
        data: The bytes as read.
        expected: ``algorithm:hex``.
        where: Key of the file, for messages.

    Raises:
        CorruptData: The digest differs, or its algorithm is unknown (kind ``algorithm``).
    """
    name = expected.partition(":")[0]
    known = name in {algorithm.value for algorithm in DigestAlgorithm}
    found = digest_hex(data, DigestAlgorithm(name) if known else DigestAlgorithm.XXH3)
    if found == expected:
        return
    message = f"expected digest {expected}, found {found} over {len(data)} bytes"
    problem = Problem(where, "digest" if known else "algorithm", message)
    raise CorruptData(f"{where}: {message}; use another checkpoint", problems=(problem,))


def fold(block_digests: Buffer, algorithm: DigestAlgorithm = DigestAlgorithm.XXH3) -> str:
    """One digest over block digests (16 raw bytes each, in order): the digest of a file."""
    if len(block_digests) % DIGEST_BYTES:
        raise ValueError(f"expected a multiple of 16 bytes, found {len(block_digests)}")
    return digest_hex(block_digests, algorithm)


def choose_block_size(total_bytes: int) -> int:
    """The block size for a checkpoint of ``total_bytes``.

    64 KiB below 64 MiB in all, where every read is small; else the smallest power of two from
    1 MiB to 16 MiB with ``16 * total_bytes / size`` ≤ 32 MB. Smaller blocks make ranged reads
    exact, larger ones keep the index small. Many chunks a little longer than a block can need up
    to three times as many digests as that quotient says.
    """
    if total_bytes < LARGE_BYTES:
        return MIN_BLOCK
    size = MIN_BLOCK_OF_LARGE
    while size < MAX_BLOCK and DIGEST_BYTES * total_bytes > DIGEST_BUDGET * size:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class FileBlocks:
    """The blocks of many files, end to end."""

    starts: Int64s
    """int64[N]: where each block starts in its file."""
    first: Int64s
    """int64[F + 1]: number of each file's first block; the last entry is N."""
    sizes: Int64s
    """int64[F]: bytes of each file."""

    def bounds(self, file: int) -> Int64s:
        """int64[n + 1]: starts of the blocks of one file, then its size."""
        own = self.starts[self.first[file] : self.first[file + 1]]
        return np.append(own, self.sizes[file])


@dataclass(frozen=True, slots=True)
class BlockRule:
    """The block rule for one block size in bytes."""

    block_size: int

    def cut(self, header_bytes: Int64s, chunk_counts: Int64s, chunk_lengths: Int64s) -> FileBlocks:
        """Cut many files at once.

        Args:
            header_bytes: int64[F], bytes before each file's first chunk.
            chunk_counts: int64[F], chunks of each file.
            chunk_lengths: int64[C], bytes of each chunk, by file and position.
        """
        num_files, counts = len(header_bytes), np.asarray(chunk_counts, np.int64)
        # Headers become rows of their own in front of each file's chunks.
        header_row = np.cumsum(counts + 1) - (counts + 1)
        lengths = np.empty(len(chunk_lengths) + num_files, np.int64)
        is_header = np.zeros(len(lengths), bool)
        is_header[header_row] = True
        lengths[is_header], lengths[~is_header] = header_bytes, chunk_lengths
        is_alone = is_header | (lengths >= self.block_size)
        ends = np.cumsum(lengths)
        file_start = ends[header_row] - lengths[header_row]
        file_of_row = np.repeat(np.arange(num_files), counts + 1)

        # A sequence opens at each row that is alone, and behind one.
        opens = np.flatnonzero(is_alone | np.append(True, is_alone)[:-1])
        begins = ends[opens] - lengths[opens]
        total = lengths.sum()
        num_blocks = -((begins - np.append(begins[1:], total)) // self.block_size)
        within = np.arange(num_blocks.sum()) - np.repeat(
            np.cumsum(num_blocks) - num_blocks, num_blocks
        )
        starts = np.repeat(begins - file_start[file_of_row[opens]], num_blocks)
        per_file = np.bincount(file_of_row[opens], num_blocks, num_files).astype(np.int64)
        return FileBlocks(
            starts + within * self.block_size,
            np.append(0, np.cumsum(per_file)).astype(np.int64),
            np.diff(np.append(file_start, total)).astype(np.int64),
        )


def block_bounds(header_bytes: int, chunk_lengths: Int64s, block_size: int) -> Int64s:
    """Where the blocks of one file lie.

    Args:
        header_bytes: Bytes before the first chunk.
        chunk_lengths: int64[C], bytes of each chunk in the file's order; empty ones make no block.
        block_size: Bytes.

    Returns:
        int64[n + 1], ascending: the start of each of n blocks, then the size of the file.
    """
    counts = np.array([len(chunk_lengths)])
    return BlockRule(block_size).cut(np.array([header_bytes]), counts, chunk_lengths).bounds(0)


def _pieces(buffers: Sequence[Buffer], stops: Iterable[int]) -> Iterator[list[memoryview]]:
    """For each ascending stop the views of what lies between it and the stop before."""
    # A view of no bytes cannot be cast.
    views = (memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes)
    rest = memoryview(b"")
    position = 0
    for stop in stops:
        taken: list[memoryview] = []
        while position < stop:
            rest = rest or next(views)
            piece = rest[: stop - position]
            rest = rest[len(piece) :]
            position += len(piece)
            taken.append(piece)
        yield taken


def digest_blocks(
    bounds: npt.NDArray[Any],
    buffers: Sequence[Buffer],
    algorithm: DigestAlgorithm = DigestAlgorithm.XXH3,
) -> bytes:
    """The digests of all blocks of a file that lies in memory in pieces.

    Args:
        bounds: int64[n + 1], from ``block_bounds``.
        buffers: Header, chunks, … in the file's order; not copied. Hashing large pieces releases
            the GIL.
        algorithm: Of the checkpoint.

    Returns:
        16 * n bytes.

    Raises:
        ValueError: The buffers do not have the file's size.
    """
    size = sum(memoryview(buffer).nbytes for buffer in buffers)
    if size != bounds[-1]:
        raise ValueError(f"expected buffers of {bounds[-1]} bytes in all, found {size}")
    stops: list[int] = bounds[1:].tolist()
    return b"".join(digest_bytes(pieces, algorithm) for pieces in _pieces(buffers, stops))
