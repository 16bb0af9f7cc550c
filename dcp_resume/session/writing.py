"""One rank's share of a save: its chunks into data files, with digests taken before they leave."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dcp_resume.events import FileWritten, emit
from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.data_file import ChunkHeader, header_bytes
from dcp_resume.format.digests import DIGEST_BYTES, DigestAlgorithm, block_bounds, digest_blocks
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.padding import logical_shape
from dcp_resume.planning.plans import RankPlan
from dcp_resume.planning.state import PER_RANK_LEAVES
from dcp_resume.session.box_digests import digest_row_major
from dcp_resume.session.copies import AtOnce, Copies
from dcp_resume.session.staging import BufferPool, StagedFile, borrow_chunks, stage_chunks
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.storage import ObjectStore
from dcp_resume.storage.cpu_time import moving_cpu_s

__all__ = [
    "ChunkSource",
    "PlacedChunk",
    "RankReport",
    "RankSource",
    "StagedRank",
    "file_report",
    "stage_rank",
    "write_rank",
]

_REPORT_MAGIC = b"DCPRREPT"


def _no_sums() -> npt.NDArray[np.uint64]:
    """The sums of no chunk."""
    return np.zeros((0, 2), np.uint64)


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """One planned chunk, without its bytes: its line of the header, and what it is cut from."""

    fqn: str
    line: ChunkHeader
    shape: tuple[int, ...] | None = None
    """Of the tensor that it is cut from, without padding; None where it is no part of one that the
    ranks share: packed values, a rank's own tensor."""

    def digest(self, data: memoryview) -> PositionDigest:
        """Its part of the tensor's digest, that of no element where there is no such tensor."""
        if self.shape is None:
            return PositionDigest()
        box = Box(self.line.offsets, self.line.sizes)
        return digest_row_major(data, ITEMSIZES[self.line.dtype], box, self.shape)


class ChunkSource(Protocol):
    """Where a rank's plan finds its bytes."""

    def chunks(self, plan: RankPlan) -> Iterator[tuple[torch.Tensor, PlacedChunk]]:
        """Each planned chunk's memory, and its place, in the order of the plan."""


@dataclass(frozen=True, slots=True)
class RankSource:
    """The bytes of a rank's described state."""

    tensors: Sequence[HeldTensor]
    """In the order of the rank's structure."""
    per_rank_leaves: Mapping[str, bytes]
    """Part → packed per-rank values; their entries follow the tensors in the structure."""

    def chunks(self, plan: RankPlan) -> Iterator[tuple[torch.Tensor, PlacedChunk]]:
        """Each planned chunk's memory, and its place, in the order of the plan."""
        own = list(self.per_rank_leaves.values())
        fqns = [held.entry.fqn for held in self.tensors]
        fqns += [PER_RANK_LEAVES + part for part in self.per_rank_leaves]
        for local, fqn, key, offsets, sizes in plan.rows(fqns):
            if local < 0:
                yield _leaves_chunk(fqn, key, offsets, sizes, plan.inline[key])
                continue
            if local >= len(self.tensors):
                data = own[local - len(self.tensors)]
                yield _leaves_chunk(fqn, key, offsets, sizes, data)
                continue
            held = self.tensors[local]
            entry = held.entry
            is_stacked = entry.kind == "per_rank"
            ndim = len(entry.global_shape) + is_stacked
            box = Box(tuple(offsets[:ndim]), tuple(sizes[:ndim]))
            line = ChunkHeader(key, entry.dtype, box.sizes, box.offsets)
            if is_stacked:
                yield held.pieces[0].memory.unsqueeze(0), PlacedChunk(fqn, line)
            else:
                yield held.view(box), PlacedChunk(fqn, line, logical_shape(entry))


def _leaves_chunk(
    fqn: str, key: str, offsets: Sequence[int], sizes: Sequence[int], data: bytes
) -> tuple[torch.Tensor, PlacedChunk]:
    view = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return view, PlacedChunk(fqn, ChunkHeader(key, "uint8", tuple(sizes[:1]), tuple(offsets[:1])))


@dataclass(slots=True)
class StagedRank:
    """A rank's data files, ready to be written."""

    names: list[str]
    parts: list[str]
    headers: list[bytes]
    files: list[StagedFile]
    chunks: list[list[PlacedChunk]]
    """Per file, in file order."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.headers)) + sum(sum(file.lengths) for file in self.files)

    def release(self) -> None:
        """Give every buffer back."""
        for file in self.files:
            file.release()


def stage_rank(
    plan: RankPlan,
    source: ChunkSource,
    pool: BufferPool | None,
    copies: Copies | None = None,
) -> StagedRank:
    """Collect the chunks of the plan.

    Args:
        plan: What to write.
        source: The rank's memory.
        pool: Buffers to copy into; None to use the tensors' own memory, which must then stay as it
            is until the files are written.
        copies: How to copy into them; by default at once.
    """
    copies = copies or AtOnce()
    views: list[list[torch.Tensor]] = [[] for _ in plan.files]
    chunks: list[list[PlacedChunk]] = [[] for _ in plan.files]
    for file, (view, chunk) in zip(plan.file.tolist(), source.chunks(plan), strict=True):
        views[file].append(view)
        chunks[file].append(chunk)
    return StagedRank(
        names=[file.name for file in plan.files],
        parts=[file.part for file in plan.files],
        headers=[header_bytes([chunk.line for chunk in own]) for own in chunks],
        files=[borrow_chunks(v) if pool is None else stage_chunks(v, pool, copies) for v in views],
        chunks=chunks,
    )


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank wrote."""

    sizes: npt.NDArray[np.int64]
    """``[files]`` bytes."""
    header_sizes: npt.NDArray[np.int64]
    """``[files]`` bytes before the first chunk."""
    num_blocks: npt.NDArray[np.int64]
    """``[files]``"""
    digests: npt.NDArray[np.uint8]
    """``[blocks, 16]``, file by file."""
    position_sums: npt.NDArray[np.uint64] = field(default_factory=_no_sums)
    """``[chunks, 2]`` each chunk's part of its tensor's digest, file by file; no rows where tensor
    digests are not recorded."""
    reached_us: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """``[3]`` as of ``Milestones.reported_us``, or ``[0]`` where nothing was measured."""

    def to_bytes(self) -> bytes:
        """Serialise for the coordinator."""
        return pack_columns(
            _REPORT_MAGIC,
            {
                "sizes": self.sizes,
                "header_sizes": self.header_sizes,
                "num_blocks": self.num_blocks,
                "digests": self.digests.reshape(-1),
                "position_sums": self.position_sums,
                "reached_us": self.reached_us,
            },
            {},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> RankReport:
        """Read what ``to_bytes`` wrote.

        Raises:
            InvalidDocument: The bytes are no report.
        """
        schema = {
            "sizes": ("i8", ()),
            "header_sizes": ("i8", ()),
            "num_blocks": ("i8", ()),
            "digests": ("u1", ()),
            "position_sums": ("u8", (2,)),
            "reached_us": ("i8", ()),
        }
        _, columns = unpack_columns(_REPORT_MAGIC, data, "rank report", schema)
        return cls(
            sizes=columns["sizes"],
            header_sizes=columns["header_sizes"],
            num_blocks=columns["num_blocks"],
            digests=columns["digests"].reshape(-1, 16),
            position_sums=columns["position_sums"],
            reached_us=columns["reached_us"],
        )

    @classmethod
    def joined(cls, reports: Sequence[RankReport]) -> RankReport:
        """One report of the files of several, in their order."""
        none = np.zeros(0, np.int64)
        return cls(
            sizes=np.concatenate([none, *(r.sizes for r in reports)]),
            header_sizes=np.concatenate([none, *(r.header_sizes for r in reports)]),
            num_blocks=np.concatenate([none, *(r.num_blocks for r in reports)]),
            digests=np.concatenate([np.zeros((0, 16), np.uint8), *(r.digests for r in reports)]),
            position_sums=np.concatenate([_no_sums(), *(r.position_sums for r in reports)]),
        )


def write_rank(
    staged: StagedRank,
    store: ObjectStore,
    prefix: str,
    block_size: int,
    algorithm: DigestAlgorithm = DigestAlgorithm.XXH3,
    tensor_digests: TensorDigests = TensorDigests.OMIT,
) -> RankReport:
    """Write a rank's data files, and give their buffers back.

    Raises:
        StorageError: The store refused a file; those already written stay, as litter of an attempt
            that never commits.
    """
    reports: list[RankReport] = []
    for name, header, file, chunks in zip(
        staged.names, staged.headers, staged.files, staged.chunks, strict=True
    ):
        cpu_s = moving_cpu_s()
        bounds = block_bounds(len(header), np.asarray(file.lengths, np.int64), block_size)
        buffers = [memoryview(header), *file.buffers]
        digest = digest_blocks(bounds, buffers, algorithm)
        sums: list[PositionDigest] = []
        if tensor_digests is TensorDigests.RECORD:
            sums = [c.digest(data) for c, data in zip(chunks, file.chunks(), strict=True)]
        started = time.monotonic()
        size = store.write(prefix + name, buffers)
        duration_s = time.monotonic() - started
        cpu_s = moving_cpu_s() - cpu_s
        emit(FileWritten(key=prefix + name, num_bytes=size, duration_s=duration_s, cpu_s=cpu_s))
        reports.append(file_report(size, len(header), digest, sums))
        file.release()
    return RankReport.joined(reports)


def file_report(
    size: int, header_size: int, digests: bytes, sums: Sequence[PositionDigest]
) -> RankReport:
    """The report of one written file.

    Args:
        size: Bytes of the file.
        header_size: Bytes before the first chunk.
        digests: Of its blocks, 16 bytes each.
        sums: Per chunk its part of the tensor's digest; none where they are not recorded.
    """
    return RankReport(
        sizes=np.asarray([size], np.int64),
        header_sizes=np.asarray([header_size], np.int64),
        num_blocks=np.asarray([len(digests) // DIGEST_BYTES], np.int64),
        digests=np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
        position_sums=np.asarray([(s.total, s.squares) for s in sums], np.uint64).reshape(-1, 2),
    )
