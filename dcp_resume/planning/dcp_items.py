"""Ordinary DCP plans as columns: for stock planners that save through our writer."""

from __future__ import annotations

import numpy as np
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from dcp_resume.errors import Problem, UnsupportedLeaf
from dcp_resume.format.dtypes import dtype_info
from dcp_resume.format.leaves import pack_leaves
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.plans import (
    LocalPlan,
    PlanContents,
    PlanShape,
    encode_structure,
)

__all__ = ["box_of_item", "items_to_columns"]


def box_of_item(item: WriteItem) -> Box:
    """Where the item's chunk lies in its tensor."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _entry(item: WriteItem) -> TensorEntry:
    assert item.tensor_data is not None
    fqn, data = item.index.fqn, item.tensor_data
    head, _, rest = fqn.partition(".")
    try:
        dtype = dtype_info(data.properties.dtype).name
    except ValueError as error:
        problem = Problem(fqn, "dtype", str(error))
        raise UnsupportedLeaf(f"cannot save {problem}", problems=(problem,)) from error
    return TensorEntry(
        fqn=fqn,
        path=(head, rest) if rest else (head,),
        part=head if rest else "state",
        dtype=dtype,
        global_shape=tuple(data.size),
        kind="replicated" if tuple(data.chunk.sizes) == tuple(data.size) else "sharded",
    )


def items_to_columns(
    plan: SavePlan, rank: int, world_size: int, world_entries: dict[str, TensorEntry]
) -> LocalPlan:
    """The columns of one rank's items, after DCP has deduplicated them.

    Args:
        plan: The rank's final plan.
        rank: Its rank.
        world_size: Number of ranks.
        world_entries: FQN → entry, shared by the calls of one save, so that a tensor whose chunks
            went to several ranks is described alike for all.

    Raises:
        UnsupportedLeaf: A dtype that is never stored.
    """
    positions: dict[str, int] = {}
    boxes: list[Box] = []
    tensor: list[int] = []
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO:
            continue  # values are encoded by the rank that writes them
        fqn = item.index.fqn
        world_entries.setdefault(fqn, _entry(item))
        positions.setdefault(fqn, len(positions))
        boxes.append(box_of_item(item))
        tensor.append(positions[fqn])
    entries = [world_entries[fqn] for fqn in positions]
    width = max((len(entry.global_shape) for entry in entries), default=1) or 1
    table, box = Boxes.listing(boxes, width)
    shape = PlanShape(
        rank=rank,
        world_size=world_size,
        structure=encode_structure(entries, ()),
        tensor=np.asarray(tensor, np.int32),
        box=box,
        boxes=table,
        compared=np.zeros(0, np.int32),
    )
    return LocalPlan(shape, PlanContents(b"", pack_leaves({})))
