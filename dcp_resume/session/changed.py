"""One rank's share of a save that refers to files of its parent: only changed chunks are written.

Planned files do not bind here: what is written lies in ``.part`` files, one a part for chunks that
changed, and one for those that did not but whose old file would be kept for little. So the second
is kept whole by later saves.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.events import ChangesWritten, emit
from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.data_file import header_bytes
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.planning.files import file_names
from dcp_resume.planning.plans import chunk_key
from dcp_resume.session.attempt import Order
from dcp_resume.session.placed_files import PlacedChunk
from dcp_resume.session.staging import StagedFile
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.unchanged import ChunkId, StoredChunk, StoredFile, chunk_digest
from dcp_resume.session.writing import RankReport, StagedRank, write_rank
from dcp_resume.storage import ObjectStore

__all__ = ["LEAST_USED", "ChangedChunks", "Division", "write_all", "write_changed"]

I64 = npt.NDArray[np.int64]

LEAST_USED = 0.5
"""A file is referred to if the rank needs at least this share of its bytes."""
_MAGIC = b"DCPRDIVI"


@dataclass(frozen=True, slots=True)
class Division:
    """Which planned chunks a rank wrote where, and where the others lie. Rows are its own."""

    names: tuple[str, ...]
    """Of the files written."""
    parts: tuple[str, ...]
    """Of the files written."""
    counts: I64
    """``[files]`` chunks of each."""
    rows: I64
    """``[written]`` planned chunk, by file and position."""
    referred: I64
    """``[k, 3]`` planned chunk, number of its file in ``bases``, position in that file."""
    bases: tuple[tuple[str, str], ...]
    """Base and key of the parent's files."""

    def to_bytes(self) -> bytes:
        """Serialise for the coordinator."""
        meta = json.dumps([self.names, self.parts, self.bases]).encode()
        columns: dict[str, npt.NDArray[Any]] = {
            "counts": self.counts,
            "rows": self.rows,
            "referred": self.referred,
            "meta": np.frombuffer(meta, np.uint8),
        }
        return pack_columns(_MAGIC, columns, {})

    @classmethod
    def from_bytes(cls, data: bytes) -> Division:
        """Read what ``to_bytes`` wrote.

        Raises:
            InvalidDocument: The bytes are no such table.
        """
        schema = {
            "counts": ("i8", ()),
            "rows": ("i8", ()),
            "referred": ("i8", (3,)),
            "meta": ("u1", ()),
        }
        _, columns = unpack_columns(_MAGIC, data, "division of a rank", schema)
        names, parts, bases = json.loads(columns["meta"].tobytes())
        return cls(
            tuple(names),
            tuple(parts),
            columns["counts"],
            columns["rows"],
            columns["referred"],
            tuple((base, key) for base, key in bases),
        )


@dataclass(frozen=True, slots=True)
class ChangedChunks:
    """What a rank reports, and what it remembers if the save commits."""

    report: RankReport
    division: Division
    """Of a save that is written in full: empty."""
    chunks: Mapping[ChunkId, StoredChunk]


@dataclass(frozen=True, slots=True)
class _Row:
    """One planned chunk, staged."""

    number: int
    part: str
    chunk: PlacedChunk
    data: memoryview
    digest: bytes

    @property
    def identity(self) -> ChunkId:
        line = self.chunk.line
        return ChunkId(self.chunk.fqn, line.dtype, line.offsets, line.sizes)


def _rows(staged: StagedRank, order: Order) -> Iterator[_Row]:
    number = 0
    for part, file, chunks in zip(staged.parts, staged.files, staged.chunks, strict=True):
        for chunk, data in zip(chunks, file.chunks(), strict=True):
            digest = chunk_digest(data, order.block_size, order.algorithm)
            yield _Row(number, part, chunk, data, digest)
            number += 1


def write_all(staged: StagedRank, store: ObjectStore, order: Order) -> ChangedChunks:
    """Write every chunk as planned, and note what it is known by.

    Raises:
        StorageError: The store refused a file.
    """
    rows = list(_rows(staged, order))
    counts = [len(chunks) for chunks in staged.chunks]
    report = write_rank(
        staged, store, order.prefix, order.block_size, order.algorithm, order.tensor_digests
    )
    chunks = _places(rows, staged.names, counts, order)
    none = np.zeros(0, np.int64)
    division = Division((), (), none, none, np.zeros((0, 3), np.int64), ())
    return ChangedChunks(report, division, chunks)


def write_changed(
    staged: StagedRank,
    store: ObjectStore,
    order: Order,
    known: Mapping[ChunkId, StoredChunk],
    rank: int,
) -> ChangedChunks:
    """Write the chunks that the parent does not have, and say where the others are.

    Args:
        staged: The planned chunks.
        store: Root of the run.
        order: Of the coordinator.
        known: Chunks of the parent, under digests of the order's rule.
        rank: Of this process.

    Raises:
        StorageError: The store refused a file.
    """
    rows = list(_rows(staged, order))
    same = {
        row.number: stored
        for row in rows
        if (stored := known.get(row.identity)) is not None and stored.digest == row.digest
    }
    used: dict[StoredFile, int] = defaultdict(int)
    for number, stored in same.items():
        used[stored.file] += len(rows[number].data)
    referred = {
        number: stored
        for number, stored in same.items()
        if used[stored.file] >= LEAST_USED * stored.file.data_bytes
    }
    groups: dict[tuple[str, bool], list[_Row]] = defaultdict(list)
    for row in rows:
        if row.number not in referred:
            groups[row.part, row.number in same].append(row)
    written = _regroup(groups, rank)
    counts = [len(chunks) for chunks in written.chunks]
    ordered = [row for key in sorted(groups) for row in _by_width(groups[key])]
    report = write_rank(written, store, order.prefix, order.block_size, order.algorithm)
    if order.tensor_digests is TensorDigests.RECORD:
        sums = [row.chunk.digest(row.data) for row in rows]
        pairs = np.asarray([(s.total, s.squares) for s in sums], np.uint64).reshape(-1, 2)
        report = replace(report, position_sums=pairs)
    num_referred = sum(len(rows[number].data) for number in referred)
    emit(
        ChangesWritten(
            step=order.step,
            rank=rank,
            written_bytes=int(report.sizes.sum()),
            referenced_bytes=num_referred,
        )
    )
    places = {rows[number].identity: stored for number, stored in referred.items()}
    bases = {file: n for n, file in enumerate({s.file: None for s in referred.values()})}
    table = [(number, bases[s.file], s.position) for number, s in referred.items()]
    division = Division(
        names=tuple(written.names),
        parts=tuple(written.parts),
        counts=np.asarray(counts, np.int64),
        rows=np.asarray([row.number for row in ordered], np.int64),
        referred=np.asarray(table, np.int64).reshape(-1, 3),
        bases=tuple((file.base, file.key) for file in bases),
    )
    places.update(_places(ordered, written.names, counts, order))
    return ChangedChunks(report, division, places)


def _by_width(rows: Sequence[_Row]) -> list[_Row]:
    """Wide dtypes first, so that every chunk begins at a multiple of its item size."""
    return sorted(rows, key=lambda row: -ITEMSIZES[row.chunk.line.dtype])


def _regroup(groups: Mapping[tuple[str, bool], Sequence[_Row]], rank: int) -> StagedRank:
    """One file for each group of chunks, without their buffers: those return with the plan's."""
    part_names = sorted({part for part, _ in groups})
    headers, parts = list[bytes](), list[str]()
    files, placed = list[StagedFile](), list[list[PlacedChunk]]()
    heads: list[tuple[int, int, int, int]] = []
    for part, is_same in sorted(groups):
        rows = _by_width(groups[part, is_same])
        ordinals: dict[str, int] = defaultdict(int)
        chunks: list[PlacedChunk] = []
        for row in rows:
            fqn = row.chunk.fqn
            line = replace(row.chunk.line, key=chunk_key(fqn, ordinals[fqn]))
            ordinals[fqn] += 1
            chunks.append(replace(row.chunk, line=line))
        number = part_names.index(part)
        heads.append((rank, number, 1, parts.count(part)))
        parts.append(part)
        headers.append(header_bytes([chunk.line for chunk in chunks]))
        views = [row.data for row in rows]
        files.append(StagedFile(views, [len(view) for view in views]))
        placed.append(chunks)
    names = file_names(np.asarray(heads, np.int64).reshape(-1, 4), part_names)
    return StagedRank(names, parts, headers, files, placed)


def _places(
    rows: Sequence[_Row], names: Sequence[str], counts: Sequence[int], order: Order
) -> dict[ChunkId, StoredChunk]:
    """Where chunks lie that were just written, in the order of files and positions."""
    places: dict[ChunkId, StoredChunk] = {}
    first = 0
    for name, count in zip(names, counts, strict=True):
        own = rows[first : first + count]
        file = StoredFile(order.prefix.rstrip("/"), name, sum(len(row.data) for row in own))
        for position, row in enumerate(own):
            places[row.identity] = StoredChunk(row.digest, file, position)
        first += count
    return places
