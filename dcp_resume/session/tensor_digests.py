"""Digests of whole tensors in terms of the catalog: of which, over what, and whether they agree.

Block digests prove bytes as they lie in files; these digests prove that every element of a tensor
is at its place, whatever cut the tensor since. Padding is no part of a tensor: it depends on the
mesh, and is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

import torch

from dcp_resume.errors import Problem
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import POSITION_SUMS, TensorDigest, TensorEntry
from dcp_resume.planning.held import narrowed
from dcp_resume.planning.padding import inside_of
from dcp_resume.planning.pieces import cut_box

__all__ = [
    "Prove",
    "TensorDigests",
    "can_have_digest",
    "differing",
    "digest_row_major",
    "digest_view",
    "recorded_digest",
    "with_digest",
]

PIECE_BYTES = 8 * 1024 * 1024
"""Digested at a time: what has to be copied to be row-major on the CPU is copied in such pieces."""


class TensorDigests(Enum):
    """Whether a save records a digest of each tensor that does not depend on how it is cut."""

    OMIT = "omit"
    RECORD = "record"
    """About 310 million elements a second (1.2 GB/s of float32) on one core of each rank, after
    staging; 16 bytes more a chunk go to the coordinator."""


class Prove(Enum):
    """What is proved of a load, or of a stored checkpoint."""

    BLOCKS = "blocks"
    """Every block, by its digest."""
    TENSORS = "tensors"
    """Also every tensor as a whole, by the digest that was recorded at save."""


def can_have_digest(entry: TensorEntry) -> bool:
    """Whether an entry can have a digest of its own.

    An alias has that of the tensor it stands for; per-rank tensors and packed values depend on the
    ranks that wrote them.
    """
    return entry.codec == "raw" and entry.kind not in ("per_rank", "alias")


def recorded_digest(entry: TensorEntry) -> PositionDigest | None:
    """The digest that was recorded at save; None if there is none that this version knows."""
    digest = entry.tensor_digest
    if digest is None or digest.algorithm != POSITION_SUMS or not can_have_digest(entry):
        return None
    return PositionDigest.from_hex(digest.value)


def with_digest(entry: TensorEntry, digest: PositionDigest) -> TensorEntry:
    """The entry as it records its digest."""
    document = TensorDigest(algorithm=POSITION_SUMS, value=digest.hex)
    return entry.model_copy(update={"tensor_digest": document})


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


def differing(found: Iterable[tuple[TensorEntry, PositionDigest]]) -> Iterator[Problem]:
    """Tensors whose digest is not the one recorded; those without a record are passed over."""
    for entry, digest in found:
        expected = recorded_digest(entry)
        if expected is not None and expected != digest:
            message = f"expected the tensor digest {expected.hex}, found {digest.hex}"
            yield Problem(entry.fqn, "tensor_digest", message)
