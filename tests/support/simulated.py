"""Checkpoints of many ranks, saved in one process: each simulated rank writes its part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_resume.manifest.models import MeshEntry, TensorEntry, TrainerFacts
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.flattening import fqn_of, part_of
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.placements import AxisSplit, HeldBox, held_boxes
from dcp_resume.planning.state import LocalState
from dcp_resume.session.attempt import Attempt
from dcp_resume.session.chunk_sources import RankSource
from dcp_resume.session.commit import Committed, choose_newest
from dcp_resume.session.copies import AtOnce
from dcp_resume.session.documents import Facts
from dcp_resume.session.ownership import own_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.staging import Borrowed, BufferPool
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.session.writing import stage_rank, write_rank
from dcp_resume.storage import open_store

__all__ = ["SimulatedMesh", "boxes_of", "save_simulated"]

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class SimulatedMesh:
    """Axes with their sizes, outermost first."""

    axes: Mapping[str, int]

    @property
    def world_size(self) -> int:
        size = 1
        for extent in self.axes.values():
            size *= extent
        return size

    @property
    def entry(self) -> MeshEntry:
        return MeshEntry(id="mesh", axes=tuple(self.axes), shape=tuple(self.axes.values()))


def boxes_of(
    shape: Sequence[int], placements: Sequence[str], mesh: MeshEntry, rank: int
) -> list[HeldBox]:
    """What a rank holds, from the catalog's placements alone; none outside the mesh."""
    ranks = mesh.ranks or tuple(range(torch.Size(mesh.shape).numel()))
    if rank not in ranks:
        return []
    left, coordinates = ranks.index(rank), []
    for size in reversed(mesh.shape):
        coordinates.insert(0, left % size)
        left //= size
    splits: list[list[AxisSplit]] = [[] for _ in shape]
    for placement, size, coordinate in zip(placements, mesh.shape, coordinates, strict=True):
        numbers = [int(number) for number in re.findall(r"\d+", placement)]
        if numbers:
            factor = numbers[1] if len(numbers) > 1 else 1
            splits[numbers[0]].append(AxisSplit(size, coordinate, factor))
    return held_boxes(tuple(shape), splits)


@dataclass
class _Rank:
    mesh: SimulatedMesh
    rank: int
    tensors: list[HeldTensor] = field(default_factory=list)

    def add(self, path: tuple[str, ...], tensor: torch.Tensor, rule: Mapping[str, int]) -> None:
        placements = tuple(f"S({rule[a]})" if a in rule else "R" for a in self.mesh.axes)
        layer = _LAYER.search(fqn_of(path))
        entry = TensorEntry(
            fqn=fqn_of(path),
            path=path,
            part=part_of(path),
            dtype=str(tensor.dtype).removeprefix("torch."),
            global_shape=tuple(tensor.shape),
            kind="sharded" if rule else "replicated",
            mesh="mesh",
            placements=placements,
            rule=dict(rule),
            layer=int(layer[1]) if layer else None,
        )
        held = boxes_of(tensor.shape, placements, self.mesh.entry, self.rank)
        local = tensor[tuple(map(slice, held[0].box.offsets, held[0].box.stops))] if held else None
        empty = torch.empty(0, dtype=tensor.dtype)
        self.tensors.append(HeldTensor.of(entry, empty if local is None else local, held))


def save_simulated(
    url: str,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    rules: Mapping[str, Mapping[str, int]],
    mesh: SimulatedMesh,
    *,
    values: Mapping[str, Any] | None = None,
    per_rank: Mapping[str, Sequence[Any]] | None = None,
) -> Committed:
    """Save whole tensors as the ranks of ``mesh`` would.

    Args:
        url: Root of the run.
        step: Step to commit.
        tensors: Dotted name → whole tensor; the first word is the part.
        rules: Dotted name → axis → dim.
        mesh: The simulated ranks.
        values: Dotted name → shared value.
        per_rank: Dotted name → a value for each rank.
    """
    store = open_store(url)
    run = own_run(store, RunLog(store), LonelyVotes(), choose_newest, is_probed=False)
    states: list[LocalState] = []
    for rank in range(mesh.world_size):
        simulated = _Rank(mesh, rank)
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            simulated.add((part, rest), tensor, rules.get(name, {}))
        states.append(
            LocalState(
                tuple(simulated.tensors),
                (mesh.entry,),
                {
                    name: (tuple(name.split(".", 1)), value)
                    for name, value in (values or {}).items()
                },
                {
                    name: (tuple(name.split(".", 1)), each[rank])
                    for name, each in (per_rank or {}).items()
                },
            )
        )
    plans = [
        local_plan(state, rank, mesh.world_size, Declarations())
        for rank, state in enumerate(states)
    ]
    attempt = Attempt.begin(run, merge(plans), step)
    reports = []
    for rank, state in enumerate(states):
        order, plan = attempt.order, attempt.plan.rank_plan(rank)
        source = RankSource(state.tensors, state.per_rank_leaves)
        staged = stage_rank(plan, source, Borrowed(BufferPool()), AtOnce())
        reports.append(write_rank(staged, store, order.prefix, order.block_size))
    trainer = TrainerFacts(step=step, consumed_samples=7 * step, metrics={"loss": 1.5})
    return attempt.commit(reports, Facts(trainer, {"layers": 4}))
