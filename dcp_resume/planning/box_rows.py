"""Boxes as rows of padded matrices: offset 0 and size 1 beyond a box's dims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_resume.format.box_table import distinct_rows
from dcp_resume.manifest.boxes import Box

__all__ = ["Boxes", "pad_boxes", "unpad_box"]

I64 = npt.NDArray[np.int64]


def pad_boxes(boxes: Sequence[Box], width: int) -> tuple[I64, I64]:
    """Offsets and sizes of boxes as two ``[n, width]`` matrices."""
    offsets = np.zeros((len(boxes), width), np.int64)
    sizes = np.ones((len(boxes), width), np.int64)
    for row, box in enumerate(boxes):
        offsets[row, : len(box.offsets)] = box.offsets
        sizes[row, : len(box.sizes)] = box.sizes
    return offsets, sizes


def unpad_box(offsets: I64, sizes: I64, ndim: int) -> Box:
    """One row of padded matrices as a box."""
    return Box(tuple(offsets[:ndim].tolist()), tuple(sizes[:ndim].tolist()))


@dataclass(frozen=True, slots=True, eq=False)
class Boxes:
    """The boxes of many chunks, which name theirs by its row: as a rule few recur for all tensors.

    A box may be listed more than once, and one that no chunk has.
    """

    offsets: I64
    """``[B, D]``"""
    sizes: I64
    """``[B, D]``"""

    @classmethod
    def listing(cls, boxes: Sequence[Box], width: int) -> tuple[Boxes, npt.NDArray[np.int32]]:
        """Boxes, each listed once, and ``[n]`` the row of each that was given."""
        rows: dict[Box, int] = {}
        box = [rows.setdefault(box, len(rows)) for box in boxes]
        return cls(*pad_boxes(list(rows), width)), np.asarray(box, np.int32)

    @classmethod
    def stacked(cls, tables: Sequence[Boxes], width: int) -> Boxes:
        """Tables one below the other, of ``width`` dims or more."""
        width = max((table.width for table in tables), default=width)
        ends = np.cumsum([0, *map(len, tables)]).tolist()
        offsets = np.zeros((ends[-1], width), np.int64)
        sizes = np.ones((ends[-1], width), np.int64)
        for table, start, stop in zip(tables, ends[:-1], ends[1:], strict=True):
            offsets[start:stop, : table.width] = table.offsets
            sizes[start:stop, : table.width] = table.sizes
        return cls(offsets, sizes)

    def __len__(self) -> int:
        """Boxes listed."""
        return len(self.offsets)

    @property
    def width(self) -> int:
        """The largest number of dims."""
        return int(self.offsets.shape[1])

    @property
    def volumes(self) -> I64:
        """``[B]`` elements of each."""
        volumes: I64 = np.prod(self.sizes, axis=1, dtype=np.int64)
        return volumes

    def distinct(self) -> tuple[Boxes, npt.NDArray[np.int32]]:
        """The boxes, each listed once, and ``[B]`` the row of each among them."""
        table, row = distinct_rows(np.hstack([self.offsets, self.sizes]))
        boxes = Boxes(table[:, : self.width].copy(), table[:, self.width :].copy())
        return boxes, row.astype(np.int32)
