"""This rank's state for planning: tensors with the boxes it holds, and values."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dcp_resume.errors import DuplicateFqn, Problem, UnsupportedLeaf
from dcp_resume.format.dtypes import check_tensor
from dcp_resume.format.leaves import encode_leaf, pack_leaves
from dcp_resume.manifest.checks import name_problems
from dcp_resume.manifest.models import MeshEntry
from dcp_resume.planning.aliases import distinct
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.flattening import Path, flatten, fqn_of, part_of
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.outline import Leaf, Outline, OutlineMemory
from dcp_resume.planning.ties import Ties
from dcp_resume.planning.value_memory import EncodedValues, refuse_leaves

__all__ = ["PER_RANK_LEAVES", "SHARED_LEAVES", "LocalState", "describe_state", "roomy_size"]

PER_RANK_LEAVES = "~per-rank."
"""FQN prefix of the tensor that holds a part's per-rank values."""
SHARED_LEAVES = "~leaves."
"""FQN prefix of the tensor that holds a part's shared values, if the manifest cannot."""


def roomy_size(num_bytes: int) -> int:
    """A size that stays as it is while ``num_bytes`` changes a little.

    >>> roomy_size(6200), roomy_size(6300), roomy_size(3)
    (7168, 7168, 256)
    """
    grain = max(256, 1 << num_bytes.bit_length() >> 3)
    return -(-num_bytes // grain) * grain


@dataclass(frozen=True)
class LocalState:
    """One rank's state, described."""

    tensors: tuple[HeldTensor, ...]
    meshes: tuple[MeshEntry, ...]
    values: EncodedValues
    """Of the leaves all ranks share."""
    per_rank_values: EncodedValues
    ties: Ties = field(default_factory=Ties)
    """Names of one tensor: declared, or the same memory."""
    place: MeshPlace = field(default_factory=MeshPlace)
    """This rank's on the declared mesh."""

    def stored_name(self, fqn: str, stored: Container[str]) -> str | None:
        """Which of the names of a leaf is stored, its own before those that are tied to it."""
        if fqn in stored:
            return fqn
        return next((name for name in self.ties.names(fqn) if name in stored), None)

    def distinct_tensors(self) -> Iterator[HeldTensor]:
        """Each tensor's memory once; of several names for one memory the first name's."""
        return distinct(self.tensors)

    @cached_property
    def per_rank_leaves(self) -> Mapping[str, bytes]:
        """Part → packed values of this rank's own, filled up with spaces.

        The length of such values (a generator's state in digits) changes from save to save; filled
        up to a multiple of at least an eighth of it, it rarely does, and the plan stays as it is.
        """
        parts: dict[str, dict[str, Any]] = {}
        for fqn, (path, value) in self.per_rank_values.items():
            parts.setdefault(part_of(path), {})[fqn] = (path, value)
        packed = {part: pack_leaves(values) for part, values in parts.items()}
        return {part: data.ljust(roomy_size(len(data))) for part, data in packed.items()}

    def check_place(self, rank: int, world_size: int) -> None:
        """Refuse a declared mesh that is not this rank's, if any layout was used.

        Raises:
            ConfigurationError: It is another rank's, or reaches beyond the world.
        """
        if self.place.entry().id in {mesh.id for mesh in self.meshes}:
            self.place.check(rank, world_size)


def describe_state(
    state: Mapping[str, Any], declarations: Declarations, memory: OutlineMemory | None = None
) -> LocalState:
    """Describe this rank's state for planning; copies nothing.

    Args:
        state: Nested mapping of the rank's leaves.
        declarations: What the caller knows of them.
        memory: Of states that were described before; by default there is none.

    Raises:
        ConfigurationError: A declared layout names an axis that the mesh lacks, or cannot be.
        DuplicateFqn: Two leaves share one dotted name.
        UnsupportedLeaf: Leaves of types or dtypes that are never stored, all of them listed.
        StateError: A local tensor does not fit its placements or its declared layout.
    """
    with torch.no_grad():
        leaves = tuple(Leaf.of(path, value) for path, value in flatten(state))
    traits = tuple(leaf.traits() for leaf in leaves)
    memory = memory or OutlineMemory()
    outline = memory.recall(traits, declarations)
    if outline is None:
        _refuse_duplicates(leaves)
        refuse_leaves([fault for leaf in leaves for fault in _faults(leaf)])
        outline = Outline.of(leaves, traits, declarations)
        memory.keep(outline)
    tensors, ties = memory.name(outline.hold(leaves), declarations)
    return LocalState(
        tensors,
        outline.meshes,
        memory.shared.encode([leaves[named.position].value for named in outline.values]),
        memory.per_rank.encode([leaves[named.position].value for named in outline.per_rank_values]),
        ties,
        declarations.mesh,
    )


def _refuse_duplicates(leaves: Sequence[Leaf]) -> None:
    seen: dict[str, Path] = {}
    for leaf in leaves:
        fqn, path = fqn_of(leaf.path), leaf.path
        if fqn in seen:
            problem = Problem(fqn, "duplicate", f"key paths {seen[fqn]} and {path} share it")
            raise DuplicateFqn(f"cannot name {problem}; rename one key", problems=(problem,))
        seen[fqn] = path


def _faults(leaf: Leaf) -> Sequence[Problem]:
    """Why a leaf cannot be stored."""
    fqn = fqn_of(leaf.path)
    faults = list(_name_faults(fqn))
    if not faults and isinstance(leaf.value, torch.Tensor):
        fault = check_tensor(leaf.value, fqn)
        faults = [fault] if fault is not None else []
    elif not faults:
        try:
            encode_leaf(leaf.value, fqn)
        except UnsupportedLeaf as error:
            faults = list(error.problems)
    return faults


def _name_faults(fqn: str) -> Iterator[Problem]:
    """What readers would refuse in a name; nobody could open the checkpoint."""
    if fqn.startswith((PER_RANK_LEAVES, SHARED_LEAVES)):
        yield Problem(fqn, "name", f"names in {fqn.partition('.')[0]!r} are ours; rename the key")
    try:
        yield from (Problem(fqn, p.kind, p.message) for p in name_problems([fqn], fqn))
    except UnicodeEncodeError:
        yield Problem(ascii(fqn), "name", "no valid Unicode; rename the key")
