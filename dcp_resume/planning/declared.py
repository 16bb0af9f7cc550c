"""What a caller knows of its tensors and torch does not say: per-rank values, and declared shards.

Code that cuts its weights itself (Megatron's parallel layers, packed QKV, expert parallelism) holds
plain local tensors. A ``Split`` says which mesh axis cuts which dim, so that they are saved as
pieces of one global tensor, and read back by any other mesh:

    >>> place = MeshPlace(("tp",), (2,), (1,))
    >>> Split({"tp": 0}).global_shape((6, 4), place)
    (12, 4)
    >>> qkv = Split({"tp": 0}, (Segment(name="q", size=8), Segment(name="kv", size=4)))
    >>> [(b.box.offsets[0], b.box.sizes[0]) for b in qkv.held((12, 4), place)]
    [(4, 4), (10, 2)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b

from torch.distributed.device_mesh import DeviceMesh

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.models import MeshEntry, Segment
from dcp_resume.planning.placements import AxisSplit, HeldBox, held_boxes

__all__ = ["Declarations", "MeshPlace", "Segment", "Split", "mesh_entry"]


@dataclass(frozen=True, slots=True)
class MeshPlace:
    """A mesh of ranks, numbered row by row from 0, and where this rank is on it.

    Raises:
        ConfigurationError: Axes, sizes and coordinate do not belong together.
    """

    axes: tuple[str, ...] = ()
    """Names, outermost first."""
    shape: tuple[int, ...] = ()
    """Ranks on each axis."""
    coordinate: tuple[int, ...] = ()
    first_rank: int = 0
    """The mesh's lowest global rank: of the second of two pipeline stages of 4 ranks, 4."""

    def __post_init__(self) -> None:
        is_fitting = len(self.axes) == len(set(self.axes)) == len(self.shape)
        is_fitting = is_fitting and len(self.shape) == len(self.coordinate)
        if not is_fitting or any(
            not 0 <= c < n for c, n in zip(self.coordinate, self.shape, strict=True)
        ):
            raise ConfigurationError(
                f"a mesh needs distinct axes, a size for each, and a coordinate below each size, "
                f"got axes {self.axes}, shape {self.shape}, coordinate {self.coordinate}",
                option="mesh",
            )

    @classmethod
    def of(cls, mesh: DeviceMesh) -> MeshPlace:
        """The place of this rank on a device mesh whose ranks follow one another.

        Raises:
            ConfigurationError: They do not, or this rank is not among them.
        """
        ranks = mesh.mesh.flatten().tolist()
        coordinate = mesh.get_coordinate()
        if ranks != list(range(ranks[0], ranks[0] + len(ranks))) or coordinate is None:
            raise ConfigurationError(
                f"the mesh has ranks {ranks}, this one at {coordinate}; declare shards on a mesh "
                f"whose ranks follow one another",
                option="mesh",
            )
        axes = tuple(mesh.mesh_dim_names or (f"axis{i}" for i in range(mesh.ndim)))
        return cls(axes, tuple(mesh.shape), tuple(coordinate), ranks[0])

    def entry(self) -> MeshEntry:
        """The same for the manifest."""
        ranks = tuple(range(self.first_rank, self.first_rank + math.prod(self.shape)))
        return mesh_entry(self.axes, self.shape, ranks)

    def split(self, axis: str) -> AxisSplit:
        """How an axis splits, as seen from this rank.

        Raises:
            ConfigurationError: The mesh has no such axis.
        """
        if axis not in self.axes:
            raise ConfigurationError(
                f"a layout names the mesh axis {axis!r}; the declared mesh has {self.axes}",
                option="layouts",
            )
        position = self.axes.index(axis)
        return AxisSplit(self.shape[position], self.coordinate[position])


@dataclass(frozen=True, slots=True)
class Split:
    """A local tensor that is an even piece of a global one.

    Column-parallel weights are ``Split({"tp": 0})``, row-parallel ones ``Split({"tp": 1})``,
    experts ``Split({"ep": 0, "tp": 2})``; ``Split({})`` declares a replica, which then needs no
    proof.

    Raises:
        ConfigurationError: Segments without exactly one dim that is split.
    """

    dims: Mapping[str, int]
    """Mesh axis → tensor dim. Of two axes on one dim the first named splits first."""
    segments: tuple[Segment, ...] = ()
    """Runs of the split dim, in global rows, each split by itself: the local tensor is this rank's
    piece of the first, then of the second, and so on. A segment of fewer ``units`` (key-value
    heads) than ranks has each unit on several neighbouring ranks."""

    def __post_init__(self) -> None:
        if self.segments and len(set(self.dims.values())) != 1:
            raise ConfigurationError(
                f"segments need exactly one split dim, got {dict(self.dims)}", option="layouts"
            )

    def fits(self, ndim: int) -> bool:
        """Whether a tensor of so many dims can be split so; a step count beside it cannot."""
        return all(dim < ndim for dim in self.dims.values()) and (ndim > 0 or not self.dims)

    def rule(self) -> dict[str, int]:
        """Mesh axis → dim, for the manifest."""
        return dict(self.dims)

    def global_shape(self, local_shape: tuple[int, ...], place: MeshPlace) -> tuple[int, ...]:
        """Shape of the whole tensor, from this rank's.

        Raises:
            ConfigurationError: A segment cannot be split so, or an axis is unknown.
        """
        shape = list(local_shape)
        for axis, dim in self.dims.items():
            shape[dim] *= place.split(axis).count
        for dim in set(self.dims.values()) if self.segments else ():
            shape[dim] = sum(segment.size for segment in self.segments)
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
        (dim,) = set(self.dims.values())
        held: list[HeldBox] = []
        start = local = 0
        for segment in self.segments:
            shape = (*global_shape[:dim], segment.size, *global_shape[dim + 1 :])
            own = [*splits[:dim], _split_of(segment, splits[dim]), *splits[dim + 1 :]]
            for box in held_boxes(shape, own):
                held.append(box.shifted(dim, by=start, local_by=local))
                local += box.box.sizes[dim]
            start += segment.size
        return tuple(held)


def _split_of(segment: Segment, splits: list[AxisSplit]) -> list[AxisSplit]:
    count = math.prod(split.count for split in splits)
    place = 0
    for split in splits:
        place = place * split.count + split.coordinate
    units = segment.units or segment.size
    fewer = min(units, count)
    if units % fewer or count % fewer or segment.size % units:
        raise ConfigurationError(
            f"segment {segment.name!r} of {segment.size} rows in {units} units cannot be shared "
            f"evenly by {count} ranks; units must divide by the ranks, or the ranks by the units",
            option="layouts",
        )
    return [AxisSplit(fewer, place // (count // fewer))]


def mesh_entry(axes: tuple[str, ...], shape: tuple[int, ...], ranks: tuple[int, ...]) -> MeshEntry:
    """Describe a mesh; equal meshes get equal ids on every rank."""
    text = f"{axes}{shape}{ranks}".encode()
    return MeshEntry(
        id="mesh-" + blake2b(text, digest_size=6).hexdigest(),
        axes=axes,
        shape=shape,
        ranks=None if ranks == tuple(range(len(ranks))) else ranks,
    )


@dataclass(frozen=True, slots=True)
class Declarations:
    """What the caller knows of leaves and torch does not say. Patterns as in ``fnmatch``."""

    per_rank: tuple[str, ...] = ()
    """FQNs whose value differs between ranks on purpose, and is kept for each."""
    from_rank: Mapping[str, int] = field(default_factory=dict)
    """FQN pattern → the rank whose value stands for all."""

    mesh: MeshPlace = field(default_factory=MeshPlace)
    """Where this rank is, for ``layouts``."""
    layouts: Mapping[str, Split] = field(default_factory=dict)
    """FQN pattern → how plain tensors of such names, and the moments of these, are cut."""

    def layout_of(self, fqn: str, ndim: int) -> Split | None:
        """The first layout whose pattern matches ``fqn`` and that fits its dims, if any."""
        found = (split for p, split in self.layouts.items() if fnmatchcase(fqn, p))
        return next((split for split in found if split.fits(ndim)), None)

    def is_per_rank(self, fqn: str) -> bool:
        """Whether ``fqn`` was declared per-rank."""
        return any(fnmatchcase(fqn, pattern) for pattern in self.per_rank)

    def source_rank(self, fqn: str) -> int | None:
        """The rank whose value of ``fqn`` stands for all, if one was declared."""
        return next((r for p, r in self.from_rank.items() if fnmatchcase(fqn, p)), None)
