"""What a state's leaves are and where they lie on this rank: everything but memory and values.

A training job saves one structure again and again, so that its outline is worked out once. Whether
it is still the same is asked of every leaf each time; addresses and contents have no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from dcp_resume.errors import DuplicateFqn, Problem, StateError
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.aliases import find_aliases, with_aliases
from dcp_resume.planning.declarations import Declarations, Parameter
from dcp_resume.planning.declared import Flat, Layout
from dcp_resume.planning.dtensors import DTensorPlacer
from dcp_resume.planning.flattening import Path, fqn_of
from dcp_resume.planning.held import HeldTensor, PlacedTensor, place_whole, plain_entry
from dcp_resume.planning.local_shards import place_flat, place_split
from dcp_resume.planning.parameters import ParameterNames
from dcp_resume.planning.ties import Ties
from dcp_resume.planning.value_memory import NamedValue, ValueMemory

__all__ = ["Leaf", "Outline", "OutlineMemory"]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Leaf(NamedTuple):
    """One leaf of a state."""

    path: Path
    value: object
    local: torch.Tensor | None
    """The rank's memory, if it is a tensor."""

    @classmethod
    def of(cls, path: Path, value: object) -> Leaf:
        """A leaf; call it under ``torch.no_grad()``, else autograd makes a view of each local."""
        if not isinstance(value, torch.Tensor):
            return cls(path, value, None)
        return cls(path, value, value.to_local() if type(value) is DTensor else value)

    def traits(self) -> tuple[object, ...]:
        """All that planning asks of it; of a tensor that cannot be stored, equal to no other's."""
        path, value, local = self
        if local is None:
            return (path,)
        if type(local) not in _PLAIN or local.is_nested:
            return (object(),)
        if type(value) is not DTensor:
            return (path, local.shape, local.dtype, local.layout, local.device)
        mesh = value.device_mesh
        return (
            path,
            local.shape,
            local.dtype,
            local.layout,
            local.device,
            value.shape,
            value.placements,
            mesh,
            mesh.get_coordinate(),  # a mesh does not say of itself where this rank is on it
        )


@dataclass(frozen=True, slots=True)
class Outline:
    """The structure of one rank's state, under its declarations."""

    traits: tuple[object, ...]
    """Of every leaf."""
    declarations: str
    """All that was declared, as text."""
    placed: tuple[tuple[int, PlacedTensor], ...]
    """Each tensor, with the position of the leaf that it lies in; in a flat buffer lie several."""
    values: tuple[NamedValue, ...]
    """Each that all ranks share."""
    per_rank_values: tuple[NamedValue, ...]
    """Likewise of a rank's own values."""
    meshes: tuple[MeshEntry, ...]
    fqns: tuple[str, ...]
    """Of the tensors."""
    ties: Ties
    """As declared."""

    @classmethod
    def of(
        cls, leaves: Sequence[Leaf], traits: tuple[object, ...], declarations: Declarations
    ) -> Outline:
        """Work it out.

        Args:
            leaves: Of a rank's state; all of them can be stored.
            traits: Of the leaves.
            declarations: What the caller knows of them.

        Raises:
            ConfigurationError: A declared layout names an axis that the mesh lacks, or cannot be.
            DuplicateFqn: A member of a flat buffer has the name of another leaf.
            StateError: A local tensor does not fit its placements or its declared layout.
        """
        placer = _Placer(leaves, declarations)
        placed: list[tuple[int, PlacedTensor]] = []
        values: tuple[list[NamedValue], list[NamedValue]] = ([], [])
        for position, leaf in enumerate(leaves):
            if leaf.local is not None:
                placed.extend((position, tensor) for tensor in placer.place(leaf))
            else:
                fqn = fqn_of(leaf.path)
                values[declarations.is_per_rank(fqn)].append(NamedValue(position, leaf.path, fqn))
        fqns = tuple(tensor.entry.fqn for _, tensor in placed)
        _refuse_duplicates(fqns)
        return cls(
            traits,
            declarations.to_text(),
            tuple(placed),
            tuple(values[False]),
            tuple(values[True]),
            placer.meshes,
            fqns,
            Ties(declarations.ties, fqns),
        )

    def hold(self, leaves: Sequence[Leaf]) -> tuple[HeldTensor, ...]:
        """The tensors, in the memory of leaves that have its traits."""
        held: list[HeldTensor] = []
        for position, placed in self.placed:
            local = leaves[position].local
            assert local is not None
            held.append(placed.hold(local))
        return tuple(held)


@dataclass(frozen=True, slots=True)
class _Named:
    """The tensors of an outline, with the names that share memory."""

    aliases: Mapping[str, str]
    entries: tuple[TensorEntry, ...]
    ties: Ties


class OutlineMemory:
    """The last outline of one owner's states. It keeps no tensor alive."""

    def __init__(self) -> None:
        self._outline: Outline | None = None
        self._named: _Named | None = None
        self.shared = ValueMemory(())
        """Of the last outline's values that all ranks share."""
        self.per_rank = ValueMemory(())
        """Likewise of a rank's own values."""

    def recall(self, traits: tuple[object, ...], declarations: Declarations) -> Outline | None:
        """The last outline, if leaves of these traits have the same under these declarations."""
        last = self._outline
        if last is None or last.traits != traits or last.declarations != declarations.to_text():
            return None
        return last

    def keep(self, outline: Outline) -> None:
        """Remember an outline instead of the last."""
        self._outline, self._named = outline, None
        self.shared = ValueMemory(outline.values)
        self.per_rank = ValueMemory(outline.per_rank_values)

    def name(
        self, tensors: Sequence[HeldTensor], declarations: Declarations
    ) -> tuple[tuple[HeldTensor, ...], Ties]:
        """Find names that share memory, in tensors of the last outline.

        Returns:
            The tensors, marked where they are stored under another name, and all names of each.
        """
        assert self._outline is not None
        ties = self._outline.ties
        aliases = find_aliases(tensors, ties)
        if self._named is None or self._named.aliases != aliases:
            entries = with_aliases([held.entry for held in tensors], aliases, ties)
            both = Ties({**aliases, **declarations.ties}, self._outline.fqns)
            self._named = _Named(aliases, entries, both)
        named = tuple(
            held if held.entry is entry else HeldTensor(entry, held.pieces)
            for held, entry in zip(tensors, self._named.entries, strict=True)
        )
        return named, self._named.ties


class _Placer:
    """Finds where the tensors of one state lie, under its declarations."""

    def __init__(self, leaves: Sequence[Leaf], declarations: Declarations) -> None:
        self._declarations = declarations
        self._shapes = {
            fqn_of(leaf.path): tuple(leaf.value.shape)
            for leaf in leaves
            if declarations.layouts and isinstance(leaf.value, torch.Tensor)
        }
        self._parameters = ParameterNames(self._shapes)
        self._placer = DTensorPlacer()

    @property
    def meshes(self) -> tuple[MeshEntry, ...]:
        """Of the tensors placed so far."""
        return tuple(self._placer.meshes.values())

    def place(self, leaf: Leaf) -> Iterator[PlacedTensor]:
        """What a leaf is for planning: one tensor, or every member of a flat buffer."""
        tensor, local = leaf.value, leaf.local
        assert isinstance(tensor, torch.Tensor)
        assert local is not None
        entry = plain_entry(leaf.path, tensor.dtype, tensor.shape)
        declared = self._declarations
        if declared.is_per_rank(entry.fqn):
            if isinstance(tensor, DTensor):
                problem = Problem(entry.fqn, "placement", "a DTensor cannot be declared per-rank")
                raise StateError(f"cannot save {problem}; drop the pattern", problems=(problem,))
            yield place_whole(entry.model_copy(update={"kind": "per_rank"}))
            return
        layout = self._layout_of(entry.fqn, entry.global_shape)
        if isinstance(tensor, DTensor):
            if layout is not None:
                problem = Problem(entry.fqn, "placement", "a DTensor says itself how it is split")
                raise StateError(f"cannot place {problem}; drop its layout", problems=(problem,))
            yield self._placer.place(entry, tensor, local.numel())
            return
        if layout is None:
            yield place_whole(entry)
            return
        mesh = declared.mesh.entry()
        self._placer.meshes[mesh.id] = mesh
        if isinstance(layout, Flat):
            yield from place_flat(entry.fqn, tensor, layout, declared.mesh, self._layout_of)
        else:
            yield place_split(entry, tensor, layout, declared.mesh)

    def _layout_of(self, fqn: str, shape: tuple[int, ...]) -> Layout | None:
        owner = self._parameters.owner(fqn) if self._declarations.layouts else None
        parameter = Parameter(owner.fqn, self._shapes[owner.fqn]) if owner is not None else None
        return self._declarations.layout_of(fqn, shape, parameter)


def _refuse_duplicates(fqns: Sequence[str]) -> None:
    """Refuse names that a flat buffer gives, and another leaf has too."""
    seen: set[str] = set()
    for fqn in fqns:
        if fqn in seen:
            message = "a member of a flat buffer, and another leaf, have the name"
            problem = Problem(fqn, "duplicate", message)
            raise DuplicateFqn(f"cannot name {problem}; change the template", problems=(problem,))
        seen.add(fqn)
