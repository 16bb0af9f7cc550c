"""Merge the local plans of all ranks: deduplicate, balance, cut, lay out files.

Runs on the coordinator only. The work per (tensor, rank) pair is done in columns; Python loops run
over distinct structures, replicated chunks and files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import IncompletePlan, Problem
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.balance import assign_writers, share_rows
from dcp_resume.planning.box_rows import resize
from dcp_resume.planning.files import FileLayout, lay_out_files
from dcp_resume.planning.plans import SHARED_LEAVES, LocalPlan, RankPlan, leaves_entry
from dcp_resume.planning.replicas import Holders, deduplicate, join_aliases
from dcp_resume.planning.table import Table
from dcp_resume.planning.union import Union, unite
from dcp_resume.planning.values import merge_values
from dcp_resume.problems import summarise

__all__ = ["GlobalPlan", "merge"]

I64 = npt.NDArray[np.int64]

CUT_BYTES = 4 * 1024 * 1024
"""A replicated chunk of this size or more is cut; below it one more chunk costs too much."""
PIECES = 4
"""Of so many bytes, into this many pieces at most, however many ranks hold them."""


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """What all ranks write, and what catalog and index will say."""

    world_size: int
    tensors: tuple[TensorEntry, ...]
    meshes: tuple[MeshEntry, ...]
    manifest_values: Mapping[str, tuple[Any, Any]]
    """Shared values that go into the manifest: FQN → path, encoded value."""
    num_values: Mapping[str, int]
    """Part → number of its non-tensor leaves."""
    layout: FileLayout
    local_ids: tuple[Mapping[int, int], ...]
    """Per rank: position in ``tensors`` → position in the rank's own structure; one mapping for
    all ranks of one structure."""
    inline: Mapping[str, bytes]
    """FQN → bytes that the coordinator itself writes."""

    @property
    def stages(self) -> tuple[tuple[int, ...], ...] | None:
        """Per pipeline stage the global layers it holds, where the layers' names tell them apart.

        None if all ranks hold the same layers.
        """
        held = {
            tuple(sorted({layer for g in ids if (layer := self.tensors[g].layer) is not None}))
            for ids in {id(shared): shared for shared in self.local_ids}.values()
        }
        stages = sorted(layers for layers in held if layers)
        are_apart = sum(map(len, stages)) == len({layer for s in stages for layer in s})
        return tuple(stages) if len(stages) > 1 and are_apart else None

    def rank_plan(self, rank: int) -> RankPlan:
        """The part of the plan that ``rank`` carries out."""
        files, file, rows = self.layout.of_rank(rank)
        local = self.local_ids[rank]
        tensor = self.layout.chunks.tensor[rows]
        return RankPlan(
            files=files,
            file=file,
            tensor=np.asarray([local.get(t, -1) for t in tensor.tolist()], np.int32),
            offsets=self.layout.chunks.offsets[rows],
            sizes=self.layout.chunks.sizes[rows],
            inline=self.inline if rank == 0 else {},
        )


def merge(plans: Sequence[LocalPlan]) -> GlobalPlan:
    """Merge one plan of each rank, in order of rank.

    Raises:
        IncompletePlan: Ranks contradict each other about a tensor, or the chunks of one do not
            tile it.
        ReplicaMismatch: Assumed replicas, tied tensors, or values without a declaration differ.
    """
    union = unite(plans)
    table, digests = _concatenate(plans, union)
    table, tensors = _place_per_rank(table, union.tensors)
    named = join_aliases(table, digests, tensors, union)
    unique, holders = deduplicate(named)
    tensors = named.tensors
    _check_tiling(unique, tensors)
    written = _balance(unique, holders, tensors, len(plans))
    values, inline, num_values = merge_values(plans)
    local_ids = {s: _local_ids(ids, named.first) for s, ids in union.global_ids.items()}
    for fqn, data in inline.items():
        tensors = (
            *tensors,
            leaves_entry(fqn, fqn.removeprefix(SHARED_LEAVES), len(data), is_per_rank=False),
        )
        written = Table.concatenate([written, _inline_row(len(tensors) - 1, len(data), written)])
    return GlobalPlan(
        world_size=len(plans),
        tensors=tensors,
        meshes=tuple(union.meshes.values()),
        manifest_values=values,
        num_values=num_values,
        layout=lay_out_files(written, tensors),
        local_ids=tuple(local_ids[plan.structure] for plan in plans),
        inline=inline,
    )


def _local_ids(global_ids: Sequence[int], first: Mapping[int, int]) -> dict[int, int]:
    """Position in the checkpoint → in the rank's structure; a first name also by a further one."""
    local = {first[g]: n for n, g in enumerate(global_ids) if g in first}
    return {**local, **{g: n for n, g in enumerate(global_ids)}}


def _concatenate(plans: Sequence[LocalPlan], union: Union) -> tuple[Table, npt.NDArray[np.uint64]]:
    counts = [len(plan.tensor) for plan in plans]
    local = np.concatenate([plan.tensor for plan in plans])
    # Of every structure its ids lie end to end, so that one lookup serves all ranks.
    first: dict[bytes, int] = {}
    ids: list[int] = []
    for structure, own in union.global_ids.items():
        first[structure] = len(ids)
        ids += own
    base = np.repeat([first[plan.structure] for plan in plans], counts)
    width = max((plan.offsets.shape[1] for plan in plans), default=1) + 1
    narrow = width - 1
    table = Table(
        np.asarray(ids or [0], np.int64)[base + local] if len(local) else local.astype(np.int64),
        np.repeat([plan.rank for plan in plans], counts),
        resize(np.concatenate([resize(plan.offsets, narrow, 0) for plan in plans]), width, 0),
        resize(np.concatenate([resize(plan.sizes, narrow, 1) for plan in plans]), width, 1),
    )
    digest = np.concatenate([np.ascontiguousarray(plan.digest) for plan in plans])
    return table, digest.view(np.uint64).reshape(-1, 2)


def _place_per_rank(
    table: Table, tensors: tuple[TensorEntry, ...]
) -> tuple[Table, tuple[TensorEntry, ...]]:
    """Stack per-rank tensors along a new first dim, and line per-rank values up one by one."""
    placed = list(tensors)
    offsets, sizes = table.offsets.copy(), table.sizes.copy()
    for position, entry in enumerate(tensors):
        if entry.kind != "per_rank":
            continue
        rows = np.flatnonzero(table.tensor == position)
        if entry.codec == "leaves":
            lengths = sizes[rows, 0]
            offsets[rows, 0] = np.cumsum(lengths) - lengths
            shape: tuple[int, ...] = (int(lengths.sum()),)
        else:
            ndim = len(entry.global_shape)
            offsets[rows, 1:], sizes[rows, 1:] = 0, 1
            sizes[rows, 1 : ndim + 1] = entry.global_shape
            offsets[rows, 0], sizes[rows, 0] = np.arange(len(rows)), 1
            shape = (len(rows), *entry.global_shape)
        placed[position] = entry.model_copy(update={"global_shape": shape})
    return Table(table.tensor, table.rank, offsets, sizes), tuple(placed)


def _check_tiling(unique: Table, tensors: tuple[TensorEntry, ...]) -> None:
    """Refuse a plan whose chunks leave a hole; overlaps are found by the index check."""
    volume = unique.sizes.prod(axis=1)
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
    itemsize = np.asarray([ITEMSIZES[entry.dtype] for entry in tensors] or [1], np.int64)
    size = unique.sizes.prod(axis=1) * itemsize[unique.tensor]
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
        rows = int(unique.sizes[row, 0])
        row_bytes = int(size[row]) // max(rows, 1)
        num_pieces = int(size[row]) * PIECES // CUT_BYTES
        writing = sorted(holders.of(row), key=lambda h: (loads[h], h))[:num_pieces]
        share = share_rows(rows, row_bytes, [int(loads[h]) for h in writing])
        whole[row] = False
        start = int(unique.offsets[row, 0])
        for holder, num_rows in zip(writing, share, strict=True):
            if num_rows:
                pieces.append(_cut(unique, row, holder, start, num_rows))
                loads[holder] += num_rows * row_bytes
                start += num_rows
    kept = Table(unique.tensor, rank, unique.offsets, unique.sizes).take(whole)
    return Table.concatenate([kept, *pieces])


def _cut(unique: Table, row: int, rank: int, start: int, num_rows: int) -> Table:
    offsets, sizes = unique.offsets[row : row + 1].copy(), unique.sizes[row : row + 1].copy()
    offsets[0, 0], sizes[0, 0] = start, num_rows
    return Table(unique.tensor[row : row + 1], np.asarray([rank], np.int64), offsets, sizes)


def _inline_row(tensor: int, size: int, like: Table) -> Table:
    offsets = np.zeros((1, like.offsets.shape[1]), np.int64)
    sizes = np.ones((1, like.sizes.shape[1]), np.int64)
    sizes[0, 0] = size
    return Table(np.asarray([tensor], np.int64), np.zeros(1, np.int64), offsets, sizes)
