"""Compare a checkpoint with the state that wants to load it, before anything changes.

Everything is reported at once: what is missing, what is unexpected, shapes, dtypes, ties and
topology, each with a severity and a reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from dcp_resume.manifest.models import TensorEntry
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.planning.flattening import part_of
from dcp_resume.planning.state import PER_RANK_LEAVES, SHARED_LEAVES, LocalState
from dcp_resume.session.compare_layouts import compare_segments, compare_shapes, compare_ties
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.values import own_box

__all__ = ["LoadReport", "Strictness", "compare_state"]


class Strictness(Enum):
    """What a missing or unexpected name means."""

    RAISE = "raise"
    WARN = "warn"
    IGNORE = "ignore"

    @property
    def severity(self) -> Severity:
        """The severity of a missing or unexpected name."""
        return {"raise": Severity.REFUSE, "warn": Severity.WARN, "ignore": Severity.OK}[self.value]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Every difference between a checkpoint and the states of all ranks; equal on all ranks."""

    step: int
    items: tuple[ReportItem, ...]

    @property
    def severity(self) -> Severity:
        """The worst severity of any item."""
        return max((item.severity for item in self.items), default=Severity.OK)

    def of(self, severity: Severity) -> tuple[ReportItem, ...]:
        """The items of one severity."""
        return tuple(item for item in self.items if item.severity is severity)

    def __str__(self) -> str:
        if not self.items:
            return f"step {self.step}: the checkpoint fits the state"
        return "\n".join(map(str, self.items))

    def to_bytes(self) -> bytes:
        """Serialise for another rank."""
        rows = [[int(i.severity), i.kind, i.where, i.message] for i in self.items]
        return json.dumps([self.step, rows]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> LoadReport:
        """Read what ``to_bytes`` wrote."""
        step, rows = json.loads(data)
        items = (ReportItem(Severity(s), kind, where, text) for s, kind, where, text in rows)
        return cls(step, tuple(items))

    @classmethod
    def united(cls, reports: Sequence[LoadReport]) -> LoadReport:
        """One report over all ranks: equal items once, the worst first.

        A name is unexpected only if no rank has it, because pipeline stages hold parts; and stages
        are in a wrong order only if each rank's are.
        """
        seen = Counter(item for report in reports for item in set(report.items))
        items = (
            item
            for item, count in seen.items()
            if item.kind not in ("unexpected", "stages") or count == len(reports)
        )
        return cls(reports[0].step, tuple(sorted(items, key=_by_weight)))


def _by_weight(item: ReportItem) -> tuple[int, bool, ReportItem]:
    """The worst first; names that are absent last, since another difference often explains them."""
    return -item.severity, item.kind in ("missing", "unexpected"), item


def _is_hidden(entry: TensorEntry) -> bool:
    return entry.codec == "leaves" and entry.fqn.startswith((PER_RANK_LEAVES, SHARED_LEAVES))


def compare_state(
    opened: OpenedCheckpoint,
    state: LocalState,
    stored_values: Iterable[str],
    *,
    rank: int,
    world_size: int,
    strictness: Strictness,
    is_wanted: Callable[[str], bool],
) -> LoadReport:
    """Compare one rank's state with the checkpoint.

    Args:
        opened: The checkpoint.
        state: The rank's state.
        stored_values: FQNs of the non-tensor leaves that the checkpoint holds for this rank.
        rank: The rank.
        world_size: Ranks that load.
        strictness: Of missing and unexpected names.
        is_wanted: Whether the caller asked for an FQN of the checkpoint (its part is selected).
    """
    state.check_place(rank, world_size)
    stored = {e.fqn: e for e in opened.catalog.tensors if not _is_hidden(e)}
    values = set(stored_values)
    stored_meshes = {mesh.id: mesh for mesh in opened.manifest.topology.meshes}
    meshes = {mesh.id: mesh for mesh in state.meshes}
    items: list[ReportItem] = []
    for held in state.tensors:
        fqn = held.entry.fqn
        entry = stored.get(state.stored_name(fqn, stored) or "")
        if any(_is_expanded(piece.memory) for piece in held.pieces):
            message = "it is expanded: several of its elements are one; hand in a clone"
            items.append(ReportItem(Severity.REFUSE, "layout", fqn, message))
        if entry is None:
            items.append(_missing(fqn, fqn in values, strictness))
        else:
            items.extend(_compare_entry(entry, held.entry))
            items.extend(compare_segments(fqn, entry, held.entry, stored_meshes, meshes))
            is_same_world = opened.manifest.topology.world_size == world_size
            is_expected = entry.kind == "per_rank" and is_same_world
            if is_expected and own_box(opened, entry.fqn, rank, world_size) is None:
                items.append(_missing(entry.fqn, False, strictness))
    kept = _parts_kept(opened, world_size)
    absent = [fqn for fqn in state.values if fqn not in values]
    absent += [
        fqn
        for fqn, (path, _) in state.per_rank_values.items()
        if fqn not in values and part_of(path) not in kept
    ]
    items.extend(_missing(fqn, fqn in stored, strictness) for fqn in absent)
    items.extend(compare_ties(opened, state))
    wanted = {held.entry.fqn for held in state.tensors} | set(state.values)
    wanted |= set(state.per_rank_values)
    present = {fqn for fqn in (*stored, *values) if is_wanted(fqn)}
    left = (fqn for fqn in present - wanted if wanted.isdisjoint(state.ties.names(fqn)))
    items.extend(_unexpected(sorted(left), strictness))
    items.extend(_compare_topology(opened, world_size))
    return LoadReport(opened.manifest.step, tuple(items))


def _is_expanded(memory: torch.Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(memory.shape, memory.stride(), strict=True))


def _parts_kept(opened: OpenedCheckpoint, world_size: int) -> set[str]:
    """Parts whose per-rank values belong to another number of ranks: every rank keeps its own."""
    if opened.manifest.topology.world_size == world_size:
        return set()
    names = (entry.fqn for entry in opened.catalog.tensors)
    return {n.removeprefix(PER_RANK_LEAVES) for n in names if n.startswith(PER_RANK_LEAVES)}


def _missing(fqn: str, is_other_kind: bool, strictness: Strictness) -> ReportItem:
    if is_other_kind:
        message = "the checkpoint holds a value where the state has a tensor, or the reverse"
        return ReportItem(Severity.REFUSE, "kind", fqn, message)
    message = "the state has it, the checkpoint does not"
    return ReportItem(strictness.severity, "missing", fqn, message)


def _unexpected(fqns: Sequence[str], strictness: Strictness) -> list[ReportItem]:
    message = "the checkpoint has it, the state does not"
    return [ReportItem(strictness.severity, "unexpected", fqn, message) for fqn in fqns]


def _compare_entry(stored: TensorEntry, wanted: TensorEntry) -> list[ReportItem]:
    items: list[ReportItem] = []
    fqn = wanted.fqn
    is_per_rank = stored.kind == "per_rank"
    if is_per_rank != (wanted.kind == "per_rank"):
        message = "it is per-rank on one side only; declare it alike"
        items.append(ReportItem(Severity.REFUSE, "kind", fqn, message))
    items.extend(compare_shapes(fqn, stored, wanted))
    if stored.dtype != wanted.dtype:
        message = f"saved as {stored.dtype}, the state has {wanted.dtype}"
        items.append(ReportItem(Severity.REFUSE, "dtype", fqn, message))
    return items


def _compare_topology(opened: OpenedCheckpoint, world_size: int) -> list[ReportItem]:
    saved = opened.manifest.topology.world_size
    items: list[ReportItem] = []
    if saved != world_size:
        message = f"saved on {saved} rank(s), loaded on {world_size}: resharded"
        items.append(ReportItem(Severity.OK, "topology", "topology.world_size", message))
    per_rank = [e.part for e in opened.catalog.tensors if e.kind == "per_rank"]
    if per_rank and saved != world_size:
        message = (
            f"per-rank leaves of {', '.join(sorted(set(per_rank)))} were saved on {saved} rank(s); "
            f"on {world_size} every rank keeps its own"
        )
        items.append(ReportItem(Severity.WARN, "per_rank", "topology.world_size", message))
    return items
