"""What the memory of a box adds to the digest of its tensor."""

from __future__ import annotations

import torch

from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.held import narrowed
from dcp_resume.planning.padding import inside_of
from dcp_resume.planning.pieces import cut_box

__all__ = ["digest_row_major", "digest_view"]

PIECE_BYTES = 8 * 1024 * 1024
"""Digested at a time: what has to be copied to be row-major on the CPU is copied in such pieces."""


def digest_view(
    view: torch.Tensor, itemsize: int, box: Box, shape: tuple[int, ...]
) -> PositionDigest:
    """What the memory of a box adds to the digest of its tensor.

    Args:
        view: The memory, on any device, contiguous or not: of the box's sizes, or uint8 with one
            more dim of an element's bytes.
        itemsize: Bytes of an element.
        box: Where it lies in the tensor.
        shape: Of the tensor without padding; what lies beyond is passed over.
    """
    inside = inside_of(box, shape)
    total = PositionDigest()
    if inside is None or not inside.volume:
        return total
    for piece in cut_box(inside, PIECE_BYTES // itemsize):
        data = as_bytes(narrowed(view, piece.relative_to(box)))
        total += PositionDigest.of(data, itemsize, piece, shape)
    return total


def digest_row_major(
    data: memoryview, itemsize: int, box: Box, shape: tuple[int, ...]
) -> PositionDigest:
    """What the row-major bytes of a box add to the digest of its tensor.

    Args:
        data: The bytes, in writable memory, for torch warns of any other.
        itemsize: Bytes of an element.
        box: Where they lie in the tensor.
        shape: As for ``digest_view``.
    """
    if not data:
        return PositionDigest()
    view = torch.frombuffer(data, dtype=torch.uint8).view(*box.sizes, itemsize)
    return digest_view(view, itemsize, box, shape)
