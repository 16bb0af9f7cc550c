"""This rank's state for planning: tensors with the boxes it holds, and values."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcp_resume.errors import DuplicateFqn, Problem, StateError, UnsupportedLeaf
from dcp_resume.format.dtypes import check_tensor
from dcp_resume.format.leaves import encode_leaf
from dcp_resume.manifest.checks import name_problems
from dcp_resume.manifest.models import MeshEntry
from dcp_resume.planning.aliases import distinct, find_aliases, with_aliases
from dcp_resume.planning.declarations import Declarations, Parameter
from dcp_resume.planning.declared import Flat, Layout
from dcp_resume.planning.dtensors import DTensorPlacer
from dcp_resume.planning.flattening import Path, flatten, fqn_of
from dcp_resume.planning.held import HeldTensor, hold_whole, plain_entry
from dcp_resume.planning.local_shards import hold_flat, hold_split
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.parameters import ParameterNames
from dcp_resume.planning.ties import Ties
from dcp_resume.problems import summarise

__all__ = ["PER_RANK_LEAVES", "SHARED_LEAVES", "LocalState", "describe_state"]

PER_RANK_LEAVES = "~per-rank."
"""FQN prefix of the tensor that holds a part's per-rank values."""
SHARED_LEAVES = "~leaves."
"""FQN prefix of the tensor that holds a part's shared values, if the manifest cannot."""


@dataclass(frozen=True, slots=True)
class LocalState:
    """One rank's state, described."""

    tensors: tuple[HeldTensor, ...]
    meshes: tuple[MeshEntry, ...]
    values: Mapping[str, tuple[Path, Any]]
    """FQN → key path and encoded value, of the leaves all ranks share."""
    per_rank_values: Mapping[str, tuple[Path, Any]]
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

    def check_place(self, rank: int, world_size: int) -> None:
        """Refuse a declared mesh that is not this rank's, if any layout was used.

        Raises:
            ConfigurationError: It is another rank's, or reaches beyond the world.
        """
        if self.place.entry().id in {mesh.id for mesh in self.meshes}:
            self.place.check(rank, world_size)


def describe_state(state: Mapping[str, Any], declarations: Declarations) -> LocalState:
    """Describe this rank's state for planning; copies nothing.

    Raises:
        ConfigurationError: A declared layout names an axis that the mesh lacks, or cannot be.
        DuplicateFqn: Two leaves share one dotted name.
        UnsupportedLeaf: Leaves of types or dtypes that are never stored, all of them listed.
        StateError: A local tensor does not fit its placements or its declared layout.
    """
    problems: list[Problem] = []
    values: dict[str, tuple[Path, Any]] = {}
    per_rank: dict[str, tuple[Path, Any]] = {}
    leaves: list[tuple[Path, torch.Tensor]] = []
    for path, leaf in _named_leaves(state):
        fqn = fqn_of(path)
        faults = list(_name_faults(fqn))
        if not faults and isinstance(leaf, torch.Tensor):
            fault = check_tensor(leaf, fqn)
            faults = [fault] if fault is not None else []
            leaves.append((path, leaf))
        elif not faults:
            try:
                encoded = encode_leaf(leaf, fqn)
                (per_rank if declarations.is_per_rank(fqn) else values)[fqn] = (path, encoded)
            except UnsupportedLeaf as error:
                faults = list(error.problems)
        problems.extend(faults)
    if problems:
        raise UnsupportedLeaf(
            f"cannot save {len(problems)} leaves:\n{summarise(problems)}", problems=tuple(problems)
        )
    describer = _Describer(leaves, declarations)
    tensors = _unique([held for path, leaf in leaves for held in describer.hold(path, leaf)])
    known = [held.entry.fqn for held in tensors]
    ties = Ties(declarations.ties, known)
    shared = find_aliases(tensors, ties)
    return LocalState(
        with_aliases(tensors, shared, ties),
        describer.meshes,
        values,
        per_rank,
        Ties({**shared, **declarations.ties}, known),
        declarations.mesh,
    )


def _named_leaves(state: Mapping[str, Any]) -> Iterator[tuple[Path, object]]:
    seen: dict[str, Path] = {}
    for path, leaf in flatten(state):
        fqn = fqn_of(path)
        if fqn in seen:
            problem = Problem(fqn, "duplicate", f"key paths {seen[fqn]} and {path} share it")
            raise DuplicateFqn(f"cannot name {problem}; rename one key", problems=(problem,))
        seen[fqn] = path
        yield path, leaf


def _name_faults(fqn: str) -> Iterator[Problem]:
    """What readers would refuse in a name; nobody could open the checkpoint."""
    if fqn.startswith((PER_RANK_LEAVES, SHARED_LEAVES)):
        yield Problem(fqn, "name", f"names in {fqn.partition('.')[0]!r} are ours; rename the key")
    try:
        yield from (Problem(fqn, p.kind, p.message) for p in name_problems([fqn], fqn))
    except UnicodeEncodeError:
        yield Problem(ascii(fqn), "name", "no valid Unicode; rename the key")


class _Describer:
    """Describes the tensors of one state, under its declarations."""

    def __init__(
        self, leaves: Sequence[tuple[Path, torch.Tensor]], declarations: Declarations
    ) -> None:
        self._declarations = declarations
        self._shapes = {fqn_of(path): tuple(leaf.shape) for path, leaf in leaves}
        self._parameters = ParameterNames(self._shapes if declarations.layouts else ())
        self._placer = DTensorPlacer()

    @property
    def meshes(self) -> tuple[MeshEntry, ...]:
        """Of the tensors described so far."""
        return tuple(self._placer.meshes.values())

    def hold(self, path: Path, tensor: torch.Tensor) -> Iterator[HeldTensor]:
        """What a leaf is for planning: one tensor, or every member of a flat buffer."""
        entry = plain_entry(path, tensor.dtype, tensor.shape)
        declared = self._declarations
        if declared.is_per_rank(entry.fqn):
            if isinstance(tensor, DTensor):
                problem = Problem(entry.fqn, "placement", "a DTensor cannot be declared per-rank")
                raise StateError(f"cannot save {problem}; drop the pattern", problems=(problem,))
            yield hold_whole(entry.model_copy(update={"kind": "per_rank"}), tensor)
            return
        layout = self._layout_of(entry.fqn, entry.global_shape)
        if isinstance(tensor, DTensor):
            if layout is not None:
                problem = Problem(entry.fqn, "placement", "a DTensor says itself how it is split")
                raise StateError(f"cannot place {problem}; drop its layout", problems=(problem,))
            yield self._placer.hold(entry, tensor)
            return
        if layout is None:
            yield hold_whole(entry, tensor)
            return
        mesh = declared.mesh.entry()
        self._placer.meshes[mesh.id] = mesh
        if isinstance(layout, Flat):
            yield from hold_flat(entry.fqn, tensor, layout, declared.mesh, self._layout_of)
        else:
            yield hold_split(entry, tensor, layout, declared.mesh)

    def _layout_of(self, fqn: str, shape: tuple[int, ...]) -> Layout | None:
        owner = self._parameters.owner(fqn) if self._declarations.layouts else None
        parameter = Parameter(owner.fqn, self._shapes[owner.fqn]) if owner is not None else None
        return self._declarations.layout_of(fqn, shape, parameter)


def _unique(tensors: Sequence[HeldTensor]) -> Sequence[HeldTensor]:
    """Refuse names that a flat buffer gives, and another leaf has too."""
    seen: set[str] = set()
    for held in tensors:
        if held.entry.fqn in seen:
            message = "a member of a flat buffer, and another leaf, have the name"
            problem = Problem(held.entry.fqn, "duplicate", message)
            raise DuplicateFqn(f"cannot name {problem}; change the template", problems=(problem,))
        seen.add(held.entry.fqn)
    return tensors
