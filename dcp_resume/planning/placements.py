"""From placements to boxes: which part of a tensor a rank holds. Pure integers.

A rank's shard is a product of index runs, one list of runs per tensor dim. Evenly or unevenly
split, each mesh axis follows ``torch.chunk``: pieces of ``ceil(size / n)`` elements until none are
left. FSDP2 over TP writes the pair ``(StridedShard(d, sf), Shard(d))``: the split that the stride
stands for comes first. A strided shard without that partner interleaves, and makes several runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dcp_resume.manifest.boxes import Box

__all__ = ["AxisSplit", "HeldBox", "held_boxes", "index_runs"]

Run = tuple[int, int]
"""Half-open range of indices of one tensor dim."""


@dataclass(frozen=True, slots=True)
class AxisSplit:
    """How one mesh axis splits a tensor dim, and where this rank sits on it."""

    count: int
    """Ranks on the axis."""
    coordinate: int
    split_factor: int = 1
    """Above 1 for a strided shard: the number of pieces that an inner axis already made."""


@dataclass(frozen=True, slots=True)
class HeldBox:
    """One box of the whole tensor, and where it lies in the rank's local tensor."""

    box: Box
    local_offsets: tuple[int, ...]

    def shifted(self, dim: int, *, by: int, local_by: int) -> HeldBox:
        """The same box further along one dim, of the tensor and of the local one."""
        offsets, local = list(self.box.offsets), list(self.local_offsets)
        offsets[dim] += by
        local[dim] += local_by
        return HeldBox(Box(tuple(offsets), self.box.sizes), tuple(local))


def _piece(runs: Sequence[Run], count: int, coordinate: int) -> list[Run]:
    """The ``coordinate``-th of ``count`` pieces of the joined runs, as ``torch.chunk`` cuts."""
    total = sum(stop - start for start, stop in runs)
    width = max(1, math.ceil(total / count))
    first, last = min(coordinate * width, total), min((coordinate + 1) * width, total)
    found: list[Run] = []
    position = 0
    for start, stop in runs:
        low, high = max(first - position, 0), min(last - position, stop - start)
        if low < high:
            found.append((start + low, start + high))
        position += stop - start
    return found


def _joined(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _in_order_of_splitting(splits: Sequence[AxisSplit]) -> list[AxisSplit]:
    """Put each strided split behind the inner splits that its factor stands for, as a plain one."""
    ordered: list[AxisSplit] = []
    inner = 1
    for split in reversed(splits):
        if split.split_factor > 1 and split.split_factor == inner:
            ordered.append(AxisSplit(split.count, split.coordinate))
        else:
            ordered.insert(0, split)
        inner *= split.count
    return ordered


def index_runs(dim_size: int, splits: Sequence[AxisSplit]) -> list[Run]:
    """Indices of one tensor dim that a rank holds, as ascending runs in local order.

    Args:
        dim_size: Elements of the dim in the whole tensor.
        splits: The mesh axes that shard this dim, outermost first.
    """
    runs: list[Run] = [(0, dim_size)]
    for split in _in_order_of_splitting(splits):
        if split.split_factor == 1:
            runs = _piece(runs, split.count, split.coordinate)
        else:
            bands = [_piece(runs, split.split_factor, band) for band in range(split.split_factor)]
            runs = [run for band in bands for run in _piece(band, split.count, split.coordinate)]
    return _joined(runs)


def held_boxes(shape: Sequence[int], splits: Sequence[Sequence[AxisSplit]]) -> list[HeldBox]:
    """Boxes of a tensor that a rank holds, in local row-major order.

    Args:
        shape: Global shape.
        splits: Per tensor dim the axes that shard it, outermost first.

    Returns:
        One box in nearly all cases; none where the local shard is empty but the tensor is not; the
        whole (empty) box where the tensor itself is empty.
    """
    if math.prod(shape) == 0:
        return [HeldBox(Box.whole(tuple(shape)), (0,) * len(shape))]
    per_dim: list[list[tuple[int, Run]]] = []
    for size, dim_splits in zip(shape, splits, strict=True):
        runs = index_runs(size, dim_splits)
        starts = itertools.accumulate((stop - start for start, stop in runs), initial=0)
        per_dim.append(list(zip(starts, runs, strict=False)))
    return [
        HeldBox(
            Box(
                tuple(start for _, (start, _) in combination),
                tuple(stop - start for _, (start, stop) in combination),
            ),
            tuple(local for local, _ in combination),
        )
        for combination in itertools.product(*per_dim)
    ]
