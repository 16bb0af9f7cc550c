"""Chunks as columns: one row a chunk, so that ten thousand ranks are handled without objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.planning.box_rows import Boxes

__all__ = ["Table"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Table:
    """Chunks as columns; ``n`` rows."""

    tensor: I32
    rank: I32
    box: I32
    """``[n]`` row of each chunk's box."""
    boxes: Boxes

    @classmethod
    def of(cls, tensor: npt.ArrayLike, rank: npt.ArrayLike, offsets: I64, sizes: I64) -> Table:
        """Chunks with a box each: ``[n, D]``, padded by offset 0 and size 1."""
        box = np.arange(len(offsets), dtype=np.int32)
        boxes = Boxes(offsets, sizes)
        return cls(np.asarray(tensor, np.int32), np.asarray(rank, np.int32), box, boxes)

    @property
    def offsets(self) -> I64:
        """``[n, D]``, gathered for all chunks."""
        return self.boxes.offsets[self.box]

    @property
    def sizes(self) -> I64:
        """``[n, D]``, gathered for all chunks."""
        return self.boxes.sizes[self.box]

    def take(self, rows: Any) -> Table:
        """The rows selected by an index or mask."""
        return Table(self.tensor[rows], self.rank[rows], self.box[rows], self.boxes)

    def where(self, is_kept: npt.NDArray[np.bool_]) -> Table:
        """The rows of a mask; the table itself where these are all."""
        return self if is_kept.all() else self.take(is_kept)

    def num_bytes(self, itemsizes: Sequence[int]) -> I64:
        """``[n]`` bytes of each chunk.

        Args:
            itemsizes: Per tensor the bytes of an element.
        """
        itemsize = np.asarray(itemsizes or [1], np.int64)
        return np.asarray(self.boxes.volumes[self.box] * itemsize[self.tensor])

    @staticmethod
    def concatenate(tables: Sequence[Table]) -> Table:
        """Tables one behind the other."""
        if len(tables) == 1:
            return tables[0]
        starts = np.cumsum([0, *(len(table.boxes) for table in tables[:-1])]).astype(np.int32)
        return Table(
            np.concatenate([t.tensor for t in tables]),
            np.concatenate([t.rank for t in tables]),
            np.concatenate([t.box + start for t, start in zip(tables, starts, strict=True)]),
            Boxes.stacked([t.boxes for t in tables], 1),
        )
