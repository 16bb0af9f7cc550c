"""What a rank remembers of the chunks that it saved last, so that only changed ones are written.

A chunk is unchanged if the parent has one of the same tensor, dtype and box with the same digest.
After a save all digests are known. After a resume those of the parent's index serve, which has one
for each block: so a chunk of less than a block, which shares its block with others, is written once
more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from dcp_resume.format.chunk_index import UNUSED
from dcp_resume.format.digests import (
    DigestAlgorithm,
    block_bounds,
    digest_blocks,
    digest_bytes,
)
from dcp_resume.manifest.history import RunHistory
from dcp_resume.session.opening import OpenedCheckpoint

__all__ = [
    "ChunkId",
    "ChunkMemory",
    "StoredChunk",
    "StoredFile",
    "Unchanged",
    "chunk_digest",
    "file_base",
    "stored_chunks",
]


class Unchanged(Enum):
    """What a save does with chunks that are as they were in the newest checkpoint."""

    WRITE = "write"
    """Each checkpoint has all its bytes in its own directory."""
    REFER = "refer"
    """Name the older checkpoint's file instead of writing them again."""


class ChunkId(NamedTuple):
    """What a chunk is, whatever its bytes are."""

    fqn: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class StoredFile(NamedTuple):
    """A data file of the run."""

    base: str
    """``step-…/<attempt>``, from the root."""
    key: str
    """Relative to the base."""
    data_bytes: int
    """Behind its header."""


class StoredChunk(NamedTuple):
    """Where a chunk lies, and what it is known by."""

    digest: bytes
    file: StoredFile
    position: int
    """Number in the file."""


def chunk_digest(data: memoryview, block_size: int, algorithm: DigestAlgorithm) -> bytes:
    """16 bytes over the digests of a chunk's blocks, cut from its start.

    Of a chunk of at least one block these are the blocks of its file, so that an index tells them.
    """
    bounds = block_bounds(0, np.asarray([len(data)], np.int64), block_size)
    return digest_bytes([digest_blocks(bounds, [data], algorithm)], algorithm)


def file_base(opened: OpenedCheckpoint, file: int) -> str:
    """The directory of a file, from the root of the run."""
    base = opened.catalog.files[file].base
    return opened.prefix.rstrip("/") if base == "self" else base


def stored_chunks(
    opened: OpenedCheckpoint, fqns: Collection[str], rank: int
) -> dict[ChunkId, StoredChunk]:
    """The chunks of some tensors whose digest a checkpoint's index tells: those of a block or more.

    Args:
        opened: The checkpoint.
        fqns: Of the tensors.
        rank: Whose chunks of per-rank tensors are meant.
    """
    index, catalog, block_size = opened.index, opened.catalog, opened.manifest.digest.block_size
    algorithm = DigestAlgorithm(opened.manifest.digest.algorithm)
    lengths = index.chunk_bytes(opened.itemsizes)
    is_asked = np.asarray([entry.fqn in fqns for entry in catalog.tensors] + [False], bool)
    row = np.minimum(index.chunk_tensor, len(catalog.tensors))
    is_large = (index.chunk_tensor != UNUSED) & (lengths >= block_size)
    found: dict[ChunkId, StoredChunk] = {}
    for chunk in np.flatnonzero(is_asked[row] & is_large).tolist():
        number = int(index.chunk_file[chunk])
        file, entry = catalog.files[number], catalog.tensors[int(row[chunk])]
        if entry.kind == "per_rank" and file.rank != rank:
            continue
        within = int(np.searchsorted(opened.block_bounds(number), opened.begins[chunk]))
        first = int(opened.blocks.first[number]) + within
        blocks = index.block_digest[first : first - int(-lengths[chunk] // block_size)]
        code, ndim = index.chunk_box[chunk], len(entry.global_shape)
        identity = ChunkId(
            entry.fqn,
            entry.dtype,
            tuple(index.box_offsets[code][:ndim].tolist()),
            tuple(index.box_sizes[code][:ndim].tolist()),
        )
        place = StoredFile(file_base(opened, number), file.key, file.size - file.header_bytes)
        digest = digest_bytes([blocks.tobytes()], algorithm)
        position = chunk - index.file_bounds(number)[0]
        found[identity] = StoredChunk(digest, place, position)
    return found


@dataclass(slots=True)
class ChunkMemory:
    """What one rank remembers of the last save that committed. It keeps no tensor alive."""

    seq: int = 0
    """Log number of that commit; 0 before the first."""
    rule: tuple[int, DigestAlgorithm] = (0, DigestAlgorithm.XXH3)
    """Block size and algorithm of the digests."""
    chunks: Mapping[ChunkId, StoredChunk] = field(default_factory=dict)
    opened: OpenedCheckpoint | None = None
    """Its documents; the coordinator's."""
    is_refused: bool = False
    """Whether the last attempt to refer to anything was refused; the coordinator's."""

    def parent_in(self, history: RunHistory) -> int:
        """The commit whose files a save may refer to, planned now; 0 to write in full.

        One that refers to a damaged checkpoint's files is of no use either.
        """
        newest = history.newest()
        if newest is None or self.is_refused:
            return 0
        are_damaged = not history.quarantined.keys().isdisjoint(newest.record.references)
        return 0 if are_damaged else newest.seq

    def keep(
        self,
        seq: int,
        rule: tuple[int, DigestAlgorithm],
        chunks: Mapping[ChunkId, StoredChunk],
        opened: OpenedCheckpoint | None,
    ) -> None:
        """Remember a save that committed instead of the last."""
        self.seq, self.rule, self.chunks, self.opened = seq, rule, chunks, opened
        self.is_refused = False
