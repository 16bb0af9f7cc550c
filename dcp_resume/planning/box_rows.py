"""Boxes as rows of padded matrices: offset 0 and size 1 beyond a box's dims."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dcp_resume.manifest.boxes import Box

__all__ = ["pad_boxes", "unpad_box"]

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
