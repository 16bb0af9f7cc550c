"""A state dict as a flat list of leaves: tensors with the boxes this rank holds, and values.

Names follow DCP: keys joined by dots. Unlike DCP, a tuple that holds a tensor is flattened too, an
empty mapping is kept as a value, and the key path is recorded beside the name, so that ``{"0": x}``
and ``[x]`` come back as they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from dcp_resume.errors import DuplicateFqn, Problem, StateError, UnsupportedLeaf, summarise
from dcp_resume.format.dtypes import check_tensor
from dcp_resume.format.leaves import encode_leaf
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.checks import name_problems
from dcp_resume.manifest.models import MeshEntry, PathKey, TensorEntry
from dcp_resume.planning.declared import Declarations, MeshPlace, Split, mesh_entry
from dcp_resume.planning.placements import AxisSplit, HeldBox, held_boxes

__all__ = ["Declarations", "HeldTensor", "LocalState", "describe_state", "flatten"]

Path = tuple[PathKey, ...]

PER_RANK_LEAVES = "~per-rank."
"""FQN prefix of the tensor that holds a part's per-rank values."""
SHARED_LEAVES = "~leaves."
"""FQN prefix of the tensor that holds a part's shared values, if the manifest cannot."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One tensor leaf, and the boxes of it in this rank's memory."""

    entry: TensorEntry
    local: torch.Tensor
    """The rank's own memory: the local tensor of a DTensor, or the tensor itself."""
    boxes: tuple[HeldBox, ...]

    def view(self, box: Box) -> torch.Tensor:
        """The memory of ``box``, which must lie in one held box.

        Raises:
            LookupError: No held box contains ``box``.
        """
        if not box.volume:  # of an empty tensor each rank holds the whole, whatever it has locally
            return self.local.new_empty(box.sizes)
        for held in self.boxes:
            if held.box.contains(box):
                inner = box.relative_to(held.box)
                view = self.local
                for dim, (base, offset, size) in enumerate(
                    zip(held.local_offsets, inner.offsets, inner.sizes, strict=True)
                ):
                    view = view.narrow(dim, base + offset, size)
                return view
        raise LookupError(f"{self.entry.fqn}: this rank does not hold {box}")


@dataclass(frozen=True, slots=True)
class LocalState:
    """One rank's state, described."""

    tensors: tuple[HeldTensor, ...]
    meshes: tuple[MeshEntry, ...]
    values: Mapping[str, tuple[Path, Any]]
    """FQN → key path and encoded value, of the leaves all ranks share."""
    per_rank_values: Mapping[str, tuple[Path, Any]]


def _holds_tensor(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(item) for item in value)
    return False


def _path_key(key: object, path: Path) -> PathKey:
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return {"key": key}
    where = fqn_of(path) or "the state dict"
    problem = Problem(where, "key", f"mapping key {key!r} is neither a string nor an integer")
    raise UnsupportedLeaf(f"cannot save {problem}; use string keys", problems=(problem,))


def fqn_of(path: Path) -> str:
    """Dotted name of a key path."""
    return ".".join(str(key["key"]) if isinstance(key, dict) else str(key) for key in path)


def flatten(state: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Walk a state dict in its own order, and yield each leaf with its key path.

    Mappings are always descended, lists and tuples where they hold a tensor.

    Raises:
        UnsupportedLeaf: A mapping key is neither a string nor an integer.
    """
    items: Iterator[tuple[PathKey, object]] = (
        (_path_key(key, path), value) for key, value in state.items()
    )
    yield from _flatten_items(items, path)


def _flatten_items(items: Iterator[tuple[PathKey, object]], path: Path) -> Iterator[Any]:
    for key, value in items:
        here = (*path, key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, here)
        elif isinstance(value, (list, tuple)) and _holds_tensor(value):
            yield from _flatten_items(iter(enumerate(value)), here)
        else:
            yield here, value


def _entry_of_mesh(mesh: DeviceMesh) -> MeshEntry:
    axes = tuple(mesh.mesh_dim_names or (f"axis{i}" for i in range(mesh.ndim)))
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    return mesh_entry(axes, tuple(int(size) for size in mesh.shape), ranks)


_PLACEMENT = re.compile(r"_?StridedShard\(dim=(-?\d+), sf=(\d+)\)")


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


def _held(tensor: torch.Tensor, fqn: str) -> tuple[torch.Tensor, tuple[HeldBox, ...]]:
    if not isinstance(tensor, DTensor):
        return tensor, (HeldBox(Box.whole(tuple(tensor.shape)), (0,) * tensor.ndim),)
    local = tensor.to_local().detach()
    splits = _splits(tensor)
    boxes = [] if splits is None else held_boxes(tuple(tensor.shape), splits)
    volume = sum(held.box.volume for held in boxes)
    if splits is not None and volume != local.numel():
        problem = Problem(
            fqn,
            "shape",
            f"placements {tensor.placements} of shape {tuple(tensor.shape)} give this rank "
            f"{volume} elements, its local tensor has {local.numel()}",
        )
        raise StateError(
            f"cannot place {problem}; build the DTensor by distribute_tensor or pass its shape "
            f"to DTensor.from_local",
            problems=(problem,),
        )
    return local, tuple(boxes)


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|decoder)\.(\d+)(?:\.|$)")


def _entry(path: Path, fqn: str, tensor: torch.Tensor, mesh: MeshEntry | None) -> TensorEntry:
    placements: tuple[str, ...] | None = None
    rule: dict[str, int] = {}
    kind = "replicated"
    if isinstance(tensor, DTensor) and mesh is not None:
        described = tuple(_describe_placement(p) for p in tensor.placements)
        placements = tuple(d or repr(p) for d, p in zip(described, tensor.placements, strict=True))
        for axis, placement in zip(mesh.axes, placements, strict=True):
            if placement.startswith("S"):
                rule[axis] = int(re.search(r"\d+", placement)[0])  # type: ignore[index]
                kind = "sharded"
    layer = _LAYER.search(fqn)
    return TensorEntry(
        fqn=fqn,
        path=path,
        part=part_of(path),
        dtype=str(tensor.dtype).removeprefix("torch."),
        global_shape=tuple(int(size) for size in tensor.shape),
        kind=kind,  # type: ignore[arg-type]
        mesh=mesh.id if mesh else None,
        placements=placements,
        rule=rule,
        layer=int(layer[1]) if layer else None,
    )


def part_of(path: Path) -> str:
    """The part a leaf belongs to: its top-level key, or ``state`` for a leaf at the top."""
    return fqn_of(path[:1]) if len(path) > 1 else "state"


def describe_state(state: Mapping[str, Any], declarations: Declarations) -> LocalState:
    """Describe this rank's state for planning; copies nothing.

    Raises:
        DuplicateFqn: Two leaves share one dotted name.
        UnsupportedLeaf: Leaves of types or dtypes that are never stored, all of them listed.
        StateError: A DTensor's local tensor does not fit its placements.
    """
    problems: list[Problem] = []
    seen: dict[str, Path] = {}
    tensors: list[HeldTensor] = []
    meshes: dict[str, MeshEntry] = {}
    values: dict[str, tuple[Path, Any]] = {}
    per_rank: dict[str, tuple[Path, Any]] = {}
    storages: dict[Any, str] = {}
    for path, leaf in flatten(state):
        fqn = fqn_of(path)
        if fqn in seen:
            problem = Problem(fqn, "duplicate", f"key paths {seen[fqn]} and {path} share it")
            raise DuplicateFqn(f"cannot name {problem}; rename one key", problems=(problem,))
        seen[fqn] = path
        wrong_name = list(_name_faults(fqn))
        if wrong_name:
            problems.extend(wrong_name)
            continue
        if not isinstance(leaf, torch.Tensor):
            try:
                encoded = encode_leaf(leaf, fqn)
            except UnsupportedLeaf as error:
                problems.extend(error.problems)
                continue
            (per_rank if declarations.is_per_rank(fqn) else values)[fqn] = (path, encoded)
            continue
        fault = check_tensor(leaf, fqn)
        if fault is not None:
            problems.append(fault)
            continue
        held = _describe_tensor(path, fqn, leaf, declarations, meshes, storages)
        if held is not None:
            tensors.append(held)
    if problems:
        raise UnsupportedLeaf(
            f"cannot save {len(problems)} leaves:\n{summarise(problems)}", problems=tuple(problems)
        )
    return LocalState(tuple(tensors), tuple(meshes.values()), values, per_rank)


def _name_faults(fqn: str) -> Iterator[Problem]:
    """What readers would refuse in a name; nobody could open the checkpoint."""
    if fqn.startswith((PER_RANK_LEAVES, SHARED_LEAVES)):
        yield Problem(fqn, "name", f"names in {fqn.partition('.')[0]!r} are ours; rename the key")
    try:
        yield from (Problem(fqn, p.kind, p.message) for p in name_problems([fqn], fqn))
    except UnicodeEncodeError:
        yield Problem(ascii(fqn), "name", "no valid Unicode; rename the key")


def _describe_tensor(
    path: Path,
    fqn: str,
    tensor: torch.Tensor,
    declarations: Declarations,
    meshes: dict[str, MeshEntry],
    storages: dict[Any, str],
) -> HeldTensor | None:
    mesh = _entry_of_mesh(tensor.device_mesh) if isinstance(tensor, DTensor) else None
    if mesh is not None:
        meshes[mesh.id] = mesh
    if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
        problem = Problem(fqn, "placement", f"placements {tensor.placements} hold partial sums")
        raise StateError(f"cannot save {problem}; redistribute it first", problems=(problem,))
    entry = _entry(path, fqn, tensor, mesh)
    local, boxes = _held(tensor, fqn)
    if declarations.is_per_rank(fqn):
        if mesh is not None:
            problem = Problem(fqn, "placement", "a DTensor cannot be declared per-rank")
            raise StateError(f"cannot save {problem}; drop the pattern", problems=(problem,))
        return HeldTensor(entry.model_copy(update={"kind": "per_rank"}), local, boxes)
    split = declarations.layout_of(fqn, tensor.ndim)
    if split is not None:
        held = _declared(entry, tensor, split, declarations.mesh, is_dtensor=mesh is not None)
        declared = declarations.mesh.entry()
        meshes[declared.id] = declared
        return HeldTensor(_with_alias(held.entry, local, storages), local, held.boxes)
    entry = _with_alias(entry, local, storages)
    return HeldTensor(entry, local, boxes)


def _declared(
    entry: TensorEntry, tensor: torch.Tensor, split: Split, place: MeshPlace, *, is_dtensor: bool
) -> HeldTensor:
    """A plain tensor as the piece that its layout makes of it."""
    if is_dtensor:
        problem = Problem(entry.fqn, "placement", "a DTensor says itself how it is split")
        raise StateError(f"cannot place {problem}; drop its layout", problems=(problem,))
    shape = split.global_shape(tuple(tensor.shape), place)
    boxes = split.held(shape, place)
    expected = sum(held.box.volume for held in boxes)
    if expected != tensor.numel():
        problem = Problem(
            entry.fqn,
            "shape",
            f"the layout {split.rule()} of shape {shape} gives this rank {expected} elements in "
            f"{len(boxes)} piece(s), its tensor of shape {tuple(tensor.shape)} has "
            f"{tensor.numel()}",
        )
        raise StateError(f"cannot place {problem}; correct the layout", problems=(problem,))
    changed = {
        "global_shape": shape,
        "kind": "sharded" if split.dims else "replicated",
        "mesh": place.entry().id,
        "rule": split.rule(),
        "segments": split.segments or None,
    }
    return HeldTensor(entry.model_copy(update=changed), tensor, boxes)


def _with_alias(entry: TensorEntry, local: torch.Tensor, storages: dict[Any, str]) -> TensorEntry:
    """Mark the entry as an alias where an earlier leaf is the same memory in the same shape."""
    if local.numel() == 0:
        return entry
    identity = (
        local.data_ptr(),
        local.shape,
        local.stride(),
        local.dtype,
        entry.global_shape,
        entry.placements,
        entry.mesh,
    )
    first = storages.setdefault(identity, entry.fqn)
    return entry if first == entry.fqn else entry.model_copy(update={"alias_of": first})
