"""Plain tensors as the pieces that a declared layout makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dcp_resume.errors import Problem, StateError
from dcp_resume.manifest import models
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.declared import Flat, Layout, Split
from dcp_resume.planning.flat import flat_pieces, own_range
from dcp_resume.planning.flattening import path_of
from dcp_resume.planning.held import PlacedTensor, plain_entry
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.placements import HeldBox, held_boxes

__all__ = ["place_flat", "place_split"]

LayoutOf = Callable[[str, tuple[int, ...]], Layout | None]
"""FQN and local shape of a tensor → its layout, if one was declared."""


def place_split(
    entry: TensorEntry, tensor: torch.Tensor, split: Split, place: MeshPlace
) -> PlacedTensor:
    """A plain tensor under its layout.

    Args:
        entry: As of a tensor that is whole.
        tensor: The leaf.
        split: Its layout.
        place: This rank's.

    Raises:
        ConfigurationError: The mesh lacks an axis, or a segment cannot be shared evenly.
        StateError: The tensor is not what the layout gives this rank.
    """
    placed, boxes = _placed(entry, tuple(tensor.shape), split, place)
    return PlacedTensor.in_boxes(placed, boxes)


def _placed(
    entry: TensorEntry, shape: tuple[int, ...], split: Split, place: MeshPlace
) -> tuple[TensorEntry, tuple[HeldBox, ...]]:
    whole = split.global_shape(shape, place)
    boxes = split.held(whole, place)
    expected = sum(held.box.volume for held in boxes)
    found = torch.Size(shape).numel()
    if expected != found:
        raise _misfit(
            entry.fqn,
            f"the layout {split.rule()} of shape {whole} gives this rank {expected} elements in "
            f"{len(boxes)} piece(s), its tensor of shape {shape} has {found}",
        )
    padding = split.padding
    if padding is not None and whole[padding.dim] < padding.logical_size:
        raise _misfit(
            entry.fqn,
            f"dim {padding.dim} of the whole has {whole[padding.dim]} rows, the layout declares "
            f"{padding.logical_size} before the padding",
        )
    changed: dict[str, Any] = {
        "global_shape": whole,
        "kind": "sharded" if split.dims else "replicated",
        "mesh": place.entry().id,
        "rule": split.rule(),
        "segments": _segments(split),
        "padding": padding and models.Padding(dim=padding.dim, logical_size=padding.logical_size),
    }
    return entry.model_copy(update=changed), boxes


def _segments(split: Split) -> tuple[models.Segment, ...] | None:
    if not split.segments:
        return None
    return tuple(
        models.Segment(name=s.name, size=s.size, units=s.units, dim=split.segment_dim)
        for s in split.segments
    )


def place_flat(
    fqn: str, buffer: torch.Tensor, flat: Flat, place: MeshPlace, layout_of: LayoutOf
) -> Iterator[PlacedTensor]:
    """Every member of a flat buffer, also those of which this rank holds nothing.

    Args:
        fqn: Of the buffer.
        buffer: The leaf.
        flat: Its layout.
        place: This rank's.
        layout_of: Says how the members were split before the buffer was cut.

    Raises:
        ConfigurationError: The mesh lacks an axis, or a segment cannot be shared evenly.
        StateError: The buffer, or a member, is not what its layout gives this rank.
    """
    own = own_range(flat, fqn, buffer, place)
    begin = 0
    for member in flat.members:
        name = flat.fqn(member)
        entry = plain_entry(path_of(name), buffer.dtype, member.shape)
        boxes = tuple(held_boxes(member.shape, [[] for _ in member.shape]))
        layout = layout_of(name, member.shape)
        if isinstance(layout, Flat):
            raise _misfit(name, f"a member of the flat buffer {fqn} is declared as one itself")
        if layout is not None:
            entry, boxes = _placed(entry, member.shape, layout, place)
        entry = entry.model_copy(update={"kind": "dp_sharded"})
        yield PlacedTensor(entry, partial(flat_pieces, member, boxes, begin, own))
        begin += member.num_elements


def _misfit(fqn: str, message: str) -> StateError:
    problem = Problem(fqn, "layout", message)
    return StateError(f"cannot place {problem}; correct the layout", problems=(problem,))
