"""A digest of a tensor that does not depend on how the tensor is cut.

Each element is mixed with its place in the tensor, and the results are summed: digests of disjoint
boxes add up to the digest of the whole, in any order. The sum of the mixed values and the sum of
their squares make 128 bits.

For element bits ``b`` (unsigned, of the element's size) and row-major index ``i`` in the whole
tensor, the mixed value is ``m = mix(b + (i + 1) * STEP)``, where ``mix`` is the finalizer of
splitmix64; all modulo 2^64. A 16-byte element is two of 8 bytes, with indices ``2i`` and
``2i + 1``. Bits count: 0.0 and -0.0 differ, and so do two NaNs of different payload.

It proves against accidents (an element changed, swapped or shifted; a box read into the wrong
place), not against an adversary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_resume.manifest.boxes import Box

__all__ = ["PositionDigest"]

U64s = npt.NDArray[np.uint64]

STEP = 0x9E3779B97F4A7C15
"""Odd, so that an index times the step is a permutation of 2^64; by the golden ratio, so that
close multiples come late: elements of up to 4 bytes never collide before mixing below 2^31."""
BLOCK = 2**14
"""Elements mixed at a time: three arrays of this length stay in the cache of a core."""
HEX_DIGITS = 32

_MASK = 2**64 - 1
_WORD = 8
_STEPS_UP = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(STEP)


@dataclass(frozen=True, slots=True)
class PositionDigest:
    """The digest of some disjoint boxes of a tensor; the default is that of no element.

    >>> halves = [PositionDigest.of(b"ab", 1, Box((0,), (2,)), (4,)),
    ...           PositionDigest.of(b"cd", 1, Box((2,), (2,)), (4,))]
    >>> halves[0] + halves[1] == PositionDigest.of(b"abcd", 1, Box((0,), (4,)), (4,))
    True
    """

    total: int = 0
    """Sum of the mixed values, modulo 2^64."""
    squares: int = 0
    """Sum of their squares, modulo 2^64."""

    def __add__(self, other: PositionDigest) -> PositionDigest:
        return PositionDigest(
            (self.total + other.total) & _MASK, (self.squares + other.squares) & _MASK
        )

    @classmethod
    def of(
        cls, data: bytes | memoryview, itemsize: int, box: Box, global_shape: tuple[int, ...]
    ) -> PositionDigest:
        """The digest of one box. About 310 million elements a second and core, of any size.

        Args:
            data: The box's elements, row-major, little-endian.
            itemsize: Bytes of an element: 1, 2, 4, 8 or 16.
            box: Where they lie in the tensor.
            global_shape: Of the tensor.

        Raises:
            ValueError: ``data`` does not have the size of the box, or the box leaves the tensor.
        """
        if not Box.whole(global_shape).contains(box):
            raise ValueError(f"{box} does not lie in a tensor of shape {global_shape}")
        if len(data) != box.volume * itemsize:
            raise ValueError(f"expected {box.volume} elements of {itemsize} bytes: {len(data)}")
        if itemsize > _WORD:
            words = itemsize // _WORD
            box = Box((*box.offsets, 0), (*box.sizes, words))
            global_shape, itemsize = (*global_shape, words), _WORD
        if not box.volume:
            return cls()
        elements = np.frombuffer(data, f"<u{itemsize}")
        total = squares = 0
        scratch = np.empty((2, BLOCK), np.uint64)
        for part, starts in _blocks(elements, box, global_shape):
            mixed, spare = (row[: part.size] for row in scratch)
            rows = mixed.reshape(part.shape)
            np.add(part, _STEPS_UP[: part.shape[1]], out=rows)
            rows += (starts * np.uint64(STEP))[:, None]
            _mix(mixed, spare)
            total += int(mixed.sum(dtype=np.uint64))
            squares += int(np.dot(mixed, mixed))
        return cls(total & _MASK, squares & _MASK)

    @property
    def hex(self) -> str:
        """32 hex digits, the sum before the sum of squares."""
        return f"{self.total:016x}{self.squares:016x}"

    @classmethod
    def from_hex(cls, text: str) -> PositionDigest:
        """Read what ``hex`` gave.

        Raises:
            ValueError: The text is no number of 32 hex digits.
        """
        if len(text) != HEX_DIGITS:
            raise ValueError(f"expected {HEX_DIGITS} hex digits, found {text!r:.80}")
        return cls(int(text[:16], 16), int(text[16:], 16))


def _mix(values: U64s, spare: U64s) -> None:
    """The finalizer of splitmix64, in place."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(values, np.uint64(shift), out=spare)
        np.bitwise_xor(values, spare, out=values)
        np.multiply(values, np.uint64(factor), out=values)
    np.right_shift(values, np.uint64(31), out=spare)
    np.bitwise_xor(values, spare, out=values)


def _blocks(
    elements: npt.NDArray[np.unsignedinteger], box: Box, global_shape: tuple[int, ...]
) -> Iterator[tuple[npt.NDArray[np.unsignedinteger], U64s]]:
    """Matrices of at most ``BLOCK`` elements, and the index in the tensor where each row starts.

    A row is a run of elements that follow one another in the tensor, or a part of one.
    """
    dim = len(box.sizes)  # dims from here on are whole, so that their elements are one run
    while dim and box.sizes[dim - 1] == global_shape[dim - 1]:
        dim -= 1
    dim = max(dim - 1, 0)
    length = math.prod(box.sizes[dim:])
    rows = elements.reshape(-1, length)
    begin = sum(o * math.prod(global_shape[d + 1 :]) for d, o in enumerate(box.offsets))
    per_block = max(1, BLOCK // length)
    for first in range(0, len(rows), per_block):
        number = np.arange(first, min(first + per_block, len(rows)), dtype=np.uint64)
        starts = np.full(len(number), begin, np.uint64)
        for outer in reversed(range(dim)):
            number, place = np.divmod(number, np.uint64(box.sizes[outer]))
            starts += place * np.uint64(math.prod(global_shape[outer + 1 :]))
        for column in range(0, length, BLOCK):
            part = rows[first : first + per_block, column : column + BLOCK]
            yield part, starts + np.uint64(column)
