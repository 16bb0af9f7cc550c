"""What one rank offers to write: the shape of its plan, made once, and its contents, made anew."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch

from dcp_resume.errors import ConfigurationError
from dcp_resume.format.digests import digest_bytes
from dcp_resume.format.leaves import LeafPacker
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import MeshEntry
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.plans import (
    LocalPlan,
    PlanContents,
    PlanShape,
    encode_structure,
    leaves_entry,
)
from dcp_resume.planning.state import PER_RANK_LEAVES, LocalState
from dcp_resume.planning.ties import Ties
from dcp_resume.planning.values import WITHHELD

__all__ = ["OfferMemory", "local_plan"]

CORNER_ELEMENTS = 16 * 1024
"""Of a chunk that a declaration says is replicated, so many elements are compared."""


class OfferMemory:
    """The shape that one owner's states were planned in last. It keeps no tensor alive."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._offered: _Offered | None = None
        self.packer = LeafPacker()

    def recall(self, key: tuple[object, ...]) -> _Offered | None:
        """What was kept under this key, if it was the last."""
        return self._offered if self._key == key else None

    def keep(self, key: tuple[object, ...], offered: _Offered) -> None:
        """Remember a shape instead of the last."""
        self._key, self._offered = key, offered


def local_plan(
    state: LocalState,
    rank: int,
    world_size: int,
    declarations: Declarations,
    memory: OfferMemory | None = None,
) -> LocalPlan:
    """Plan what this rank offers to write.

    A tensor that placements over the whole world describe is proved replicated or sharded; the
    chunks of all others carry a digest, so that the coordinator can compare what it takes for
    replicas. Of what a declared layout over the whole world describes, a corner is compared: that
    costs nothing, and finds layers or experts that are numbered from 0 on every rank. A leaf
    declared ``from_rank`` is offered by that rank alone.

    Args:
        state: What the rank holds.
        rank: This rank.
        world_size: Number of ranks.
        declarations: What the caller knows of its leaves.
        memory: Of earlier plans; by default there is none.

    Raises:
        ConfigurationError: ``from_rank`` names a rank that does not exist, or the declared mesh is
            another rank's.
    """
    memory = memory or OfferMemory()
    key = (
        [held.entry for held in state.tensors],
        [piece.box for held in state.tensors for piece in held.pieces],
        [len(held.pieces) for held in state.tensors],
        state.meshes,
        tuple((part, len(data)) for part, data in state.per_rank_leaves.items()),
        rank,
        world_size,
        declarations.to_text(),
    )
    offered = memory.recall(key)
    if offered is None:
        offered = _offer(state, rank, world_size, declarations)
        memory.keep(key, offered)
    values = state.values
    if declarations.from_rank:
        values = {
            fqn: leaf if declarations.source_rank(fqn) in (None, rank) else (leaf[0], WITHHELD)
            for fqn, leaf in values.items()
        }
    digests = b"".join(
        evidence(state.tensors[position].pieces[piece].memory)
        for position, piece, evidence in offered.compared
    )
    return LocalPlan(offered.shape, PlanContents(digests, memory.packer.pack(values)))


Evidence = Callable[[torch.Tensor], bytes]
"""Memory of a chunk → 16 bytes that are compared with what other ranks have of it."""


@dataclass(frozen=True, slots=True)
class _Offered:
    """The shape of a plan, and where its evidence comes from."""

    shape: PlanShape
    compared: tuple[tuple[int, int, Evidence], ...]
    """Tensor, piece of it, and what is compared of the piece."""


def _offer(state: LocalState, rank: int, world_size: int, declarations: Declarations) -> _Offered:
    beyond = {p: r for p, r in declarations.from_rank.items() if not 0 <= r < world_size}
    if beyond:
        raise ConfigurationError(
            f"from_rank names {beyond}; the ranks are 0 to {world_size - 1}", option="from_rank"
        )
    state.check_place(rank, world_size)
    entries = [held.entry for held in state.tensors]
    boxes: list[Box] = []
    tensor: list[int] = []
    rows: list[int] = []
    compared: list[tuple[int, int, Evidence]] = []
    whole_world = {mesh.id for mesh in state.meshes if _size(mesh) == world_size}
    ties = Ties(declarations.ties, [entry.fqn for entry in entries])
    for position, held in enumerate(state.tensors):
        if declarations.source_rank(held.entry.fqn) not in (None, rank):
            continue
        evidence = _evidence(held, whole_world, is_alone=world_size == 1, ties=ties)
        for piece, _ in enumerate(held.pieces):
            if evidence is not None:
                rows.append(len(boxes))
                compared.append((position, piece, evidence))
            boxes.append(held.pieces[piece].box)
            tensor.append(position)
    for part, data in state.per_rank_leaves.items():
        # The length of packed per-rank values differs between ranks; the columns carry it, so
        # that the structure text stays equal.
        entries.append(leaves_entry(PER_RANK_LEAVES + part, part, 0, is_per_rank=True))
        boxes.append(Box((0,), (len(data),)))
        tensor.append(len(entries) - 1)
    width = max((len(entry.global_shape) for entry in entries), default=1) or 1
    table, box = Boxes.listing(boxes, width)
    shape = PlanShape(
        rank=rank,
        world_size=world_size,
        structure=encode_structure(entries, state.meshes),
        tensor=np.asarray(tensor, np.int32),
        box=box,
        boxes=table,
        compared=np.asarray(rows, np.int32),
    )
    return _Offered(shape, tuple(compared))


def _evidence(
    held: HeldTensor, whole_world: Collection[str], *, is_alone: bool, ties: Ties
) -> Evidence | None:
    """How a tensor's replicas are compared; None where its placements prove them."""
    if held.entry.kind == "per_rank":
        return None
    if ties.is_tied(held.entry.alias_of or held.entry.fqn):
        return _digest  # also of a further name that no tie names: it counts as the first one's
    if is_alone:
        return None
    if held.entry.mesh in whole_world:
        return _corner_digest if held.is_declared else None
    return _digest


def _digest(memory: torch.Tensor) -> bytes:
    return digest_bytes([as_bytes(memory)])


def _corner_digest(memory: torch.Tensor) -> bytes:
    left = CORNER_ELEMENTS
    for dim in reversed(range(memory.ndim)):
        size = min(memory.shape[dim], left)
        memory = memory.narrow(dim, 0, size)
        left //= max(size, 1)
    return _digest(memory)


def _size(mesh: MeshEntry) -> int:
    size = 1
    for extent in mesh.shape:
        size *= extent
    return size
