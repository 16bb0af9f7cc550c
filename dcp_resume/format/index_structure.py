"""What a chunk index says of tensors and files, whatever their bytes are, and whether it is true.

A run saves one structure hundreds of times: what is worked out here is worked out once for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import Problem
from dcp_resume.format.box_table import MAX_TOTAL_BYTES, shape_fault
from dcp_resume.format.chunk_index import UNUSED, ChunkIndex
from dcp_resume.format.digests import BlockRule
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.tiling import tiling_faults
from dcp_resume.manifest.models import TensorEntry

__all__ = ["MAX_REPORTED", "IndexStructure"]

Int64s: TypeAlias = npt.NDArray[np.int64]

MAX_REPORTED = 50
"""Most problems of one kind that are spelled out."""


@dataclass(frozen=True, eq=False)
class IndexStructure:
    """The chunks of an index, and the tensors that they are of."""

    index: ChunkIndex
    """Its digests do not matter here."""
    tensors: tuple[TensorEntry, ...]
    """Of the catalog; their digests do not matter here."""
    keys: Sequence[str]
    """Of the files, for messages."""

    @cached_property
    def id_problems(self) -> tuple[Problem, ...]:
        """Tensors that are not read, and chunks of none."""
        chunk_tensor = self.index.chunk_tensor
        problems = [
            Problem(entry.fqn, "tensor", message)
            for entry in self.tensors
            if (message := shape_fault(entry.global_shape, ITEMSIZES.get(entry.dtype)))
        ]
        is_alias = np.array([entry.kind == "alias" for entry in self.tensors] + [False])
        unknown = (chunk_tensor >= len(self.tensors)) & (chunk_tensor != UNUSED)
        aliased = is_alias[self._tensor_row] if is_alias.any() else np.zeros(0, bool)
        problems += self.report(np.flatnonzero(unknown), "id", "has an unknown tensor id")
        what = "belongs to an alias, which has no bytes"
        problems += self.report(np.flatnonzero(aliased), "alias", what)
        return tuple(problems)

    @cached_property
    def box_problems(self) -> tuple[Problem, ...]:
        """Chunks that do not lie in their tensors; after ``id_problems``."""
        index, row = self.index, self._tensor_row
        shapes = [entry.global_shape for entry in self.tensors] + [(2**63 - 1,)]
        ndim = np.array([len(shape) for shape in shapes])
        unequal = index.box_ndim[index.chunk_box] != ndim[row]
        what = "has another number of dimensions"
        problems = self.report(np.flatnonzero(unequal), "ndim", what)
        outside = np.zeros(len(row), bool)
        for dim in range(index.box_offsets.shape[1]):
            extent = np.array([shape[dim] if dim < len(shape) else 1 for shape in shapes])
            # By subtraction: the sum of a hostile offset and size would overflow.
            room = extent[row] - index.box_sizes[:, dim][index.chunk_box]
            outside |= (room < 0) | (index.box_offsets[:, dim][index.chunk_box] > room)
        what = "reaches out of its tensor"
        problems += self.report(np.flatnonzero(outside & ~unequal), "bounds", what)
        claimed = np.append(np.asarray(self._itemsizes, float), 1.0)
        volume = np.prod(index.box_sizes, axis=1, dtype=np.float64)[index.chunk_box]
        if not problems and (volume * claimed[row]).sum() > MAX_TOTAL_BYTES:
            message = f"chunks of more than {MAX_TOTAL_BYTES} bytes in all"
            problems = [Problem("chunk-index", "size", message)]
        return tuple(problems)

    @cached_property
    def tiling_problems(self) -> tuple[Problem, ...]:
        """Tensors that their chunks do not cover exactly once; after ``box_problems``."""
        index = self.index
        used = np.flatnonzero(index.chunk_tensor != UNUSED)
        faults = tiling_faults(
            index.chunk_tensor[used].astype(np.int64),
            index.chunk_box[used],
            index.box_offsets,
            index.box_sizes,
            [None if entry.kind == "alias" else entry.global_shape for entry in self.tensors],
        )
        return tuple(
            Problem(
                self.tensors[fault.tensor].fqn,
                fault.kind,
                " and ".join([*(self._name(used[c]) for c in fault.chunks), fault.message]),
            )
            for fault in faults[:MAX_REPORTED]
        )

    @cached_property
    def unused(self) -> Int64s:
        """int64[n]: chunks that are passed over."""
        return np.flatnonzero(self.index.chunk_tensor == UNUSED)

    @cached_property
    def file_bytes(self) -> Int64s:
        """int64[F]: bytes of the chunks of each file; after ``box_problems``."""
        ends = np.append(0, np.cumsum(self._chunk_bytes))
        return np.diff(ends[self.index.file_first_chunk])

    def file_blocks(self, block_size: int) -> Int64s:
        """int64[F]: blocks of the chunks of each file; after ``box_problems``."""
        known = self._file_blocks
        if block_size not in known:
            counts = self.index.file_chunk_count
            blocks = BlockRule(block_size).cut(
                np.zeros(len(counts), np.int64), counts.astype(np.int64), self._chunk_bytes
            )
            known.clear()
            known[block_size] = np.diff(blocks.first)
        return known[block_size]

    @cached_property
    def _file_blocks(self) -> dict[int, Int64s]:
        return {}

    @property
    def _chunk_bytes(self) -> Int64s:
        return self.index.chunk_bytes(self._itemsizes)

    @property
    def _itemsizes(self) -> list[int]:
        return [ITEMSIZES[entry.dtype] for entry in self.tensors]

    @property
    def _tensor_row(self) -> npt.NDArray[np.uint32]:
        """The tensor of each chunk, for one of none the row behind the last."""
        return np.minimum(self.index.chunk_tensor, np.uint32(len(self.tensors)))

    def report(self, chunks: Int64s, kind: str, what: str) -> list[Problem]:
        """Problems of some chunks, of the same kind."""
        problems = [
            Problem(self._fqn(chunk), kind, f"{self._name(chunk)} {what}")
            for chunk in chunks[:MAX_REPORTED].tolist()
        ]
        if len(chunks) > MAX_REPORTED:
            more = f"{len(chunks) - MAX_REPORTED} more chunks: {what}"
            problems.append(Problem("chunk-index", kind, more))
        return problems

    def _name(self, chunk: int) -> str:
        return f"chunk {chunk} (in {self.keys[int(self.index.chunk_file[chunk])]})"

    def _fqn(self, chunk: int) -> str:
        tensor = int(self.index.chunk_tensor[chunk])
        return self.tensors[tensor].fqn if tensor < len(self.tensors) else "chunk-index"
