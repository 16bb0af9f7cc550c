"""One rank's share of a save: its chunks into data files, digested from the same memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dcp_resume.events import FileWritten, emit
from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.digests import DIGEST_BYTES, DigestAlgorithm, block_bounds, digest_blocks
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.streamed_digests import StreamedDigests
from dcp_resume.planning.plans import RankPlan
from dcp_resume.session.chunk_sources import ChunkSource
from dcp_resume.session.copies import Copies
from dcp_resume.session.placed_files import PlacedChunk
from dcp_resume.session.staging import StagedFile, Staging
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.storage import ObjectStore, Streaming
from dcp_resume.storage.cpu_time import moving_cpu_s

__all__ = [
    "RankReport",
    "StagedRank",
    "file_report",
    "stage_rank",
    "write_rank",
]

_REPORT_MAGIC = b"DCPRREPT"


def _no_sums() -> npt.NDArray[np.uint64]:
    """The sums of no chunk."""
    return np.zeros((0, 2), np.uint64)


@dataclass(slots=True)
class StagedRank:
    """A rank's data files, ready to be written."""

    names: Sequence[str]
    parts: Sequence[str]
    headers: Sequence[bytes]
    files: Sequence[StagedFile]
    chunks: Sequence[Sequence[PlacedChunk]]
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
    staging: Staging,
    copies: Copies,
) -> StagedRank:
    """Collect the chunks of the plan.

    Args:
        plan: What to write.
        source: The rank's memory.
        staging: Where its bytes are until the files are written.
        copies: How they get there; closed by this, so that the caller has only to finish them.
    """
    placed, memory = source.collect(plan)
    files: list[StagedFile] = []
    first = 0
    for chunks in placed.chunks:
        views = memory[first : first + len(chunks)]
        first += len(chunks)
        files.append(staging.stage(views, copies))
    copies.close()
    return StagedRank(placed.names, placed.parts, placed.headers, files, placed.chunks)


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
        sums: list[PositionDigest] = []
        if tensor_digests is TensorDigests.RECORD:
            sums = [c.digest(data) for c, data in zip(chunks, file.chunks(), strict=True)]
        started = time.monotonic()
        buffers = [memoryview(header), *file.buffers]
        size, digest = _write_file(store, prefix + name, buffers, bounds, algorithm)
        duration_s = time.monotonic() - started
        cpu_s = moving_cpu_s() - cpu_s
        emit(FileWritten(key=prefix + name, num_bytes=size, duration_s=duration_s, cpu_s=cpu_s))
        reports.append(file_report(size, len(header), digest, sums))
        file.release()
    return RankReport.joined(reports)


def _write_file(
    store: ObjectStore,
    key: str,
    buffers: Sequence[memoryview],
    bounds: npt.NDArray[np.int64],
    algorithm: DigestAlgorithm,
) -> tuple[int, bytes]:
    """Write one file; its size, and the digests of its blocks."""
    if not isinstance(store, Streaming):
        digests = digest_blocks(bounds, buffers, algorithm)
        return store.write(key, buffers), digests
    passing = StreamedDigests(bounds, algorithm)
    windows = _digested(buffers, store.write_bytes, passing)
    return store.write(key, windows, size=int(bounds[-1])), passing.finish()


def _digested(
    buffers: Sequence[memoryview], length: int, digests: StreamedDigests
) -> Iterator[memoryview]:
    """Pass the bytes of a file by in windows, and digest each while it is in the cache."""
    for buffer in buffers:
        for begin in range(0, len(buffer), length):
            window = buffer[begin : begin + length]
            yield window
            digests.update(window)


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
