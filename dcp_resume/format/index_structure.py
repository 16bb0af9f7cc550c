"""What a chunk index says of tensors and files, whatever their bytes are, and whether it is true.

A run saves one structure hundreds of times: what is worked out here is worked out once for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import Problem
from dcp_resume.format.box_table import MAX_TOTAL_BYTES, shape_fault
from dcp_resume.format.chunk_index import UNUSED, ChunkIndex
from dcp_resume.format.digests import BlockRule
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.tiling import TilingFault, tiling_faults
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
        index = self.index
        sample, tensor, box = self._samples
        unequal, outside = self._outside(tensor, box)
        if (unequal | outside).any():
            # By name, among all chunks.
            unequal, outside = self._outside(self._tensor_row, index.chunk_box)
            what = "has another number of dimensions"
            problems = self.report(np.flatnonzero(unequal), "ndim", what)
            what = "reaches out of its tensor"
            return (*problems, *self.report(np.flatnonzero(outside & ~unequal), "bounds", what))
        volume = np.prod(index.box_sizes, axis=1, dtype=np.float64)[box]
        held = np.bincount(tensor, volume, len(self.tensors) + 1)[sample]
        if held @ np.append(np.asarray(self._itemsizes, float), 1.0) > MAX_TOTAL_BYTES:
            message = f"chunks of more than {MAX_TOTAL_BYTES} bytes in all"
            return (Problem("chunk-index", "size", message),)
        return ()

    def _outside(
        self, tensor: npt.NDArray[Any], box: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Of chunks, which have not the dimensions of their tensors, and which are not in them."""
        index = self.index
        shapes = [entry.global_shape for entry in self.tensors] + [(2**63 - 1,)]
        ndim = np.array([len(shape) for shape in shapes])
        outside = np.zeros(len(tensor), bool)
        for dim in range(index.box_offsets.shape[1]):
            extent = np.array([shape[dim] if dim < len(shape) else 1 for shape in shapes])
            # By subtraction: the sum of a hostile offset and size would overflow.
            room = extent[tensor] - index.box_sizes[box, dim]
            outside |= (room < 0) | (index.box_offsets[box, dim] > room)
        return index.box_ndim[box] != ndim[tensor], outside

    @cached_property
    def tiling_problems(self) -> tuple[Problem, ...]:
        """Tensors that their chunks do not cover exactly once; after ``box_problems``."""
        sample, tensor, box = self._samples
        is_used = tensor < len(self.tensors)
        shapes = [s if sample[t] == t else None for t, s in enumerate(self._shapes)]
        if not self._tiling_faults(tensor[is_used], box[is_used], shapes):
            return ()
        used = np.flatnonzero(self.index.chunk_tensor != UNUSED)
        tensor = self.index.chunk_tensor[used].astype(np.int64)
        faults = self._tiling_faults(tensor, self.index.chunk_box[used], self._shapes)
        return tuple(
            Problem(
                self.tensors[fault.tensor].fqn,
                fault.kind,
                " and ".join([*(self._name(used[c]) for c in fault.chunks), fault.message]),
            )
            for fault in faults[:MAX_REPORTED]
        )

    def _tiling_faults(
        self,
        tensor: Int64s,
        box: npt.NDArray[Any],
        shapes: Sequence[tuple[int, ...] | None],
    ) -> list[TilingFault]:
        return tiling_faults(tensor, box, self.index.box_offsets, self.index.box_sizes, shapes)

    @cached_property
    def _samples(self) -> tuple[Int64s, Int64s, npt.NDArray[np.uint32]]:
        """Of each tensor the first one of its shape and boxes, and the chunks of these samples.

        What holds of the chunks of samples, by tensor and box, holds of all. Unused chunks are
        counted as those of one tensor more.
        """
        key = self._tensor_row.astype(np.uint64) << np.uint64(32)
        key |= self.index.chunk_box
        key.sort()
        box = key.astype(np.uint32)
        numbers = np.arange(len(self.tensors) + 2, dtype=np.uint64) << np.uint64(32)
        bounds = np.searchsorted(key, numbers).tolist()
        first: dict[tuple[tuple[int, ...] | None, bytes], int] = {}
        own = [box[start:stop] for start, stop in pairwise(bounds)]
        sample = [
            first.setdefault((shape, boxes.tobytes()), tensor)
            for tensor, (shape, boxes) in enumerate(zip((*self._shapes, None), own, strict=True))
        ]
        samples = list(first.values())
        tensors = np.repeat(samples, [len(own[tensor]) for tensor in samples])
        return np.asarray(sample), tensors, np.concatenate([own[tensor] for tensor in samples])

    @cached_property
    def unused(self) -> Int64s:
        """int64[n]: chunks that are passed over."""
        return np.flatnonzero(self.index.chunk_tensor == UNUSED)

    @cached_property
    def file_bytes(self) -> Int64s:
        """int64[F]: bytes of the chunks of each file; after ``box_problems``."""
        return self._per_file(self._chunk_bytes)

    def file_blocks(self, block_size: int) -> Int64s:
        """int64[F]: blocks of the chunks of each file; after ``box_problems``."""
        known = self._file_blocks
        if block_size not in known:
            known.clear()
            known[block_size] = self._count_blocks(block_size)
        return known[block_size]

    @cached_property
    def _file_blocks(self) -> dict[int, Int64s]:
        return {}

    def _count_blocks(self, block_size: int) -> Int64s:
        largest = np.prod(self.index.box_sizes, axis=1, dtype=float).max(initial=0)
        if largest * max(self._itemsizes, default=1) < block_size:
            return -(-self.file_bytes // block_size)  # the small chunks of a file lie end to end
        counts = self.index.file_chunk_count.astype(np.int64)
        headers = np.zeros(len(counts), np.int64)
        return np.diff(BlockRule(block_size).cut(headers, counts, self._chunk_bytes).first)

    def _per_file(self, of_chunks: npt.NDArray[Any]) -> Int64s:
        """int64[F]: sums of what chunks have."""
        first = self.index.file_first_chunk
        ends = np.append(0, np.cumsum(of_chunks, dtype=np.int64))
        return np.diff(ends[first])

    @property
    def _chunk_bytes(self) -> Int64s:
        return self.index.chunk_bytes(self._itemsizes)

    @property
    def _shapes(self) -> list[tuple[int, ...] | None]:
        """Of each tensor; None for an alias, which has no chunks."""
        return [None if entry.kind == "alias" else entry.global_shape for entry in self.tensors]

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
