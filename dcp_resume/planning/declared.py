"""The words for local tensors that code cut itself, without DTensor. Pure integers.

Code that cuts its weights itself (Megatron's parallel layers, packed QKV, expert parallelism) holds
plain local tensors. A ``Split`` says which mesh axis cuts which dim, so that they are saved as
pieces of one global tensor, and read back by any other mesh:

    >>> place = MeshPlace(("tp",), (2,), (1,))
    >>> Split({"tp": 0}).global_shape((6, 4), place)
    (12, 4)
    >>> qkv = Split({"tp": 0}, (Segment("q", 8), Segment("kv", 4)))
    >>> [(b.box.offsets[0], b.box.sizes[0]) for b in qkv.held((12, 4), place)]
    [(4, 4), (10, 2)]

A ``Flat`` says that a buffer is a range of many tensors, end to end, as ZeRO cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dcp_resume.errors import ConfigurationError
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.placements import AxisSplit, HeldBox, held_boxes

__all__ = ["Flat", "Layout", "Member", "Padding", "Segment", "Split"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a split dim that is split by itself, such as Q in a packed QKV.

    Raises:
        ConfigurationError: The units do not divide the size.
    """

    name: str
    size: int
    """In the whole tensor."""
    units: int = 0
    """Pieces that are not split further, such as heads; 0: every row may be."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.units < 0 or (self.units and self.size % self.units):
            raise _wrong(
                f"segment {self.name!r} of {self.size} rows in {self.units} units: the size must "
                f"be positive, and the units divide it evenly"
            )

    def piece(self, split: AxisSplit) -> AxisSplit:
        """A rank's piece: its share of the units, or, of fewer units than ranks, one of them.

        Raises:
            ConfigurationError: Neither do the ranks divide the units, nor the units the ranks.
        """
        units = self.units or self.size
        fewer = min(units, split.count)
        if units % fewer or split.count % fewer:
            raise _wrong(
                f"segment {self.name!r} of {self.size} rows in {units} units cannot be shared "
                f"evenly by {split.count} ranks; units must divide by the ranks, or the ranks by "
                f"the units"
            )
        return AxisSplit(fewer, split.coordinate // (split.count // fewer))


@dataclass(frozen=True, slots=True)
class Padding:
    """A dim whose rows from ``logical_size`` on only fill it up; how many depends on the mesh.

    Raises:
        ConfigurationError: A negative number.
    """

    logical_size: int
    """Rows that mean something, in the whole tensor: 50,257 words of a vocabulary."""
    dim: int = 0

    def __post_init__(self) -> None:
        if self.logical_size < 0 or self.dim < 0:
            raise _wrong(f"a padding of dim {self.dim} from {self.logical_size} on")


@dataclass(frozen=True, slots=True)
class Split:
    """A local tensor that is an even piece of a global one.

    Column-parallel weights are ``Split({"tp": 0})``, row-parallel ones ``Split({"tp": 1})``,
    experts ``Split({"ep": 0, "tp": 2})``; ``Split({})`` declares a replica, which then needs no
    proof.

    Raises:
        ConfigurationError: Segments without a dim that is split, or with one that is padded.
    """

    dims: Mapping[str, int]
    """Mesh axis → tensor dim. Of two axes on one dim the first named splits first."""
    segments: tuple[Segment, ...] = ()
    """Runs of the dim that is named last, in global rows, each split by itself: the local tensor is
    this rank's piece of the first, then of the second, and so on. A segment of fewer ``units``
    (key-value heads) than ranks has each unit on several neighbouring ranks."""
    padding: Padding | None = None
    """The padded dim of the whole, if there is one."""

    def __post_init__(self) -> None:
        if any(dim < 0 for dim in self.dims.values()):
            raise _wrong(f"dims must not be negative, got {dict(self.dims)}")
        if self.segments and not self.dims:
            raise _wrong("segments need a dim that is split")
        if self.segments and self.padding and self.padding.dim == self.segment_dim:
            raise _wrong(f"dim {self.segment_dim} has both segments and padding")

    @property
    def segment_dim(self) -> int:
        """The dim that segments divide: the one named last."""
        return list(self.dims.values())[-1]

    def fits(self, ndim: int) -> bool:
        """Whether a tensor of so many dims can be split so; a step count beside it cannot."""
        dims = [*self.dims.values(), *([self.padding.dim] if self.padding else [])]
        return all(dim < ndim for dim in dims) and (ndim > 0 or not dims)

    def rule(self) -> dict[str, int]:
        """Mesh axis → dim, for the manifest."""
        return dict(self.dims)

    def global_shape(self, local_shape: tuple[int, ...], place: MeshPlace) -> tuple[int, ...]:
        """Shape of the whole tensor, from this rank's.

        Raises:
            ConfigurationError: An axis is unknown.
        """
        shape = list(local_shape)
        for axis, dim in self.dims.items():
            shape[dim] *= place.split(axis).count
        if self.segments:
            shape[self.segment_dim] = sum(segment.size for segment in self.segments)
        return tuple(shape)

    def held(self, global_shape: tuple[int, ...], place: MeshPlace) -> tuple[HeldBox, ...]:
        """The boxes of the global tensor that this rank holds.

        Raises:
            ConfigurationError: A segment cannot be split so, or an axis is unknown.
        """
        splits: list[list[AxisSplit]] = [[] for _ in global_shape]
        for axis, dim in self.dims.items():
            splits[dim].append(place.split(axis))
        if not self.segments:
            return tuple(held_boxes(global_shape, splits))
        dim = self.segment_dim
        joint = place.joint_split([axis for axis, d in self.dims.items() if d == dim])
        if joint.count == 1:  # segment after segment: one box
            return tuple(held_boxes(global_shape, splits))
        held: list[HeldBox] = []
        start = local = 0
        for segment in self.segments:
            shape = (*global_shape[:dim], segment.size, *global_shape[dim + 1 :])
            own = [*splits[:dim], [segment.piece(joint)], *splits[dim + 1 :]]
            for box in held_boxes(shape, own):
                held.append(box.shifted(dim, by=start, local_by=local))
                local += box.box.sizes[dim]
            start += segment.size
        return tuple(held)


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor of a flat buffer."""

    name: str
    """Of the parameter, as the template of the buffer wants it."""
    shape: tuple[int, ...]
    """On this rank before the buffer was cut: of a tensor-parallel weight its local shape."""

    @property
    def num_elements(self) -> int:
        """Elements of the shape."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Flat:
    """A flat buffer: an even range of many tensors that were laid end to end, as by ZeRO.

    The ranks of ``axes`` together hold all members in their order, and maybe padding behind the
    last. Each rank's range is saved as boxes of the members it touches, each under a name of its
    own, so that any other cut, and an optimizer with whole tensors, reads them.

    Raises:
        ConfigurationError: No axes, a template without ``{}``, or a member twice.
    """

    members: tuple[Member, ...]
    axes: tuple[str, ...]
    """Mesh axes that cut the buffer; the first named is the outermost."""
    template: str
    """Dotted name of a member's leaf: ``optim.state.{}.exp_avg``, with its name for ``{}``."""

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        if len(set(names)) != len(names) or not self.axes or self.template.count("{}") != 1:
            raise _wrong(
                f"a flat buffer needs members of different names, an axis or more, and one {{}} in "
                f"its template, got {len(names)} members, axes {self.axes}, {self.template!r}"
            )

    def fqn(self, member: Member) -> str:
        """Dotted name of a member's leaf."""
        return self.template.replace("{}", member.name)

    @property
    def num_elements(self) -> int:
        """Elements of all members."""
        return sum(member.num_elements for member in self.members)


Layout = Split | Flat


def _wrong(message: str) -> ConfigurationError:
    return ConfigurationError(f"a layout cannot be used: {message}", option="layouts")
