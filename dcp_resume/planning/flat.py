"""Flat buffers as boxes: each rank cuts its own range, without a word to the others.

A range of a row-major array of n dims is at most 2n - 1 boxes: what is left of a first row, whole
rows, what is begun of a last one, and so on inside of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from dcp_resume.errors import Problem, StateError
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.declared import Flat, Member
from dcp_resume.planning.held import HeldPiece, narrowed
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.placements import HeldBox

__all__ = ["flat_pieces", "own_range", "range_boxes"]


def range_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes of a run of elements of a row-major array, in its order.

    >>> [(box.offsets, box.sizes) for box in range_boxes((3, 4), 2, 9)]
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    width = math.prod(shape[1:])
    first, begun = divmod(start, width)
    if begun or stop - start < width:
        end = min(stop, (first + 1) * width)
        for box in range_boxes(shape[1:], begun, end - first * width):
            yield Box((first, *box.offsets), (1, *box.sizes))
        yield from range_boxes(shape, end, stop)
        return
    rows = (stop - start) // width
    yield Box((first, *(0 for _ in shape[1:])), (rows, *shape[1:]))
    yield from range_boxes(shape, start + rows * width, stop)


def own_range(flat: Flat, fqn: str, buffer: torch.Tensor, place: MeshPlace) -> tuple[int, int]:
    """Which elements of all members, end to end, lie in this rank's buffer.

    Args:
        flat: The buffer's layout.
        fqn: Of the buffer.
        buffer: This rank's; of equal size on every rank.
        place: The rank's.

    Raises:
        ConfigurationError: The mesh lacks an axis.
        StateError: The buffer is not flat, or too small to hold the members together with others.
    """
    split = place.joint_split(flat.axes)
    needed = -(-flat.num_elements // split.count)
    if buffer.ndim != 1 or buffer.numel() < needed:
        problem = Problem(
            fqn,
            "shape",
            f"{len(flat.members)} members of {flat.num_elements} elements over {split.count} ranks "
            f"need a flat buffer of at least {needed} elements, it has shape "
            f"{tuple(buffer.shape)}",
        )
        raise StateError(f"cannot place {problem}; correct the layout", problems=(problem,))
    start = split.coordinate * buffer.numel()
    return min(start, flat.num_elements), min(start + buffer.numel(), flat.num_elements)


def flat_pieces(
    member: Member, boxes: Sequence[HeldBox], begin: int, own: tuple[int, int], buffer: torch.Tensor
) -> Iterator[HeldPiece]:
    """What a rank's buffer holds of one member.

    Args:
        member: The tensor.
        boxes: What its local shape holds of the whole tensor.
        begin: Where it begins among all members.
        own: The range of the buffer among all members.
        buffer: The rank's.
    """
    start, stop = max(own[0], begin), min(own[1], begin + member.num_elements)
    position = start - own[0]
    for run in range_boxes(member.shape, start - begin, stop - begin):
        memory = buffer[position : position + run.volume].view(run.sizes)
        position += run.volume
        for held in boxes:
            common = run.intersect(Box(held.local_offsets, held.box.sizes))
            if common is not None:
                offsets = (
                    whole + inner - local
                    for whole, inner, local in zip(
                        held.box.offsets, common.offsets, held.local_offsets, strict=True
                    )
                )
                view = narrowed(memory, common.relative_to(run))
                yield HeldPiece(Box(tuple(offsets), common.sizes), view)
