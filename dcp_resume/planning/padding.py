"""Tensors whose last rows only fill them up, of which another mesh has more or fewer. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry

__all__ = ["differ_in_padding", "inside_of", "logical_shape", "outside_of"]


def logical_shape(entry: TensorEntry) -> tuple[int, ...]:
    """The global shape without padding."""
    shape = list(entry.global_shape)
    if entry.padding is not None:
        shape[entry.padding.dim] = entry.padding.logical_size
    return tuple(shape)


def differ_in_padding(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors of unequal shapes are the same but for their padding."""
    return a.global_shape != b.global_shape and logical_shape(a) == logical_shape(b)


def inside_of(box: Box, shape: tuple[int, ...]) -> Box | None:
    """The part of a box that a tensor of ``shape`` has, if there is any."""
    return box if Box.whole(shape).contains(box) else box.intersect(Box.whole(shape))


def outside_of(box: Box, shape: tuple[int, ...]) -> Iterator[Box]:
    """The rest, in boxes."""
    return box.without(Box.whole(shape))
