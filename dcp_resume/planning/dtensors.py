"""What a DTensor's placements say: mesh, entry, and the boxes that this rank holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dcp_resume.errors import Problem, StateError
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.held import PlacedTensor
from dcp_resume.planning.mesh_place import mesh_entry
from dcp_resume.planning.placements import AxisSplit, HeldBox, held_boxes

__all__ = ["DTensorPlacer", "describe_mesh"]

_PLACEMENT = re.compile(r"_?StridedShard\(dim=(-?\d+), sf=(\d+)\)")


def describe_mesh(mesh: DeviceMesh) -> MeshEntry:
    """A device mesh, as the manifest says it."""
    axes = tuple(mesh.mesh_dim_names or (f"axis{i}" for i in range(mesh.ndim)))
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return mesh_entry(axes, tuple(int(size) for size in mesh.shape), ranks)


@dataclass(frozen=True, slots=True)
class _Placing:
    """What all DTensors of one mesh, placements and shape have in common."""

    changed: dict[str, Any]
    """Of the entry, beside what is there of a plain tensor."""
    boxes: tuple[HeldBox, ...]
    is_on_mesh: bool
    """Whether this rank is one of the mesh's."""


class DTensorPlacer:
    """Describes DTensors; works each layout out once, for models repeat a few of them."""

    def __init__(self) -> None:
        self.meshes: dict[str, MeshEntry] = {}
        """Of the tensors described so far, by id."""
        self._entries: dict[DeviceMesh, MeshEntry] = {}
        self._placings: dict[tuple[Any, ...], _Placing] = {}

    def place(self, entry: TensorEntry, tensor: DTensor, num_local: int) -> PlacedTensor:
        """A DTensor's boxes on this rank.

        Args:
            entry: As of a plain tensor.
            tensor: The leaf.
            num_local: Elements of its local tensor.

        Raises:
            StateError: It holds partial sums, or its local tensor does not fit its placements.
        """
        key = (tensor.device_mesh, tensor.placements, entry.global_shape)
        placing = self._placings.get(key)
        if placing is None:
            placing = self._place(entry.fqn, tensor)
            self._placings[key] = placing
        volume = sum(held.box.volume for held in placing.boxes)
        if placing.is_on_mesh and volume != num_local:
            problem = Problem(
                entry.fqn,
                "shape",
                f"placements {tensor.placements} of shape {tuple(tensor.shape)} give this rank "
                f"{volume} elements, its local tensor has {num_local}",
            )
            raise StateError(
                f"cannot place {problem}; build the DTensor by distribute_tensor or pass its shape "
                f"to DTensor.from_local",
                problems=(problem,),
            )
        return PlacedTensor.in_boxes(entry.model_copy(update=placing.changed), placing.boxes)

    def _place(self, fqn: str, tensor: DTensor) -> _Placing:
        if any(placement.is_partial() for placement in tensor.placements):
            message = f"placements {tensor.placements} hold partial sums"
            problem = Problem(fqn, "placement", message)
            raise StateError(f"cannot save {problem}; redistribute it first", problems=(problem,))
        mesh = self._mesh(tensor.device_mesh)
        described = tuple(_describe_placement(p) for p in tensor.placements)
        placements = tuple(d or repr(p) for d, p in zip(described, tensor.placements, strict=True))
        rule = {
            axis: int(re.findall(r"\d+", placement)[0])
            for axis, placement in zip(mesh.axes, placements, strict=True)
            if placement.startswith("S")
        }
        kind = "sharded" if rule else "replicated"
        changed = {"mesh": mesh.id, "placements": placements, "rule": rule, "kind": kind}
        splits = _splits(tensor)
        boxes = [] if splits is None else held_boxes(tuple(tensor.shape), splits)
        return _Placing(changed, tuple(boxes), splits is not None)

    def _mesh(self, mesh: DeviceMesh) -> MeshEntry:
        if mesh not in self._entries:
            self._entries[mesh] = describe_mesh(mesh)
        entry = self._entries[mesh]
        self.meshes[entry.id] = entry
        return entry


def _strided(placement: Placement) -> tuple[int, int] | None:
    match = _PLACEMENT.fullmatch(repr(placement))
    return (int(match[1]), int(match[2])) if match else None


def _describe_placement(placement: Placement) -> str | None:
    strided = _strided(placement)
    if strided is not None:
        return f"SS({strided[0]},{strided[1]})"
    if isinstance(placement, Shard):
        return f"S({placement.dim})"
    return "R" if isinstance(placement, Replicate) else None


def _splits(tensor: DTensor) -> list[list[AxisSplit]] | None:
    """Per tensor dim its splits on this rank; None where the rank is outside the mesh."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    splits: list[list[AxisSplit]] = [[] for _ in tensor.shape]
    for axis, placement in enumerate(tensor.placements):
        strided = _strided(placement)
        if strided is None and not isinstance(placement, Shard):
            continue
        dim, factor = strided or (placement.dim, 1)  # type: ignore[attr-defined]
        splits[dim].append(AxisSplit(tensor.device_mesh.size(axis), coordinate[axis], factor))
    return splits
