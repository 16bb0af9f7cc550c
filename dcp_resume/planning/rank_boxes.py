"""What each rank of a target mesh holds, and so reads, of a stored checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.layout_rules import TargetMesh
from dcp_resume.planning.layouts import StoredState, TargetLayout, shard_boxes

__all__ = ["RankBoxes"]


class RankBoxes:
    """The boxes of each rank of a mesh.

    Args:
        source: What is stored.
        mesh: The target ranks.
        layout: What ``plan_layout`` makes of both.
    """

    def __init__(self, source: StoredState, mesh: TargetMesh, layout: TargetLayout) -> None:
        self._source = source
        self._mesh = mesh
        self._tensors = layout.plan.tensors
        self._stage_ids = [stage.id for stage in mesh.stage_meshes()]
        self._known: dict[tuple[object, ...], list[Box]] = {}

    def of(self, rank: int) -> frozenset[tuple[str, Box]]:
        """FQN of a stored tensor, and a box of it; of an alias that of what it stands for."""
        stage, place = divmod(rank, self._mesh.ranks_a_stage)
        sizes = tuple(axis.size for axis in self._mesh.inner)
        unraveled = np.unravel_index(place, sizes) if sizes else ()
        coordinates = tuple(int(number) for number in unraveled)
        return frozenset(
            (entry.alias_of or entry.fqn, box)
            for entry in self._tensors
            if entry.mesh is None or entry.mesh == self._stage_ids[stage]
            for box in self._boxes(entry, rank, coordinates)
            if box.volume
        )

    def _boxes(self, entry: TensorEntry, rank: int, coordinates: tuple[int, ...]) -> Iterator[Box]:
        if entry.kind == "per_rank":
            yield from (box for own, box in self._source.per_rank[entry.fqn] if own == rank)
            return
        key = (entry.global_shape, tuple(sorted(entry.rule.items())), coordinates)
        if key not in self._known:
            self._known[key] = shard_boxes(
                entry.global_shape, entry.rule, self._mesh.inner, coordinates
            )
        yield from self._known[key]
