"""Merge the local plans of all ranks into the plan of a save.

Shapes are merged, and files laid out, once for all saves of one structure; contents are compared
and merged each time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dcp_resume.format.digests import digest_bytes
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.files import FileLayout, lay_out_files
from dcp_resume.planning.merged_shapes import LocalIds, MergedShapes, merge_shapes
from dcp_resume.planning.plans import LocalPlan, PlanContents, RankPlan, leaves_entry
from dcp_resume.planning.state import SHARED_LEAVES
from dcp_resume.planning.table import Table
from dcp_resume.planning.values import merge_values

__all__ = ["GlobalPlan", "MergeMemory", "merge"]


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """What all ranks write, and what catalog and index will say."""

    world_size: int
    meshes: tuple[MeshEntry, ...]
    manifest_values: Mapping[str, tuple[Any, Any]]
    """Shared values that go into the manifest: FQN → path, encoded value."""
    num_values: Mapping[str, int]
    """Part → number of its non-tensor leaves."""
    layout: FileLayout
    local_ids: tuple[LocalIds, ...]
    """Per rank; one for all ranks of one structure."""
    inline: Mapping[str, bytes]
    """FQN → bytes that the coordinator itself writes."""

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Of the catalog."""
        return self.layout.tensors

    @property
    def stages(self) -> tuple[tuple[int, ...], ...] | None:
        """Per pipeline stage the global layers it holds, where the layers' names tell them apart.

        None if all ranks hold the same layers.
        """
        held = {
            tuple(sorted({layer for g in ids if (layer := self.tensors[g].layer) is not None}))
            for ids in (held.held() for held in {id(i): i for i in self.local_ids}.values())
        }
        stages = sorted(layers for layers in held if layers)
        are_apart = sum(map(len, stages)) == len({layer for s in stages for layer in s})
        return tuple(stages) if len(stages) > 1 and are_apart else None

    def rank_plan(self, rank: int) -> RankPlan:
        """The part of the plan that ``rank`` carries out."""
        files, file, rows = self.layout.of_rank(rank)
        chunks = self.layout.chunks
        tensor, box = chunks.tensor[rows], chunks.box[rows]
        local, renamed = self.local_ids[rank].find(tensor)
        return RankPlan(
            files=files,
            file=file,
            tensor=local,
            ordinal=self.layout.ordinal[rows],
            offsets=chunks.boxes.offsets.take(box, axis=0),
            sizes=chunks.boxes.sizes.take(box, axis=0),
            names={row: self.tensors[tensor[row]].fqn for row in renamed},
            inline=self.inline if rank == 0 else {},
        )


class MergeMemory:
    """The last plan of one coordinator, without its values."""

    def __init__(self) -> None:
        self._shapes: MergedShapes | None = None
        self._laid_out: _LaidOut | None = None

    @property
    def fingerprint(self) -> bytes:
        """16 bytes over all ranks' shapes and the sizes of the values that the coordinator writes.

        Equal ones have equal rank plans. Empty before the first plan.
        """
        return self._laid_out.fingerprint if self._laid_out else b""

    def merge(self, plans: Sequence[LocalPlan]) -> GlobalPlan:
        """Merge one plan of each rank, in order of rank.

        Raises:
            IncompletePlan: Ranks contradict each other about a tensor, or the chunks of one do not
                tile it.
            InvalidDocument: A rank names a box that it does not list.
            ReplicaMismatch: Assumed replicas, tied tensors, or values without a declaration differ.
        """
        self._laid_out = None
        self._shapes = merge_shapes([plan.shape for plan in plans])
        return self.renew([plan.contents for plan in plans])

    def renew(self, contents: Sequence[PlanContents]) -> GlobalPlan:
        """The plan of a further save, of ranks whose shapes are those of the last one.

        Args:
            contents: One of each rank, in order of rank.

        Raises:
            IncompletePlan: A value is not offered by the rank that was declared to.
            ReplicaMismatch: Assumed replicas, tied tensors, or values without a declaration differ.
        """
        assert self._shapes is not None
        self._shapes.comparison.check([offered.digests for offered in contents])
        values, inline, num_values = merge_values([offered.values for offered in contents])
        sizes = {fqn: len(data) for fqn, data in inline.items()}
        laid_out = self._laid_out
        if laid_out is None or laid_out.inline_sizes != sizes:
            laid_out = self._laid_out = _LaidOut.of(self._shapes, sizes)
            # One table of all chunks is enough to keep: their order does not matter to a layout.
            chunks = laid_out.layout.chunks
            own = chunks.where(chunks.tensor < len(self._shapes.tensors))
            own = replace(own, boxes=self._shapes.written.boxes)  # theirs come first
            self._shapes = replace(self._shapes, written=own)
        return GlobalPlan(
            world_size=self._shapes.world_size,
            meshes=self._shapes.meshes,
            manifest_values=values,
            num_values=num_values,
            layout=laid_out.layout,
            local_ids=self._shapes.local_ids,
            inline=inline,
        )


def merge(plans: Sequence[LocalPlan]) -> GlobalPlan:
    """Merge one plan of each rank, in order of rank; see ``MergeMemory.merge``."""
    return MergeMemory().merge(plans)


@dataclass(frozen=True, slots=True)
class _LaidOut:
    """Merged shapes in files, with room for the values that the coordinator writes."""

    inline_sizes: Mapping[str, int]
    fingerprint: bytes
    layout: FileLayout

    @classmethod
    def of(cls, shapes: MergedShapes, inline_sizes: Mapping[str, int]) -> _LaidOut:
        tensors, written = shapes.tensors, shapes.written
        for fqn, size in inline_sizes.items():
            part = fqn.removeprefix(SHARED_LEAVES)
            tensors = (*tensors, leaves_entry(fqn, part, size, is_per_rank=False))
            written = Table.concatenate([written, _inline_row(len(tensors) - 1, size)])
        room = repr(list(inline_sizes.items())).encode()
        fingerprint = digest_bytes([shapes.fingerprint, room])
        return cls(inline_sizes, fingerprint, lay_out_files(written, tensors))


def _inline_row(tensor: int, size: int) -> Table:
    offsets, sizes = np.zeros((1, 1), np.int64), np.full((1, 1), size, np.int64)
    return Table.of([tensor], [0], offsets, sizes)
