"""Chunks that several ranks hold, or one rank under several names: compared, and kept once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import IncompletePlan, Problem, ReplicaMismatch
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.row_order import stable_order
from dcp_resume.planning.table import Table
from dcp_resume.planning.union import Union
from dcp_resume.problems import summarise

__all__ = ["Comparison", "Holders", "Named", "deduplicate", "join_aliases"]

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Named:
    """The chunks of all ranks, those of further names counted as the first name's."""

    table: Table
    """Its boxes are listed once each."""
    evidence: I32
    """``[n]`` position of the chunk's digest among all that the ranks send; -1 for none."""
    offered_as: I32
    """``[n]`` the tensor under whose name a rank holds the chunk."""
    tensors: tuple[TensorEntry, ...]
    first: Mapping[int, int]
    """Tensor → the tensor that it is an alias of, by position."""


def join_aliases(
    table: Table,
    evidence: I32,
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
    moved = np.arange(len(tensors), dtype=np.int32)
    moved[list(first)] = list(first.values())
    joined = Table(moved[table.tensor], table.rank, table.box, table.boxes) if first else table
    return Named(joined, evidence, table.tensor, tuple(resolved), first)


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

    ranks: I32
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which of the ranks' digests must be equal: ``c`` copies, each with the first of its kind."""

    num_digests: int
    """Of all ranks."""
    digest: I32
    """``[c, 2]`` positions among the ranks' digests, end to end; -1 where a rank sends none."""
    rank: I32
    """``[c, 2]``"""
    offered_as: I32
    """``[c, 2]`` the tensors under whose names the ranks hold it."""
    tensor: I32
    """``[c]``"""
    tensors: tuple[TensorEntry, ...]
    first: Mapping[int, int]
    """Tensor → the tensor that it is an alias of, by position."""

    def check(self, digests: Sequence[bytes]) -> None:
        """Compare.

        Args:
            digests: Each rank's, by rank.

        Raises:
            IncompletePlan: They are not as many as were announced.
            ReplicaMismatch: Chunks that no placement proves equal have different digests.
        """
        joined = b"".join(digests)
        if len(joined) != 16 * self.num_digests:
            message = f"ranks announced {self.num_digests} digests, sent {len(joined)} bytes"
            raise IncompletePlan(
                f"replicas cannot be compared: {message}; use one version of dcp_resume on all",
                problems=(Problem("plan", "digests", message),),
            )
        none = bytes(16)  # the last row is found at -1
        found = np.frombuffer(joined + none, np.uint64).reshape(-1, 2)
        differ = (found[self.digest[:, 0]] != found[self.digest[:, 1]]).any(axis=1)
        if differ.any():
            wrong = np.flatnonzero(differ).tolist()
            _refuse_tied(self, wrong)
            _refuse_replicas(self, wrong)


def deduplicate(named: Named) -> tuple[Table, Holders, Comparison]:
    """One row a distinct chunk, in the order of its first rank, and the ranks that hold it.

    Raises:
        ReplicaMismatch: A tied tensor is cut otherwise than the one that it is tied to.
    """
    table = named.table
    keys = table.tensor.astype(np.int64)
    keys *= len(table.boxes)
    keys += table.box
    if not named.first and _are_distinct(keys):
        order, counts = np.arange(len(keys)), np.ones(len(keys), np.int64)
        return table, Holders(table.rank, order, counts), _comparison(named, order, order, counts)
    order, keys = stable_order(keys)
    begins = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    starts = np.flatnonzero(begins)
    counts = np.diff(starts, append=len(order))
    _refuse_cut(named, order, starts, counts)
    comparison = _comparison(named, order, starts, counts)
    place = np.zeros(len(order), np.int64)
    place[order[starts]] = np.arange(len(starts))
    is_first = np.zeros(len(order), bool)
    is_first[order[starts]] = True
    groups = place[is_first]
    holders = Holders(table.rank[order], starts[groups], counts[groups])
    return table.where(is_first), holders, comparison


def _are_distinct(keys: I64) -> bool:
    ascending = np.sort(keys)
    return bool((ascending[1:] != ascending[:-1]).all())


def _comparison(named: Named, order: I64, starts: I64, counts: I64) -> Comparison:
    if len(starts) == len(order):
        copies = originals = np.zeros(0, np.int64)
    else:
        is_copy = np.ones(len(order), bool)
        is_copy[starts] = False
        copies, originals = order[is_copy], order[np.repeat(starts, counts)[is_copy]]
        sent = (named.evidence[copies] >= 0) | (named.evidence[originals] >= 0)
        copies, originals = copies[sent], originals[sent]
    rows = np.column_stack((copies, originals))
    return Comparison(
        num_digests=int(named.evidence.max(initial=-1)) + 1,
        digest=named.evidence[rows],
        rank=named.table.rank[rows],
        offered_as=named.offered_as[rows],
        tensor=named.table.tensor[copies],
        tensors=named.tensors,
        first=named.first,
    )


def _refuse_tied(compared: Comparison, wrong: Sequence[int]) -> None:
    """Refuse what differs under two names; under one name it is no tie that failed."""
    tensors = compared.tensors
    found: dict[tuple[int, int], set[int]] = {}
    for row in wrong:
        a, b = compared.offered_as[row].tolist()
        pair = (a, b) if a in compared.first else (b, a)
        found.setdefault(pair, set()).update(compared.rank[row].tolist())
    problems = tuple(
        Problem(
            tensors[a].fqn,
            "tied",
            f"it differs from {tensors[b].fqn}, to which it is tied (ranks {sorted(ranks)})",
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


def _refuse_cut(named: Named, order: I64, starts: I64, counts: I64) -> None:
    """Refuse tied tensors without common chunks: no digests of theirs could be compared."""
    if not named.first or not len(starts):
        return
    offered_as, tensor = named.offered_as[order], named.table.tensor[order]
    alone = ~np.repeat(np.logical_or.reduceat(offered_as == tensor, starts), counts)
    names = set(zip(offered_as[alone].tolist(), tensor[alone].tolist(), strict=True))
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


def _refuse_replicas(compared: Comparison, wrong: Sequence[int]) -> None:
    found: dict[str, set[int]] = {}
    for row in wrong:
        ranks = found.setdefault(compared.tensors[int(compared.tensor[row])].fqn, set())
        ranks.update(compared.rank[row].tolist())
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
