"""The mesh on which local tensors were cut, and the place of one rank on it. Pure integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.models import MeshEntry
from dcp_resume.planning.placements import AxisSplit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["PIPELINE_AXIS", "MeshPlace", "mesh_entry"]

PIPELINE_AXIS = "pp"
"""Ranks along it hold different layers."""


@dataclass(frozen=True, slots=True)
class MeshPlace:
    """A mesh of ranks, numbered row by row, and where this rank is on it.

    With pipeline stages it is the mesh of this rank's stage, because what its axes do not split
    counts as equal along them.

    Raises:
        ConfigurationError: Axes, sizes and coordinate do not belong together, or an axis is ``pp``.
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
        if PIPELINE_AXIS in self.axes:
            raise ConfigurationError(
                f"the ranks of axis {PIPELINE_AXIS!r} hold different layers; give the mesh of this "
                f"rank's stage, with its first_rank, or use MeshPlace.numbered",
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

    @classmethod
    def numbered(cls, sizes: Mapping[str, int], rank: int) -> MeshPlace:
        """The place of a rank where all ranks are numbered from 0, the last axis fastest.

        An outermost axis ``pp`` is cut into stages, of which the rank's own is taken.

        >>> MeshPlace.numbered({"pp": 2, "dp": 2, "tp": 4}, rank=14)
        MeshPlace(axes=('dp', 'tp'), shape=(2, 4), coordinate=(1, 2), first_rank=8)

        Args:
            sizes: Axis → ranks along it, outermost first.
            rank: Global rank.

        Raises:
            ConfigurationError: ``rank`` is beyond the mesh, or ``pp`` is not the outermost axis.
        """
        axes, shape = tuple(sizes), tuple(sizes.values())
        if not 0 <= rank < math.prod(shape):
            raise ConfigurationError(
                f"rank {rank} is not among the {math.prod(shape)} of the mesh {dict(sizes)}",
                option="mesh",
            )
        first = 0
        if axes and axes[0] == PIPELINE_AXIS:
            axes, shape = axes[1:], shape[1:]
            first = rank - rank % math.prod(shape)
        coordinate: list[int] = []
        left = rank - first
        for size in reversed(shape):
            coordinate.insert(0, left % size)
            left //= size
        return cls(axes, shape, tuple(coordinate), first)

    @property
    def rank(self) -> int:
        """The global rank whose place it is."""
        position = 0
        for size, coordinate in zip(self.shape, self.coordinate, strict=True):
            position = position * size + coordinate
        return self.first_rank + position

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

    def joint_split(self, axes: Sequence[str]) -> AxisSplit:
        """How several axes split together, the first of them the outermost.

        Raises:
            ConfigurationError: The mesh lacks one of them.
        """
        count, place = 1, 0
        for split in map(self.split, axes):
            count, place = count * split.count, place * split.count + split.coordinate
        return AxisSplit(count, place)

    def check(self, rank: int, world_size: int) -> None:
        """Refuse a place that another rank has, or a mesh that reaches beyond the world.

        Raises:
            ConfigurationError: It does.
        """
        last = self.first_rank + math.prod(self.shape) - 1
        if self.rank != rank or last >= world_size:
            raise ConfigurationError(
                f"the declared mesh has ranks {self.first_rank} to {last} and is seen from rank "
                f"{self.rank}; this is rank {rank} of {world_size}. Declare it on each rank anew",
                option="mesh",
            )


def mesh_entry(axes: tuple[str, ...], shape: tuple[int, ...], ranks: tuple[int, ...]) -> MeshEntry:
    """Describe a mesh; equal meshes get equal ids on every rank."""
    text = f"{axes}{shape}{ranks}".encode()
    return MeshEntry(
        id="mesh-" + blake2b(text, digest_size=6).hexdigest(),
        axes=axes,
        shape=shape,
        ranks=None if ranks == tuple(range(len(ranks))) else ranks,
    )
