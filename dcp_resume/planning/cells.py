"""Overlapping boxes of one tensor, cut so that no element is in two. Pure integers."""

from __future__ import annotations

from collections.abc import Iterable

from dcp_resume.manifest.boxes import Box

__all__ = ["disjoint_cells"]


def disjoint_cells(boxes: Iterable[Box]) -> list[Box]:
    """Disjoint boxes of which each given one is a union, with no element outside of them all.

    >>> cells = disjoint_cells([Box((0,), (5,)), Box((3,), (5,))])
    >>> sorted((cell.offsets, cell.sizes) for cell in cells)
    [((0,), (3,)), ((3,), (2,)), ((5,), (3,))]
    """
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
