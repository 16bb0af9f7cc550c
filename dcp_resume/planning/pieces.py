"""Cut a box into pieces that follow one another in its row-major bytes. Pure integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from dcp_resume.manifest.boxes import Box

__all__ = ["cut_box"]


def cut_box(box: Box, max_elements: int) -> Iterator[Box]:
    """Pieces of at most ``max_elements`` elements whose bytes, end to end, are those of the box.

    >>> [piece.sizes for piece in cut_box(Box((0, 0), (3, 4)), 8)]
    [(2, 4), (1, 4)]
    """
    if box.volume <= max(max_elements, 1):
        yield box
        return
    # The outermost dim whose single rows fit; everything before it is taken index by index.
    dim = next(d for d in range(len(box.sizes)) if math.prod(box.sizes[d + 1 :]) <= max_elements)
    rows = max(1, max_elements // math.prod(box.sizes[dim + 1 :]))
    outer = (
        range(offset, offset + size)
        for offset, size in zip(box.offsets[:dim], box.sizes[:dim], strict=True)
    )
    start, stop = box.offsets[dim], box.stops[dim]
    for place in itertools.product(*outer):
        for row in range(start, stop, rows):
            yield Box(
                (*place, row, *box.offsets[dim + 1 :]),
                (*(1 for _ in place), min(rows, stop - row), *box.sizes[dim + 1 :]),
            )
