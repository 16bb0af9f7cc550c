"""Compare the bytes of tensors that two checkpoints hold, whatever ranks wrote either of them.

Both sides go by in windows of verified reads. A chunk that has the same box on both sides, and the
same blocks with the same digests, is equal without being read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dcp_resume.format.dtypes import DTYPES, ITEMSIZES
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.box_rows import unpad_box
from dcp_resume.planning.padding import inside_of, logical_shape
from dcp_resume.planning.pieces import cut_box
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.side import Side
from dcp_resume.session.targets import Target

__all__ = ["Pair", "TensorComparer", "TensorDifference"]

Bytes = npt.NDArray[np.uint8]

_WITHOUT_NUMBERS = frozenset({"float4_e2m1fn_x2"})
"""Two numbers an element, which torch cannot convert: counted, but not measured."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor whose bytes differ."""

    fqn: str
    part: str
    dtype: str
    first_index: tuple[int, ...]
    """Global index of the first element, in row-major order, whose bits differ."""
    num_different: int
    """Elements whose bits differ: 0.0 and -0.0 do, equal NaNs do not."""
    num_elements: int
    max_abs: float
    """Largest difference of two finite elements; NaN if no differing pair is finite on both sides,
    or the dtype is not measured (``float4_e2m1fn_x2``)."""
    max_rel: float
    """Likewise, as part of the larger magnitude."""
    num_not_finite: int
    """Differing elements of which a side is NaN or infinite."""

    def __str__(self) -> str:
        index = f"[{', '.join(map(str, self.first_index))}]"
        text = (
            f"{self.fqn}: {self.num_different} of {self.num_elements} elements differ, the first "
            f"at {index}; by at most {self.max_abs:.3g} (relative {self.max_rel:.3g})"
        )
        return f"{text}; {self.num_not_finite} not finite" if self.num_not_finite else text


class Pair(NamedTuple):
    """One tensor under its names on both sides."""

    fqn: str
    """Name in A."""
    other: str
    """Name in B."""


@dataclass(slots=True)
class _Found:
    """What is known of a tensor that differs so far."""

    first_index: tuple[int, ...]
    num_different: int = 0
    num_not_finite: int = 0
    max_abs: float = math.nan
    max_rel: float = math.nan

    def add(self, index: tuple[int, ...], count: int, measured: _Measured) -> None:
        self.first_index = min(self.first_index, index)
        self.num_different += count
        self.num_not_finite += measured.num_not_finite
        self.max_abs = float(np.fmax(self.max_abs, measured.max_abs))
        self.max_rel = float(np.fmax(self.max_rel, measured.max_rel))


class _Measured(NamedTuple):
    max_abs: float
    max_rel: float
    num_not_finite: int


class _Piece(NamedTuple):
    pair: Pair
    box: Box
    start: int
    """Of its bytes in the window."""
    stop: int


@dataclass(slots=True)
class TensorComparer:
    """Compares many tensors of the same dtypes and logical shapes.

    Args:
        a: The one checkpoint.
        b: The other.
        window_bytes: Memory for each side, beside that of the readers.
        progress: Called with bytes compared so far, by reading or by digests.
    """

    a: Side
    b: Side
    window_bytes: int
    progress: Callable[[int], None]
    num_bytes: int = 0
    """Bytes compared, of one side."""
    digest_bytes: int = 0
    """Of these, bytes that digests proved equal."""
    _found: dict[Pair, _Found] = field(default_factory=dict)

    def compare(self, pairs: Sequence[Pair]) -> list[TensorDifference]:
        """The tensors that differ, in the given order.

        Raises:
            CorruptData: A block of either side is damaged; nothing was decided.
            StorageError: A store failed.
        """
        memories = [np.empty(self.window_bytes, np.uint8) for _ in range(2)]
        for window in self._windows(pairs):
            length = window[-1].stop
            for side, memory, number in ((self.a, memories[0], 0), (self.b, memories[1], 1)):
                side.read([_target(piece, number, memory) for piece in window])
            for piece in window:
                self._compare_piece(piece, *(m[piece.start : piece.stop] for m in memories))
            self._advance(length)
        return [self._difference(pair) for pair in pairs if pair in self._found]

    def _windows(self, pairs: Sequence[Pair]) -> Iterator[list[_Piece]]:
        window: list[_Piece] = []
        position = 0
        for pair in pairs:
            itemsize = ITEMSIZES[self.a.opened.entry(pair.fqn).dtype]
            for box in self._unproved(pair, itemsize):
                for piece in cut_box(box, self.window_bytes // itemsize):
                    size = piece.volume * itemsize
                    if position + size > self.window_bytes:
                        yield window
                        window, position = [], 0
                    window.append(_Piece(pair, piece, position, position + size))
                    position += size
        if window:
            yield window

    def _unproved(self, pair: Pair, itemsize: int) -> Iterator[Box]:
        """The boxes of a tensor, as A stores it, that digests do not prove equal."""
        shape = logical_shape(self.a.opened.entry(pair.fqn))
        others = dict(_chunks(self.b.opened, pair.other))
        for stored, chunk in _chunks(self.a.opened, pair.fqn):
            box = inside_of(stored, shape)
            if box is None or not box.volume:
                continue
            other = others.get(stored)
            if other is not None and _have_equal_blocks(self.a.opened, chunk, self.b.opened, other):
                self.digest_bytes += box.volume * itemsize
                self._advance(box.volume * itemsize)
            else:
                yield box

    def _advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.progress(self.num_bytes)

    def _compare_piece(self, piece: _Piece, a: Bytes, b: Bytes) -> None:
        if np.array_equal(a, b):
            return
        dtype = self.a.opened.entry(piece.pair.fqn).dtype
        rows_a, rows_b = (side.reshape(-1, ITEMSIZES[dtype]) for side in (a, b))
        different = _rows_that_differ(rows_a, rows_b)
        place = np.unravel_index(int(different[0]), piece.box.sizes) if piece.box.sizes else ()
        index = tuple(int(i) + o for i, o in zip(place, piece.box.offsets, strict=True))
        found = self._found.setdefault(piece.pair, _Found(index))
        found.add(index, len(different), _measure(dtype, rows_a[different], rows_b[different]))

    def _difference(self, pair: Pair) -> TensorDifference:
        entry, found = self.a.opened.entry(pair.fqn), self._found[pair]
        return TensorDifference(
            fqn=pair.fqn,
            part=entry.part,
            dtype=entry.dtype,
            first_index=found.first_index,
            num_different=found.num_different,
            num_elements=math.prod(logical_shape(entry)),
            max_abs=found.max_abs,
            max_rel=found.max_rel,
            num_not_finite=found.num_not_finite,
        )


def _target(piece: _Piece, number: int, memory: Bytes) -> Target:
    view = memory[piece.start : piece.stop].data
    return Target(piece.pair[number], piece.box, view, None, None)


def _chunks(opened: OpenedCheckpoint, fqn: str) -> Iterator[tuple[Box, int]]:
    index, tensor = opened.index, opened.tensor_ids[fqn]
    ndim = len(opened.catalog.tensors[tensor].global_shape)
    for chunk in index.chunks_of(tensor).tolist():
        code = index.chunk_box[chunk]
        yield unpad_box(index.box_offsets[code], index.box_sizes[code], ndim), chunk


def _have_equal_blocks(
    a: OpenedCheckpoint, chunk_a: int, b: OpenedCheckpoint, chunk_b: int
) -> bool:
    """Whether digests prove that two chunks of the same box and dtype hold the same bytes."""
    starts_a, digests_a = _blocks_of(a, chunk_a)
    starts_b, digests_b = _blocks_of(b, chunk_b)
    return np.array_equal(starts_a, starts_b) and np.array_equal(digests_a, digests_b)


def _blocks_of(opened: OpenedCheckpoint, chunk: int) -> tuple[npt.NDArray[np.int64], Bytes]:
    """Where the blocks under a chunk begin and end, from the chunk's begin; and their digests."""
    index, file = opened.index, int(opened.index.chunk_file[chunk])
    begin, bounds = int(opened.begins[chunk]), opened.block_bounds(file)
    code = index.chunk_box[chunk]
    length = int(index.box_sizes[code].prod()) * int(opened.itemsizes[index.chunk_tensor[chunk]])
    first = int(np.searchsorted(bounds, begin, side="right")) - 1
    last = int(np.searchsorted(bounds, begin + length, side="left"))
    number = int(opened.blocks.first[file])
    return bounds[first : last + 1] - begin, index.block_digest[number + first : number + last]


def _rows_that_differ(a: Bytes, b: Bytes) -> npt.NDArray[np.int64]:
    """Numbers of the rows of two uint8[n, itemsize] that differ; by words, which is faster."""
    word = np.dtype(f"u{min(a.shape[1], 8)}")
    return np.flatnonzero((a.view(word) != b.view(word)).any(axis=1))


def _measure(dtype: str, a: Bytes, b: Bytes) -> _Measured:
    """How far elements are apart.

    Args:
        dtype: Name of the element type.
        a: uint8[n, itemsize], elements of A that differ.
        b: Likewise of B.
    """
    if dtype in _WITHOUT_NUMBERS:
        return _Measured(math.nan, math.nan, 0)
    kind = DTYPES[dtype].torch_dtype
    if not (kind.is_floating_point or kind.is_complex):
        return _measure_integers(np.dtype(dtype), a, b)
    wide = torch.complex128 if kind.is_complex else torch.float64
    x, y = (torch.from_numpy(side).reshape(-1).view(kind).to(wide) for side in (a, b))
    is_finite = x.isfinite() & y.isfinite()
    apart = (x - y).abs()[is_finite]
    size = torch.maximum(x.abs(), y.abs())[is_finite]
    relative = torch.where(size > 0, apart / size, 0.0)
    return _Measured(_largest(apart), _largest(relative), int((~is_finite).sum()))


def _largest(numbers: torch.Tensor) -> float:
    return float(numbers.max()) if len(numbers) else math.nan


def _measure_integers(dtype: np.dtype[Any], a: Bytes, b: Bytes) -> _Measured:
    x, y = (side.reshape(-1).view(dtype).astype(_WIDE[dtype.kind]) for side in (a, b))
    # The distance of two int64 may not fit into one; modulo 2**64 it is exact as uint64.
    apart = np.where(x > y, x - y, y - x).astype(np.uint64).astype(np.float64)
    size = np.maximum(np.abs(x.astype(np.float64)), np.abs(y.astype(np.float64)))
    return _Measured(float(apart.max()), float((apart / size).max()), 0)


_WIDE = {"b": np.dtype(np.int64), "i": np.dtype(np.int64), "u": np.dtype(np.uint64)}
