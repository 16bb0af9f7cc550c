"""Merge the shapes of all ranks' plans: deduplicate, balance, cut.

Runs on the coordinator only, and again only when a rank's shape changes. The work per (tensor,
rank) pair is done in columns; Python loops run over distinct structures and replicated chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import IncompletePlan, Problem
from dcp_resume.format.digests import digest_bytes
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.balance import assign_writers, share_rows
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.plan_check import check_listed, check_places, repeated
from dcp_resume.planning.plans import PlanShape
from dcp_resume.planning.replicas import Comparison, Holders, deduplicate, join_aliases
from dcp_resume.planning.table import Table
from dcp_resume.planning.union import Union, unite
from dcp_resume.problems import summarise

__all__ = ["LocalIds", "MergedShapes", "merge_shapes"]

I32 = npt.NDArray[np.int32]

CUT_BYTES = 4 * 1024 * 1024
"""A replicated chunk of this size or more is cut; below it one more chunk costs too much."""
PIECES = 4
"""Of so many bytes, into this many pieces at most, however many ranks hold them."""


@dataclass(frozen=True, slots=True)
class LocalIds:
    """Where the checkpoint's tensors are in a rank's own structure."""

    position: npt.NDArray[np.int32]
    """``[tensors + 1]``; -1 for one that it lacks, as for all beyond the ranks' own."""
    is_renamed: npt.NDArray[np.bool_]
    """``[tensors + 1]`` whether it has the tensor under a further name alone."""

    @classmethod
    def of(cls, global_ids: Sequence[int], first: Mapping[int, int], num_tensors: int) -> LocalIds:
        """Invert a structure's ids; a first name is found by a further one too."""
        position = np.full(num_tensors + 1, -1, np.int32)
        is_renamed = np.zeros(num_tensors + 1, bool)
        for local, tensor in enumerate(global_ids):
            if tensor in first:
                position[first[tensor]], is_renamed[first[tensor]] = local, True
        position[global_ids] = np.arange(len(global_ids))
        is_renamed[global_ids] = False
        is_renamed[num_tensors] = True
        return cls(position, is_renamed)

    def held(self) -> list[int]:
        """The tensors that the rank has."""
        return np.flatnonzero(self.position >= 0).tolist()

    def find(self, tensors: I32) -> tuple[npt.NDArray[np.int32], list[int]]:
        """Positions of some tensors, and which of these go by another name on the rank.

        Tensors beyond the ranks' own are the coordinator's values: -1, and by another name.
        """
        known = np.minimum(tensors, len(self.position) - 1)
        return self.position[known], self.is_renamed[known].nonzero()[0].tolist()


@dataclass(frozen=True, slots=True)
class MergedShapes:
    """What all ranks write, but for the order in files, and for values."""

    world_size: int
    fingerprint: bytes
    """16 bytes over the ranks' shapes."""
    tensors: tuple[TensorEntry, ...]
    meshes: tuple[MeshEntry, ...]
    written: Table
    """Every chunk, with the rank that writes it."""
    comparison: Comparison
    local_ids: tuple[LocalIds, ...]
    """Per rank; one for all ranks of one structure."""


def merge_shapes(shapes: Sequence[PlanShape]) -> MergedShapes:
    """Merge one shape of each rank, in order of rank.

    Raises:
        IncompletePlan: Ranks contradict each other about a tensor, or the chunks of one do not
            tile it.
        InvalidDocument: A rank says that it is another, or names what it does not list.
        ReplicaMismatch: Tied tensors are not alike, or cut differently.
    """
    check_places(shapes)
    union = unite(shapes)
    table, evidence = _concatenate(shapes, union)
    table, tensors = _place_per_rank(table, union.tensors)
    named = join_aliases(table, evidence, tensors, union)
    unique, holders, comparison = deduplicate(named)
    _check_tiling(unique, named.tensors)
    num_tensors = len(named.tensors)
    local_ids = {
        s: LocalIds.of(ids, named.first, num_tensors) for s, ids in union.global_ids.items()
    }
    return MergedShapes(
        world_size=len(shapes),
        fingerprint=_fingerprint(shapes),
        tensors=named.tensors,
        meshes=tuple(union.meshes.values()),
        written=_balance(unique, holders, named.tensors, len(shapes)),
        comparison=comparison,
        local_ids=tuple(local_ids[shape.structure] for shape in shapes),
    )


def _fingerprint(shapes: Sequence[PlanShape]) -> bytes:
    """The ranks' shapes end to end, each behind its lengths."""
    structures = {shape.structure: number for number, shape in enumerate(shapes)}
    lengths = [
        (
            shape.rank,
            shape.world_size,
            structures[shape.structure],
            len(shape.structure),
            len(shape.tensor),
            len(shape.compared),
            *shape.boxes.offsets.shape,
        )
        for shape in shapes
    ]
    columns: list[npt.NDArray[Any]] = [
        np.asarray(lengths, np.int64),
        *(shape.tensor for shape in shapes),
        *(shape.box for shape in shapes),
        *(shape.compared for shape in shapes),
        *(shape.boxes.offsets for shape in shapes),
        *(shape.boxes.sizes for shape in shapes),
    ]
    return digest_bytes([*(column.tobytes() for column in columns), *structures])


def _concatenate(shapes: Sequence[PlanShape], union: Union) -> tuple[Table, I32]:
    counts = [len(shape.tensor) for shape in shapes]
    local = np.concatenate([shape.tensor for shape in shapes])
    # Of every structure its ids lie end to end, so that one lookup serves all ranks.
    first: dict[bytes, int] = {}
    ids: list[int] = []
    for structure, own in union.global_ids.items():
        first[structure] = len(ids)
        ids += own
    if len(first) > 1:
        local = local + repeated([first[shape.structure] for shape in shapes], counts)
    boxes, box = _united_boxes(shapes, counts)
    table = Table(
        np.asarray(ids or [0], np.int32)[local],
        repeated([shape.rank for shape in shapes], counts),
        box,
        boxes,
    )
    evidence = np.full(len(local), -1, np.int32)
    num_compared = [len(shape.compared) for shape in shapes]
    starts = np.repeat(np.cumsum(counts) - counts, num_compared)
    compared = np.concatenate([shape.compared for shape in shapes])
    check_listed(compared, counts, num_compared, "a chunk")
    evidence[starts + compared] = np.arange(len(compared))
    return table, evidence


def _united_boxes(shapes: Sequence[PlanShape], counts: Sequence[int]) -> tuple[Boxes, I32]:
    """The boxes of all ranks, each listed once, and each chunk's row among them."""
    num_boxes = [len(shape.boxes) for shape in shapes]
    boxes, row = Boxes.stacked([shape.boxes for shape in shapes], 1).distinct()
    local = np.concatenate([shape.box for shape in shapes])
    check_listed(local, num_boxes, counts, "a box")
    local = local + repeated((np.cumsum(num_boxes) - num_boxes).tolist(), counts)
    return boxes, row[local]


def _place_per_rank(
    table: Table, tensors: tuple[TensorEntry, ...]
) -> tuple[Table, tuple[TensorEntry, ...]]:
    """Stack per-rank tensors along a new first dim, and line per-rank values up one by one."""
    if all(entry.kind != "per_rank" for entry in tensors):
        return table, tensors
    placed = list(tensors)
    boxes, box = [table.boxes], table.box.copy()
    next_row = len(table.boxes)
    for position, entry in enumerate(tensors):
        if entry.kind != "per_rank":
            continue
        rows = np.flatnonzero(table.tensor == position)
        if entry.codec == "leaves":
            lengths = table.boxes.sizes[box[rows], :1]
            own = Boxes(np.cumsum(lengths, axis=0) - lengths, lengths)
            shape: tuple[int, ...] = (int(lengths.sum()),)
        else:
            shape = (len(rows), *entry.global_shape)
            offsets = np.zeros((len(rows), len(shape)), np.int64)
            offsets[:, 0] = np.arange(len(rows))
            own = Boxes(offsets, np.tile(np.asarray([1, *shape[1:]], np.int64), (len(rows), 1)))
        box[rows] = np.arange(next_row, next_row + len(rows))
        next_row += len(rows)
        boxes.append(own)
        placed[position] = entry.model_copy(update={"global_shape": shape})
    listed, row = Boxes.stacked(boxes, 1).distinct()
    return Table(table.tensor, table.rank, row[box], listed), tuple(placed)


def _check_tiling(unique: Table, tensors: tuple[TensorEntry, ...]) -> None:
    """Refuse a plan whose chunks leave a hole; overlaps are found by the index check."""
    volume = unique.boxes.volumes.astype(float)[unique.box]
    covered = np.bincount(unique.tensor, weights=volume, minlength=len(tensors))
    problems = tuple(
        Problem(
            entry.fqn,
            "hole" if int(found) < math.prod(entry.global_shape) else "overlap",
            f"shape {entry.global_shape} has {math.prod(entry.global_shape)} elements, the ranks "
            f"offer {int(found)}",
        )
        for entry, found in zip(tensors, covered.tolist(), strict=True)
        if entry.kind != "alias" and int(found) != math.prod(entry.global_shape)
    )
    if problems:
        raise IncompletePlan(
            f"the ranks' plans do not tile every tensor:\n{summarise(problems)}\n"
            f"check that every rank takes part in the save",
            problems=problems,
        )


def _balance(
    unique: Table, holders: Holders, tensors: tuple[TensorEntry, ...], world_size: int
) -> Table:
    if len(holders.ranks) == len(unique.tensor):
        return unique  # each chunk has one holder
    size = unique.num_bytes([ITEMSIZES[entry.dtype] for entry in tensors])
    alone = ~holders.is_shared
    loads = np.zeros(world_size, np.int64)
    np.add.at(loads, unique.rank[alone], size[alone])
    shared = np.flatnonzero(~alone)
    writers, to_cut = assign_writers(
        size[shared], [holders.of(i) for i in shared.tolist()], loads, cut_bytes=CUT_BYTES
    )
    rank = unique.rank.copy()
    for position, writer in writers.items():
        rank[shared[position]] = writer
    whole = np.ones(len(rank), bool)
    pieces: list[Table] = []
    for position in to_cut:
        row = int(shared[position])
        chunk = unique.take([row])
        rows = int(chunk.sizes[0, 0])
        row_bytes = int(size[row]) // max(rows, 1)
        num_pieces = int(size[row]) * PIECES // CUT_BYTES
        writing = sorted(holders.of(row), key=lambda h: (loads[h], h))[:num_pieces]
        share = share_rows(rows, row_bytes, [int(loads[h]) for h in writing])
        whole[row] = False
        start = int(chunk.offsets[0, 0])
        for holder, num_rows in zip(writing, share, strict=True):
            if num_rows:
                pieces.append(_cut(chunk, holder, start, num_rows))
                loads[holder] += num_rows * row_bytes
                start += num_rows
    kept = Table(unique.tensor, rank, unique.box, unique.boxes).where(whole)
    return Table.concatenate([kept, *pieces])


def _cut(chunk: Table, rank: int, start: int, num_rows: int) -> Table:
    offsets, sizes = chunk.offsets, chunk.sizes
    offsets[0, 0], sizes[0, 0] = start, num_rows
    return Table.of(chunk.tensor, [rank], offsets, sizes)
