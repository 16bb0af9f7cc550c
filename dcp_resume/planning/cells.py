"""Overlapping boxes of one tensor, cut so that no element is in two. Pure integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dcp_resume.format.tiling import find_overlaps
from dcp_resume.manifest.boxes import Box

__all__ = ["disjoint_cells"]


def disjoint_cells(boxes: Sequence[Box]) -> list[Box]:
    """Disjoint boxes of which each given one is a union, with no element outside of them all.

    Args:
        boxes: All of as many dims, none twice, none empty; returned as they are where no two
            overlap, which is found out for thousands at once.

    >>> cells = disjoint_cells([Box((0,), (5,)), Box((3,), (5,))])
    >>> sorted((cell.offsets, cell.sizes) for cell in cells)
    [((0,), (3,)), ((3,), (2,)), ((5,), (3,))]
    """
    return list(boxes) if _are_disjoint(boxes) else _refined(boxes)


def _are_disjoint(boxes: Sequence[Box]) -> bool:
    if len(boxes) < 2:
        return True
    begins = np.asarray([box.offsets for box in boxes], np.int64)
    stops = np.asarray([box.stops for box in boxes], np.int64)
    pairs, unproved = find_overlaps(np.zeros(len(boxes), np.int64), begins, stops)
    return not pairs and not unproved


def _refined(boxes: Sequence[Box]) -> list[Box]:
    cells: list[Box] = []
    for box in boxes:
        rest = [box]
        refined: list[Box] = []
        for cell in cells:
            common = cell.intersect(box)
            if common is None:
                refined.append(cell)
                continue
            refined += [common, *cell.without(common)]
            rest = [piece for part in rest for piece in part.without(common)]
        cells = [*refined, *rest]
    return cells
