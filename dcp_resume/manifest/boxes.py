"""Boxes: n-dimensional integer ranges of a tensor, without data.

>>> Box((0, 2), (4, 2)).intersect(Box((2, 0), (4, 3)))
Box(offsets=(2, 2), sizes=(2, 1))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import add, le, sub

__all__ = ["Box"]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Where a chunk lies in its tensor: per dimension an offset and a size, in elements.

    A 0-d tensor has the box ``Box((), ())`` of volume 1.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise ValueError(f"offsets and sizes differ in length: {self.offsets}, {self.sizes}")
        if min((*self.offsets, *self.sizes), default=0) < 0:
            raise ValueError(
                f"offsets and sizes must not be negative: {self.offsets}, {self.sizes}"
            )

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """The box of a whole tensor of ``shape``."""
        return cls((0,) * len(shape), shape)

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def stops(self) -> tuple[int, ...]:
        """Per dimension the first index behind the box."""
        return tuple(map(add, self.offsets, self.sizes))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where the two share no element."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(map(min, self.stops, other.stops))
        if len(self.offsets) != len(other.offsets):
            raise ValueError(f"boxes of different rank: {self} and {other}")
        if any(map(le, stops, offsets)):
            return None
        return Box(offsets, tuple(map(sub, stops, offsets)))

    def contains(self, other: Box) -> bool:
        """Whether every element of ``other`` lies in this box."""
        return (
            len(self.offsets) == len(other.offsets)
            and all(map(le, self.offsets, other.offsets))
            and all(map(le, other.stops, self.stops))
        )

    def without(self, hole: Box) -> Iterator[Box]:
        """What of it lies outside of ``hole``, in disjoint boxes; none of an empty box.

        >>> [rest.sizes for rest in Box.whole((3, 4)).without(Box((0, 1), (2, 9)))]
        [(1, 4), (2, 1)]
        """
        common = self.intersect(hole)
        if common is None:
            if self.volume:
                yield self
            return
        offsets, stops = list(self.offsets), list(self.stops)
        for dim, (first, last) in enumerate(zip(common.offsets, common.stops, strict=True)):
            for start, stop in ((offsets[dim], first), (last, stops[dim])):
                if start < stop:
                    sizes = [b - a for a, b in zip(offsets, stops, strict=True)]
                    sizes[dim] = stop - start
                    yield Box((*offsets[:dim], start, *offsets[dim + 1 :]), tuple(sizes))
            offsets[dim], stops[dim] = first, last

    def relative_to(self, outer: Box) -> Box:
        """The same box, counted from the first element of ``outer``."""
        if len(self.offsets) != len(outer.offsets):
            raise ValueError(f"boxes of different rank: {self} and {outer}")
        return Box(tuple(map(sub, self.offsets, outer.offsets)), self.sizes)
