"""Digests of whole tensors in terms of the catalog: of which, over what, and whether they agree.

Block digests prove bytes as they lie in files; these digests prove that every element of a tensor
is at its place, whatever cut the tensor since. Padding is no part of a tensor: it depends on the
mesh, and is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

from dcp_resume.errors import Problem
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.manifest.models import POSITION_SUMS, TensorDigest, TensorEntry

__all__ = [
    "Prove",
    "TensorDigests",
    "can_have_digest",
    "differing",
    "recorded_digest",
    "with_digest",
]


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


def differing(found: Iterable[tuple[TensorEntry, PositionDigest]]) -> Iterator[Problem]:
    """Tensors whose digest is not the one recorded; those without a record are passed over."""
    for entry, digest in found:
        expected = recorded_digest(entry)
        if expected is not None and expected != digest:
            message = f"expected the tensor digest {expected.hex}, found {digest.hex}"
            yield Problem(entry.fqn, "tensor_digest", message)
