"""One rank's share of a save: its chunks into data files, with digests taken before they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.data_file import ChunkHeader, header_bytes
from dcp_resume.format.digests import DigestAlgorithm, block_bounds, digest_blocks
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.plans import RankPlan, unpad_box
from dcp_resume.session.staging import BufferPool, StagedFile, borrow_chunks, stage_chunks
from dcp_resume.storage import ObjectStore

__all__ = ["ChunkSource", "RankReport", "RankSource", "StagedRank", "stage_rank", "write_rank"]

_REPORT_MAGIC = b"DCPRREPT"


class ChunkSource(Protocol):
    """Where a rank's plan finds its bytes."""

    def chunk(self, plan: RankPlan, row: int, key: str) -> tuple[torch.Tensor, ChunkHeader]:
        """The memory of one planned chunk, and its line in the file's header."""


@dataclass(frozen=True, slots=True)
class RankSource:
    """The bytes of a rank's described state."""

    tensors: Sequence[HeldTensor]
    """In the order of the rank's structure."""
    per_rank_leaves: dict[str, bytes]
    """Part → packed per-rank values; their entries follow the tensors in the structure."""

    def chunk(self, plan: RankPlan, row: int, key: str) -> tuple[torch.Tensor, ChunkHeader]:
        """The memory of one planned chunk, and its line in the file's header."""
        local = int(plan.tensor[row])
        if local < 0:
            return _leaves_chunk(plan, row, key, plan.inline[key])
        if local >= len(self.tensors):
            part = list(self.per_rank_leaves)[local - len(self.tensors)]
            return _leaves_chunk(plan, row, key, self.per_rank_leaves[part])
        held = self.tensors[local]
        entry = held.entry
        is_stacked = entry.kind == "per_rank"
        ndim = len(entry.global_shape) + is_stacked
        box = unpad_box(plan.offsets[row], plan.sizes[row], ndim)
        view = held.pieces[0].memory.unsqueeze(0) if is_stacked else held.view(box)
        return view, ChunkHeader(key, entry.dtype, box.sizes, box.offsets)


def _leaves_chunk(
    plan: RankPlan, row: int, key: str, data: bytes
) -> tuple[torch.Tensor, ChunkHeader]:
    box = unpad_box(plan.offsets[row], plan.sizes[row], 1)
    view = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return view, ChunkHeader(key, "uint8", box.sizes, box.offsets)


@dataclass(slots=True)
class StagedRank:
    """A rank's data files, ready to be written."""

    names: list[str]
    headers: list[bytes]
    files: list[StagedFile]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.headers)) + sum(sum(file.lengths) for file in self.files)

    def release(self) -> None:
        """Give every buffer back."""
        for file in self.files:
            file.release()


def stage_rank(plan: RankPlan, source: ChunkSource, pool: BufferPool | None) -> StagedRank:
    """Collect the chunks of the plan.

    Args:
        plan: What to write.
        source: The rank's memory.
        pool: Buffers to copy into; None to use the tensors' own memory, which must then stay as it
            is until the files are written.
    """
    keys = [key for file in plan.files for key in file.keys]
    views: list[list[torch.Tensor]] = [[] for _ in plan.files]
    lines: list[list[ChunkHeader]] = [[] for _ in plan.files]
    for row, (file, key) in enumerate(zip(plan.file.tolist(), keys, strict=True)):
        view, line = source.chunk(plan, row, key)
        views[file].append(view)
        lines[file].append(line)
    return StagedRank(
        names=[file.name for file in plan.files],
        headers=[header_bytes(headers) for headers in lines],
        files=[borrow_chunks(v) if pool is None else stage_chunks(v, pool) for v in views],
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

    def to_bytes(self) -> bytes:
        """Serialise for the coordinator."""
        return pack_columns(
            _REPORT_MAGIC,
            {
                "sizes": self.sizes,
                "header_sizes": self.header_sizes,
                "num_blocks": self.num_blocks,
                "digests": self.digests.reshape(-1),
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
        }
        _, columns = unpack_columns(_REPORT_MAGIC, data, "rank report", schema)
        return cls(
            sizes=columns["sizes"],
            header_sizes=columns["header_sizes"],
            num_blocks=columns["num_blocks"],
            digests=columns["digests"].reshape(-1, 16),
        )


def write_rank(
    staged: StagedRank,
    store: ObjectStore,
    prefix: str,
    block_size: int,
    algorithm: DigestAlgorithm = DigestAlgorithm.XXH3,
) -> RankReport:
    """Write a rank's data files, and give their buffers back.

    Raises:
        StorageError: The store refused a file; those already written stay, as litter of an attempt
            that never commits.
    """
    sizes: list[int] = []
    blocks: list[int] = []
    digests: list[bytes] = []
    for name, header, file in zip(staged.names, staged.headers, staged.files, strict=True):
        bounds = block_bounds(len(header), np.asarray(file.lengths, np.int64), block_size)
        buffers = [memoryview(header), *file.buffers]
        digest = digest_blocks(bounds, buffers, algorithm)
        sizes.append(store.write(prefix + name, buffers))
        blocks.append(len(digest) // 16)
        digests.append(digest)
        file.release()
    return RankReport(
        sizes=np.asarray(sizes, np.int64),
        header_sizes=np.asarray([len(header) for header in staged.headers], np.int64),
        num_blocks=np.asarray(blocks, np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
    )
