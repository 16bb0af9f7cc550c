"""Chunks that several ranks hold, or one rank under several names: compared, and kept once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import Problem, ReplicaMismatch
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.table import Table
from dcp_resume.planning.union import Union
from dcp_resume.problems import summarise

__all__ = ["Holders", "Named", "deduplicate", "join_aliases"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Named:
    """The chunks of all ranks, those of further names counted as the first name's."""

    table: Table
    digests: npt.NDArray[np.uint64]
    """``[n, 2]``"""
    offered_as: I64
    """``[n]`` the tensor under whose name a rank holds the chunk."""
    tensors: tuple[TensorEntry, ...]
    first: Mapping[int, int]
    """Tensor → the tensor that it is an alias of, by position."""


def join_aliases(
    table: Table,
    digests: npt.NDArray[np.uint64],
    tensors: tuple[TensorEntry, ...],
    union: Union,
) -> Named:
    """Count the chunks of a tensor that every rank holding it calls an alias as the other's.

    Where some rank holds the second name as its own tensor, or none holds the first, its bytes are
    stored under its own name.

    Raises:
        ReplicaMismatch: Tensors that are declared to be tied differ in dtype, shape or layout.
    """
    ids = {entry.fqn: position for position, entry in enumerate(tensors)}
    resolved = list(tensors)
    first: dict[int, int] = {}
    for position, entry in enumerate(tensors):
        if entry.alias_of is None:
            continue
        other = ids.get(entry.alias_of)
        is_first = other is not None and (union.is_own[other] or tensors[other].alias_of is None)
        if other is None or not is_first or union.is_own[position]:
            resolved[position] = entry.model_copy(update={"alias_of": None})
        else:
            first[position] = other
            resolved[position] = entry.model_copy(update={"kind": "alias"})
    _refuse_unlike(tensors, first)
    moved = np.arange(len(tensors), dtype=np.int64)
    moved[list(first)] = list(first.values())
    joined = Table(moved[table.tensor], table.rank, table.offsets, table.sizes)
    return Named(joined, digests, table.tensor, tuple(resolved), first)


_ALIKE = ("dtype", "global_shape", "segments", "padding")


def _refuse_unlike(tensors: Sequence[TensorEntry], first: Mapping[int, int]) -> None:
    problems = tuple(
        Problem(
            tensors[position].fqn,
            "tied",
            f"it has {name} {getattr(tensors[position], name)!r}, {tensors[other].fqn}, to which "
            f"it is tied, {getattr(tensors[other], name)!r}",
        )
        for position, other in first.items()
        for name in _ALIKE
        if getattr(tensors[position], name) != getattr(tensors[other], name)
    )
    if problems:
        raise ReplicaMismatch(
            f"tied tensors are not alike:\n{summarise(problems)}\ndo not declare them to be tied",
            problems=problems,
        )


@dataclass(frozen=True, slots=True)
class Holders:
    """The ranks that hold each distinct chunk, end to end."""

    ranks: I64
    """Ascending for each chunk; twice where a rank holds it under two names."""
    starts: I64
    """``[chunks]`` where each chunk's ranks begin."""
    counts: I64
    """``[chunks]``"""

    @property
    def is_shared(self) -> npt.NDArray[np.bool_]:
        """``[chunks]`` whether more than one rank holds it."""
        last = self.starts + self.counts - 1
        return np.asarray(self.ranks[self.starts] != self.ranks[last])

    def of(self, chunk: int) -> list[int]:
        """The ranks that hold a chunk, each once."""
        start = int(self.starts[chunk])
        return list(dict.fromkeys(self.ranks[start : start + int(self.counts[chunk])].tolist()))


def _grouped(table: Table) -> tuple[I64, npt.NDArray[np.bool_]]:
    """Rows in an order that makes equal chunks neighbours, and which of them begins a group.

    Equal rows keep the order of the table.
    """
    if not len(table.tensor):
        return np.zeros(0, np.int64), np.zeros(0, bool)
    columns = [table.tensor, *table.offsets.T, *table.sizes.T]
    mix = np.uint64(0x9E3779B97F4A7C15)
    hashed = np.zeros(len(table.tensor), np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            hashed = (hashed ^ column.astype(np.uint64)) * mix
            hashed ^= hashed >> np.uint64(29)
    order = np.argsort(hashed, kind="stable")
    begins = np.r_[True, np.diff(hashed[order]) != 0]
    members, before = order[1:][~begins[1:]], order[:-1][~begins[1:]]
    if all(np.array_equal(column[members], column[before]) for column in columns):
        return order, begins
    order = np.lexsort(columns[::-1])  # two boxes met under one hash
    differ = [column[order[1:]] != column[order[:-1]] for column in columns]
    return order, np.r_[True, np.logical_or.reduce(differ)]


def deduplicate(named: Named) -> tuple[Table, Holders]:
    """One row a distinct chunk, in the order of its first rank, and the ranks that hold it.

    Raises:
        ReplicaMismatch: Chunks that no placement proves equal have different digests, or a tied
            tensor is cut otherwise than the one that it is tied to.
    """
    order, begins = _grouped(named.table)
    starts = np.flatnonzero(begins)
    counts = np.diff(starts, append=len(order))
    _compare(named, order, starts, counts)
    place = np.zeros(len(order), np.int64)
    place[order[starts]] = np.arange(len(starts))
    is_first = np.zeros(len(order), bool)
    is_first[order[starts]] = True
    kept = np.flatnonzero(is_first)
    groups = place[kept]
    holders = Holders(named.table.rank[order], starts[groups], counts[groups])
    return named.table.take(kept), holders


def _compare(named: Named, order: I64, starts: I64, counts: I64) -> None:
    leader = np.repeat(starts, counts)
    copies = np.flatnonzero(leader != np.arange(len(order)))
    differ = named.digests[order[copies]] != named.digests[order[leader[copies]]]
    wrong = copies[differ.any(axis=1)]
    if not len(wrong) and not named.first:
        return
    rows, offered_as = named.table.take(order), named.offered_as[order]
    if len(wrong):
        _refuse_tied(named, rows, offered_as, leader, wrong)
        _refuse_replicas(rows, wrong, leader, named.tensors)
    if len(starts):
        has_first = np.logical_or.reduceat(offered_as == rows.tensor, starts)
        _refuse_cut(named, rows, offered_as, np.flatnonzero(~np.repeat(has_first, counts)))


def _refuse_tied(
    named: Named, rows: Table, offered_as: I64, leader: I64, wrong: npt.NDArray[Any]
) -> None:
    """Refuse what differs under two names; under one name it is no tie that failed."""
    found: dict[tuple[int, int], set[int]] = {}
    for row in wrong.tolist():
        a, b = int(offered_as[row]), int(offered_as[leader[row]])
        pair = (a, b) if a in named.first else (b, a)
        found.setdefault(pair, set()).update((int(rows.rank[row]), int(rows.rank[leader[row]])))
    problems = tuple(
        Problem(
            named.tensors[a].fqn,
            "tied",
            f"it differs from {named.tensors[b].fqn}, to which it is tied (ranks {sorted(ranks)})",
        )
        for (a, b), ranks in found.items()
        if a != b
    )
    if problems:
        raise ReplicaMismatch(
            f"tied tensors differ:\n{summarise(problems)}\nadd up their gradients on both stages "
            f"before each step, or do not declare them to be tied",
            problems=problems,
        )


def _refuse_cut(named: Named, rows: Table, offered_as: I64, alone: npt.NDArray[Any]) -> None:
    names = {(int(offered_as[row]), int(rows.tensor[row])) for row in alone.tolist()}
    problems = tuple(
        Problem(
            named.tensors[a].fqn,
            "tied",
            f"it is cut otherwise than {named.tensors[b].fqn}, to which it is tied, so that they "
            f"cannot be compared",
        )
        for a, b in sorted(names)
    )
    if problems:
        raise ReplicaMismatch(
            f"tied tensors have no common chunks:\n{summarise(problems)}\nsplit both alike, or do "
            f"not declare them to be tied",
            problems=problems,
        )


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
        f"declare them per_rank, choose one by from_rank, or say how they are sharded, by a "
        f"declared layout or by DTensors",
        problems=problems,
    )
