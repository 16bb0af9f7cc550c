"""What a load on another mesh would read, worked out without ranks and without reading data."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.box_rows import unpad_box
from dcp_resume.planning.layout_rules import LayoutRules, TargetMesh
from dcp_resume.planning.layouts import Kept, StoredState, plan_layout
from dcp_resume.planning.rank_boxes import RankBoxes
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.reading import plan_boxes

__all__ = ["RankReads", "ReadPlan", "plan_rank_reads", "stored_state"]


@dataclass(frozen=True, slots=True)
class RankReads:
    """What one rank reads of the data files; each rank reads the documents too."""

    rank: int
    needed_bytes: int
    """Bytes that the rank holds afterwards."""
    fetched_bytes: int
    """Bytes that come from storage: whole blocks, and gaps that are cheaper read than left out."""
    num_requests: int
    num_files: int

    @property
    def amplification(self) -> float:
        """Bytes fetched for each byte needed; 1 where nothing is needed."""
        return self.fetched_bytes / self.needed_bytes if self.needed_bytes else 1.0


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What all ranks read."""

    ranks: tuple[RankReads, ...]
    unique_bytes: int
    """Bytes that at least one rank needs, each counted once."""
    document_bytes: int
    """Of manifest, catalog and index."""
    kept: tuple[Kept, ...]
    """Tensors that every rank of an axis reads whole, because nothing says how it splits them."""
    dropped: tuple[str, ...]
    """Per-rank tensors, which only as many ranks as wrote them read."""

    @property
    def fetched_bytes(self) -> int:
        """Bytes that come from storage, by all ranks together."""
        return sum(rank.fetched_bytes for rank in self.ranks)

    @property
    def amplification(self) -> float:
        """Bytes fetched by all ranks for each byte that any of them needs."""
        return self.fetched_bytes / self.unique_bytes if self.unique_bytes else 1.0


def plan_rank_reads(
    opened: OpenedCheckpoint, mesh: TargetMesh, rules: LayoutRules, read_bytes: int
) -> ReadPlan:
    """Plan the reads of every rank of a mesh.

    Args:
        opened: Documents of the checkpoint.
        mesh: The ranks that would load it.
        rules: Which axis splits which dim, where the checkpoint does not say.
        read_bytes: Bytes of one request, as the store has it.

    Raises:
        ConfigurationError: The rules do not fit the tensors or the mesh.
    """
    source = stored_state(opened)
    layout = plan_layout(source, mesh, rules)
    boxes = RankBoxes(source, mesh, layout)
    known: dict[Collection[tuple[str, Box]], RankReads] = {}  # replicas read the same
    ranks: list[RankReads] = []
    for rank in range(mesh.world_size):
        wanted = boxes.of(rank)
        if wanted not in known:
            known[wanted] = _reads(opened, rank, wanted, read_bytes)
        ranks.append(replace(known[wanted], rank=rank))
    unique = {item for wanted in known for item in wanted}
    manifest = opened.manifest
    return ReadPlan(
        ranks=tuple(ranks),
        unique_bytes=_num_bytes(opened, unique),
        document_bytes=manifest.catalog.size + manifest.chunk_index.size,
        kept=layout.kept,
        dropped=layout.dropped,
    )


def _reads(
    opened: OpenedCheckpoint, rank: int, wanted: Collection[tuple[str, Box]], read_bytes: int
) -> RankReads:
    order = sorted(wanted, key=lambda item: (item[0], item[1].offsets))
    reads = plan_boxes(opened, order, read_bytes)
    return RankReads(
        rank=rank,
        needed_bytes=_num_bytes(opened, wanted),
        fetched_bytes=sum(read.stop - read.start for read in reads),
        num_requests=len(reads),
        num_files=len({read.file for read in reads}),
    )


def _num_bytes(opened: OpenedCheckpoint, boxes: Collection[tuple[str, Box]]) -> int:
    return sum(box.volume * ITEMSIZES[opened.entry(fqn).dtype] for fqn, box in boxes)


def stored_state(opened: OpenedCheckpoint) -> StoredState:
    """What a layout needs to know of a stored checkpoint."""
    manifest, index = opened.manifest, opened.index
    per_rank: dict[str, list[tuple[int, Box]]] = {}
    for position, entry in enumerate(opened.catalog.tensors):
        if entry.kind != "per_rank":
            continue
        ndim = len(entry.global_shape)
        for chunk in index.chunks_of(position).tolist():
            code = index.chunk_box[chunk]
            box = unpad_box(index.box_offsets[code], index.box_sizes[code], ndim)
            rank = opened.catalog.files[int(index.chunk_file[chunk])].rank
            per_rank.setdefault(entry.fqn, []).append((rank, box))
    return StoredState(
        world_size=manifest.topology.world_size,
        tensors=opened.catalog.tensors,
        meshes={mesh.id: mesh for mesh in manifest.topology.meshes},
        values={leaf.fqn: (leaf.path, leaf.value) for leaf in manifest.leaves},
        num_values={name: part.num_leaves for name, part in manifest.parts.items()},
        per_rank=per_rank,
    )
