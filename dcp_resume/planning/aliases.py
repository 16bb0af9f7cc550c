"""Which leaves are one tensor under several names."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.ties import Ties

__all__ = ["distinct", "find_aliases", "with_aliases"]


def find_aliases(tensors: Sequence[HeldTensor], ties: Ties) -> dict[str, str]:
    """Leaves that are the same memory in the same shape: further name → first name.

    The first is one that is not declared to be tied to another, if there is one; else, and among
    several, the one that comes first in the state.
    """
    shared = [held for held in tensors if held.pieces and held.entry.kind != "per_rank"]
    addresses = [held.pieces[0].memory.data_ptr() for held in shared]
    if len(set(addresses)) == len(addresses):
        return {}
    by_address: dict[int, list[HeldTensor]] = {}
    for address, held in zip(addresses, shared, strict=True):
        by_address.setdefault(address, []).append(held)
    groups: dict[Hashable, list[str]] = {}
    for held in (held for near in by_address.values() if len(near) > 1 for held in near):
        if any(piece.box.volume for piece in held.pieces):
            groups.setdefault(_identity(held), []).append(held.entry.fqn)
    found: dict[str, str] = {}
    for group in groups.values():
        first = next((fqn for fqn in group if ties.canonical(fqn) == fqn), group[0])
        found.update((fqn, first) for fqn in group if fqn != first)
    return found


def distinct(tensors: Sequence[HeldTensor]) -> Iterator[HeldTensor]:
    """Each tensor, but of those that are the same memory one: the first that is no alias."""
    met: set[Hashable] = set()
    for held in sorted(tensors, key=lambda held: held.entry.alias_of is not None):
        identity = _identity(held)
        if held.entry.alias_of is None or identity not in met:
            yield held
        met.add(identity)


def _identity(held: HeldTensor) -> Hashable:
    memory = tuple(
        (piece.box, piece.memory.data_ptr(), piece.memory.stride()) for piece in held.pieces
    )
    entry = held.entry
    return memory, entry.dtype, entry.global_shape, entry.placements, entry.mesh


def with_aliases(
    entries: Sequence[TensorEntry], shared: Mapping[str, str], ties: Ties
) -> tuple[TensorEntry, ...]:
    """Mark each leaf that is stored under another name.

    Ranges of flat buffers are not: the buffers of two stages are cut at other places, so the two
    names have no common chunks.

    Args:
        entries: Of one rank's tensors.
        shared: Further name → first name of what is the same memory.
        ties: Declared for this rank's leaves.
    """
    marked: list[TensorEntry] = []
    for entry in entries:
        fqn, kind = entry.fqn, entry.kind
        first = ties.canonical(fqn) if kind not in ("per_rank", "dp_sharded") else fqn
        first = first if first != fqn else shared.get(fqn, fqn)
        marked.append(entry if first == fqn else entry.model_copy(update={"alias_of": first}))
    return tuple(marked)
