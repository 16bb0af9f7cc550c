"""Merge the local plans of all ranks: deduplicate, balance, cut, lay out files.

Runs on the coordinator only. The work per (tensor, rank) pair is done in columns; Python loops run
over distinct structures, replicated chunks and files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import IncompletePlan, Problem, ReplicaMismatch, summarise
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.balance import assign_writers, share_rows
from dcp_resume.planning.files import FileLayout, lay_out_files
from dcp_resume.planning.plans import (
    SHARED_LEAVES,
    LocalPlan,
    RankPlan,
    decode_structure,
    leaves_entry,
    resize,
)
from dcp_resume.planning.table import Table
from dcp_resume.planning.values import merge_values

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
        ReplicaMismatch: Assumed replicas, or values without a declaration, differ between ranks.
    """
    union = _unite(plans)
    table, digests = _concatenate(plans, union)
    table, tensors = _place_per_rank(table, union.tensors)
    table, digests, tensors = _drop_aliases(table, digests, tensors, union)
    unique, holders = _deduplicate(table, digests, tensors)
    _check_tiling(unique, tensors)
    written = _balance(unique, holders, tensors, len(plans))
    values, inline, num_values = merge_values(plans)
    local_ids = {s: {g: n for n, g in enumerate(ids)} for s, ids in union.global_ids.items()}
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


@dataclass(frozen=True, slots=True)
class _Union:
    tensors: tuple[TensorEntry, ...]
    meshes: Mapping[str, MeshEntry]
    global_ids: Mapping[bytes, list[int]]
    """Structure → per local tensor its position in ``tensors``."""
    is_own: npt.NDArray[np.bool_]
    """``[tensors]`` whether some rank holds bytes of it that are no other tensor's."""


_COMPARED = ("dtype", "global_shape", "part", "path", "codec")


def _unite(plans: Sequence[LocalPlan]) -> _Union:
    tensors: list[TensorEntry] = []
    ids: dict[str, int] = {}
    meshes: dict[str, MeshEntry] = {}
    global_ids: dict[bytes, list[int]] = {}
    own: dict[bytes, npt.NDArray[np.bool_]] = {}
    problems: list[Problem] = []
    for plan in plans:
        if plan.structure in global_ids:
            continue
        entries, plan_meshes = decode_structure(plan.structure)
        meshes.update((mesh.id, mesh) for mesh in plan_meshes)
        global_ids[plan.structure] = row = []
        own[plan.structure] = np.asarray([entry.alias_of is None for entry in entries], bool)
        for entry in entries:
            known = ids.setdefault(entry.fqn, len(tensors))
            if known == len(tensors):
                tensors.append(entry)
            row.append(known)
            problems.extend(_contradictions(tensors[known], entry, plan.rank))
            tensors[known] = _united(tensors[known], entry)
    if problems:
        raise IncompletePlan(
            f"ranks contradict each other:\n{summarise(problems)}\n"
            f"give different tensors different names (pipeline stages: global layer names)",
            problems=tuple(problems),
        )
    is_own = np.zeros(len(tensors), bool)
    for plan in plans:
        # A rank whose shard is empty cannot tell that it is tied, and has no say.
        held = plan.tensor[own[plan.structure][plan.tensor]]
        is_own[np.asarray(global_ids[plan.structure], np.int64)[held]] = True
    return _Union(tuple(tensors), meshes, global_ids, is_own)


def _united(known: TensorEntry, entry: TensorEntry) -> TensorEntry:
    best = entry if known.kind == "replicated" and entry.kind == "sharded" else known
    alias = known.alias_of or entry.alias_of
    return best if best.alias_of == alias else best.model_copy(update={"alias_of": alias})


def _contradictions(known: TensorEntry, entry: TensorEntry, rank: int) -> list[Problem]:
    per_rank = "per_rank" in (known.kind, entry.kind)
    return [
        Problem(
            entry.fqn,
            name,
            f"rank {rank} says {getattr(entry, name)!r}, a rank before it {getattr(known, name)!r}",
        )
        for name in (*_COMPARED, *(("kind",) if per_rank else ()))
        if getattr(entry, name) != getattr(known, name)
    ]


def _concatenate(plans: Sequence[LocalPlan], union: _Union) -> tuple[Table, npt.NDArray[np.uint64]]:
    width = max((plan.offsets.shape[1] for plan in plans), default=1) + 1
    tables = []
    for plan in plans:
        ids = np.asarray(union.global_ids[plan.structure], np.int64)
        tables.append(
            Table(
                ids[plan.tensor] if len(ids) else plan.tensor.astype(np.int64),
                np.full(len(plan.tensor), plan.rank, np.int64),
                resize(plan.offsets, width, 0),
                resize(plan.sizes, width, 1),
            )
        )
    digest = np.concatenate([np.ascontiguousarray(plan.digest) for plan in plans])
    return Table.concatenate(tables), digest.view(np.uint64).reshape(-1, 2)


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


def _drop_aliases(
    table: Table,
    digests: npt.NDArray[np.uint64],
    tensors: tuple[TensorEntry, ...],
    union: _Union,
) -> tuple[Table, npt.NDArray[np.uint64], tuple[TensorEntry, ...]]:
    """Keep no chunk of a tensor that every rank holding it calls an alias.

    Where pipeline stages hold the two ends apart, some rank holds the second name as its own
    tensor, and its bytes are stored.
    """
    resolved = list(tensors)
    is_alias = np.zeros(len(tensors) + 1, bool)
    for position, entry in enumerate(tensors):
        if entry.alias_of is None:
            continue
        if union.is_own[position]:
            resolved[position] = entry.model_copy(update={"alias_of": None})
        else:
            is_alias[position] = True
            resolved[position] = entry.model_copy(update={"kind": "alias"})
    keep = ~is_alias[table.tensor]
    return table.take(keep), digests[keep], tuple(resolved)


def _row_groups(table: Table) -> npt.NDArray[np.int64]:
    """Number rows so that two get the same number exactly if tensor and box are equal."""
    if not len(table.tensor):
        return np.zeros(0, np.int64)
    key = np.column_stack([table.tensor, table.offsets, table.sizes])
    mix = np.uint64(0x9E3779B97F4A7C15)
    hashed = np.zeros(len(key), np.uint64)
    with np.errstate(over="ignore"):
        for column in key.T:
            hashed = (hashed ^ column.astype(np.uint64)) * mix
            hashed ^= hashed >> np.uint64(29)
    _, first, group = np.unique(hashed, return_index=True, return_inverse=True)
    if not np.array_equal(key[first][group], key):  # two boxes met under one hash
        _, group = np.unique(key, axis=0, return_inverse=True)
    return group.reshape(-1).astype(np.int64)


def _deduplicate(
    table: Table, digests: npt.NDArray[np.uint64], tensors: tuple[TensorEntry, ...]
) -> tuple[Table, list[list[int]]]:
    """One row a distinct chunk, and the ranks that hold it.

    Raises:
        ReplicaMismatch: Chunks that no placement proves equal have different digests.
    """
    group = _row_groups(table)
    order = np.lexsort((table.rank, group))
    group, rows, prints = group[order], table.take(order), digests[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]]) if len(group) else group
    counts = np.diff(np.r_[starts, len(group)])
    leader = np.repeat(starts, counts)
    wrong = np.flatnonzero((prints != prints[leader]).any(axis=1))
    if len(wrong):
        _refuse_replicas(rows, wrong, leader, tensors)
    bounds = np.r_[starts, len(group)].tolist()
    ranks = rows.rank.tolist()
    holders = [ranks[a:b] for a, b in pairwise(bounds)]
    return rows.take(starts), holders


def _refuse_replicas(
    rows: Table, wrong: npt.NDArray[Any], leader: I64, tensors: Sequence[TensorEntry]
) -> None:
    found: dict[str, set[int]] = {}
    for row in wrong.tolist():
        ranks = found.setdefault(tensors[int(rows.tensor[row])].fqn, set())
        ranks.update((int(rows.rank[row]), int(rows.rank[leader[row]])))
    problems = tuple(
        Problem(fqn, "replica", f"ranks {sorted(ranks)} hold different values")
        for fqn, ranks in found.items()
    )
    raise ReplicaMismatch(
        f"tensors taken for replicas differ between ranks:\n{summarise(problems)}\n"
        f"declare them per_rank, choose one by from_rank, or hand in DTensors that say how they "
        f"are sharded",
        problems=problems,
    )


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
    unique: Table, holders: list[list[int]], tensors: tuple[TensorEntry, ...], world_size: int
) -> Table:
    itemsize = np.asarray([ITEMSIZES[entry.dtype] for entry in tensors] or [1], np.int64)
    size = unique.sizes.prod(axis=1) * itemsize[unique.tensor]
    alone = np.asarray([len(h) == 1 for h in holders], bool)
    loads = np.zeros(world_size, np.int64)
    np.add.at(loads, unique.rank[alone], size[alone])
    shared = np.flatnonzero(~alone)
    writers, to_cut = assign_writers(
        size[shared], [holders[i] for i in shared.tolist()], loads, cut_bytes=CUT_BYTES
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
        writing = sorted(holders[row], key=lambda h: (loads[h], h))[:num_pieces]
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
