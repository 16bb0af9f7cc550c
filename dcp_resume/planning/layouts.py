"""Lay a stored checkpoint out for another mesh, so that each rank reads its bytes in one run. Pure.

Chunks that one rank alone holds lie together in a file of that rank, in file order. Chunks that
several ranks hold are written once, by the lowest of them, into a further file for each set of
holders: so a rank's own bytes of a part are one whole file, and shared bytes lie in others.

On one dim model axes (tp, ep) split first and data axes (dp…, fsdp, cp) split what is left,
whatever their order in the mesh, as FSDP2 does over TP; the placement then says ``SS(dim,n)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import ConfigurationError
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.box_rows import pad_boxes
from dcp_resume.planning.files import FileLayout, file_names
from dcp_resume.planning.layout_rules import Axis, LayoutRules, TargetMesh
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.planning.placements import AxisSplit, held_boxes
from dcp_resume.planning.stages import assign_stages, parameters_of, split_layers
from dcp_resume.planning.table import Table

__all__ = ["Kept", "StoredState", "TargetLayout", "plan_layout", "shard_boxes"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StoredState:
    """What the stored checkpoint says, as far as a layout needs it."""

    world_size: int
    tensors: tuple[TensorEntry, ...]
    meshes: Mapping[str, MeshEntry]
    values: Mapping[str, tuple[Any, Any]]
    """Non-tensor leaves of the manifest: FQN → path, encoded value."""
    num_values: Mapping[str, int]
    per_rank: Mapping[str, Sequence[tuple[int, Box]]]
    """Per-rank tensor → each rank and its box."""


@dataclass(frozen=True, slots=True, order=True)
class Kept:
    """A tensor that is replicated over axes of which nothing says how it is split."""

    fqn: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TargetLayout:
    """What to write, and what could not be laid out as asked."""

    plan: GlobalPlan
    stages: tuple[tuple[int, ...], ...] | None
    """Per pipeline stage its layers; None without a pipeline."""
    kept: tuple[Kept, ...]
    dropped: tuple[str, ...]
    """Per-rank tensors, which only as many ranks as wrote them could read."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """What holds for one tensor."""

    dims: Mapping[str, int]
    """Target axis → dim, also for axes that the target mesh lacks."""
    known: frozenset[str] | None
    """Target axes of which something is known; None for all."""


@dataclass(frozen=True, slots=True)
class _Shards:
    """The distinct boxes of one shape under one rule, within one pipeline stage."""

    ranks: tuple[int, ...]
    """Per box its lowest holder, counted within the stage."""
    boxes: tuple[Box, ...]
    split_axes: tuple[int, ...]
    """The axes that split it, by position: one file for each such set."""
    num_holders: int


def plan_layout(source: StoredState, mesh: TargetMesh, rules: LayoutRules) -> TargetLayout:
    """Plan the files of a checkpoint for the ranks of ``mesh``.

    Raises:
        ConfigurationError: The rules do not fit the tensors or the mesh; every fault is listed.
    """
    _refuse_segments(source.tensors)
    is_same_size = source.world_size == mesh.world_size
    dropped = [e.fqn for e in source.tensors if e.kind == "per_rank" and not is_same_size]
    tensors = [entry for entry in source.tensors if is_same_size or entry.kind != "per_rank"]
    parameters = parameters_of(tensors)
    found = [_rule_of(e, parameters.get(e.fqn), source.meshes, rules) for e in tensors]
    _check_dims(tensors, found)
    stages = split_layers(tensors, mesh.num_stages, rules.stages)
    stage_of = assign_stages(tensors, parameters, stages, rules)
    stage_meshes = mesh.stage_meshes()
    placed = tuple(
        _place(entry, rule, mesh, stage_meshes[stage])
        for entry, rule, stage in zip(tensors, found, stage_of, strict=True)
    )
    return TargetLayout(
        plan=GlobalPlan(
            world_size=mesh.world_size,
            meshes=mesh.meshes(),
            manifest_values=source.values,
            num_values=source.num_values,
            layout=_lay_out(placed, stage_of, mesh, source.per_rank),
            local_ids=(),
            inline={},
        ),
        stages=stages if mesh.num_stages > 1 else None,
        kept=tuple(_kept(tensors, found, mesh, rules)),
        dropped=tuple(dropped),
    )


def _refuse_segments(tensors: Iterable[TensorEntry]) -> None:
    packed = [entry.fqn for entry in tensors if entry.segments]
    if packed:
        raise ConfigurationError(
            f"{len(packed)} tensor(s) are packed in segments, which `reshard` cannot lay out: "
            f"{', '.join(packed[:5])}. Load the checkpoint on the target ranks instead: a load "
            f"reshards them",
            option="layout",
        )


def _rule_of(
    entry: TensorEntry,
    parameter: TensorEntry | None,
    meshes: Mapping[str, MeshEntry],
    rules: LayoutRules,
) -> _Rule:
    """The tensor's own rule, else that of its parameter; the layout's before the checkpoint's."""
    candidates = [entry]
    if parameter is not None and parameter.global_shape == entry.global_shape:
        candidates.append(parameter)
    for candidate in candidates:
        declared = rules.find(candidate.fqn)
        if declared is not None and (declared.dims or declared.stage is None):
            return _Rule(declared.dims if entry.global_shape else {}, None)
    for candidate in candidates:
        if candidate.mesh is not None:
            dims: dict[str, int] = {}
            for axis, dim in candidate.rule.items():
                dims.setdefault(rules.renamed(axis), dim)
            mesh = meshes.get(candidate.mesh)
            axes = [rules.renamed(axis) for axis in (mesh.axes if mesh else ())]
            return _Rule(dims, frozenset((*axes, *dims)))
    return _Rule({}, frozenset())


def _check_dims(tensors: Sequence[TensorEntry], found: Sequence[_Rule]) -> None:
    faults = [
        f"{entry.fqn}: axis {axis} splits dim {dim}, the tensor has {len(entry.global_shape)}"
        for entry, rule in zip(tensors, found, strict=True)
        for axis, dim in rule.dims.items()
        if dim >= len(entry.global_shape)
    ]
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults[:20])
        raise ConfigurationError(
            f"{len(faults)} rule(s) do not fit their tensors:\n{lines}\nname other dims, or a "
            "narrower pattern",
            option="layout",
        )


def _kept(
    tensors: Sequence[TensorEntry], found: Sequence[_Rule], mesh: TargetMesh, rules: LayoutRules
) -> Iterable[Kept]:
    asked = [a.name for a in mesh.inner if a.size > 1 and not rules.is_replicating(a.name)]
    for entry, rule in zip(tensors, found, strict=True):
        is_plain = entry.kind not in ("per_rank", "alias") and entry.codec == "raw"
        if is_plain and entry.global_shape and rule.known is not None:
            axes = tuple(axis for axis in asked if axis not in rule.known)
            if axes:
                yield Kept(entry.fqn, axes)


def _place(entry: TensorEntry, rule: _Rule, mesh: TargetMesh, stage: MeshEntry) -> TensorEntry:
    """The entry as the target's catalog says it."""
    if entry.kind == "per_rank" or entry.codec == "leaves":
        return entry
    placements = _placements(mesh.inner, rule.dims)
    kind = "sharded" if any(p != "R" for p in placements) else "replicated"
    return entry.model_copy(
        update={
            "kind": "alias" if entry.kind == "alias" else kind,
            "mesh": stage.id,
            "placements": placements or ("R",),
            "rule": dict(rule.dims),
        }
    )


def _split_factor(axes: Sequence[Axis], position: int, dims: Mapping[str, int]) -> int:
    """Pieces that the axes behind a data axis make of its dim first; 1 where it splits in turn."""
    axis = axes[position]
    behind = [a for a in axes[position + 1 :] if dims.get(a.name) == dims[axis.name] and a.size > 1]
    if not axis.is_data or all(a.is_data for a in behind):
        return 1
    return math.prod(a.size for a in behind)


def _placements(axes: Sequence[Axis], dims: Mapping[str, int]) -> tuple[str, ...]:
    placements: list[str] = []
    for position, axis in enumerate(axes):
        dim = dims.get(axis.name)
        factor = 1 if dim is None else _split_factor(axes, position, dims)
        if dim is None:
            placements.append("R")
        else:
            placements.append(f"S({dim})" if factor == 1 else f"SS({dim},{factor})")
    return tuple(placements)


def shard_boxes(
    shape: tuple[int, ...],
    dims: Mapping[str, int],
    axes: Sequence[Axis],
    coordinates: Sequence[int],
) -> list[Box]:
    """The boxes of a tensor that one rank holds.

    Args:
        shape: Global shape.
        dims: Axis → the dim that it splits.
        axes: Of the mesh.
        coordinates: Of the rank, one an axis.
    """
    splits: list[list[AxisSplit]] = [[] for _ in shape]
    for position, axis in enumerate(axes):
        if axis.size > 1 and axis.name in dims:
            factor = _split_factor(axes, position, dims)
            splits[dims[axis.name]].append(AxisSplit(axis.size, coordinates[position], factor))
    return [held.box for held in held_boxes(shape, splits)]


def _shards(shape: tuple[int, ...], dims: Mapping[str, int], axes: Sequence[Axis]) -> _Shards:
    is_empty = math.prod(shape) == 0
    splitting = [
        position
        for position, axis in enumerate(axes)
        if axis.size > 1 and axis.name in dims and not is_empty
    ]
    sizes = tuple(axis.size for axis in axes)
    ranks: list[int] = []
    boxes: list[Box] = []
    for place in itertools.product(*(range(sizes[position]) for position in splitting)):
        coordinates = [0] * len(axes)
        for position, coordinate in zip(splitting, place, strict=True):
            coordinates[position] = coordinate
        for box in shard_boxes(shape, dims, axes, coordinates):
            ranks.append(int(np.ravel_multi_index(coordinates, sizes)) if sizes else 0)
            boxes.append(box)
    num_holders = math.prod(sizes) // math.prod(sizes[position] for position in splitting)
    return _Shards(tuple(ranks), tuple(boxes), tuple(splitting), num_holders)


def _lay_out(
    tensors: Sequence[TensorEntry],
    stage_of: Sequence[int],
    mesh: TargetMesh,
    per_rank: Mapping[str, Sequence[tuple[int, Box]]],
) -> FileLayout:
    known: dict[tuple[Any, ...], _Shards] = {}
    classes: dict[tuple[int, tuple[int, ...]], int] = {}
    tensor: list[int] = []
    rank: list[int] = []
    boxes: list[Box] = []
    sharing: list[tuple[int, tuple[int, ...]]] = []
    for position, (entry, stage) in enumerate(zip(tensors, stage_of, strict=True)):
        if entry.kind == "alias":
            continue
        if entry.kind == "per_rank":
            placed = per_rank[entry.fqn]
            shards = _Shards(tuple(r for r, _ in placed), tuple(b for _, b in placed), (), 1)
            first = 0
        else:
            key = (entry.global_shape, tuple(sorted(entry.rule.items())))
            if key not in known:
                known[key] = _shards(entry.global_shape, entry.rule, mesh.inner)
            shards, first = known[key], stage * mesh.ranks_a_stage
        tensor.extend([position] * len(shards.boxes))
        rank.extend(first + holder for holder in shards.ranks)
        boxes.extend(shards.boxes)
        sharing.extend([_class_of(shards)] * len(shards.boxes))
    classes = {name: number for number, name in enumerate(sorted(set(sharing)))}
    width = max((len(entry.global_shape) for entry in tensors), default=1) or 1
    offsets, sizes = pad_boxes(boxes, width)
    table = Table.of(tensor, rank, offsets, sizes)
    return _number_files(table, np.asarray([classes[s] for s in sharing], np.int64), tensors)


def _class_of(shards: _Shards) -> tuple[int, tuple[int, ...]]:
    """Own chunks are one class, whatever axes split them; shared ones differ by their axes."""
    return (1, ()) if shards.num_holders == 1 else (shards.num_holders, shards.split_axes)


def _number_files(table: Table, sharing: I64, tensors: Sequence[TensorEntry]) -> FileLayout:
    """Sort chunks into files: by rank, part, readability and class; wide dtypes come first."""
    parts = sorted({entry.part for entry in tensors})
    part = np.asarray([parts.index(entry.part) for entry in tensors], np.int64)[table.tensor]
    itemsize = np.asarray([DTYPES[entry.dtype].itemsize for entry in tensors], np.int64)
    readable = np.asarray([DTYPES[entry.dtype].stock_readable for entry in tensors], bool)
    hidden = (~readable)[table.tensor].astype(np.int64)
    order = np.lexsort((table.tensor, -itemsize[table.tensor], sharing, hidden, part, table.rank))
    key = np.column_stack([table.rank, part, hidden, sharing])[order]
    is_new = np.r_[len(key) > 0, (key[1:] != key[:-1]).any(axis=1)][: len(key)]
    heads = key[is_new]
    # The class becomes the file's number among those of its rank and part.
    is_other = np.r_[len(heads) > 0, (heads[1:, :3] != heads[:-1, :3]).any(axis=1)][: len(heads)]
    starts = np.maximum.accumulate(np.where(is_other, np.arange(len(heads)), 0))
    heads[:, 3] = np.arange(len(heads)) - starts
    return FileLayout(
        chunks=table.take(order),
        file=np.cumsum(is_new, dtype=np.int32) - 1,
        names=file_names(heads, parts),
        parts=tuple(parts[number] for number in heads[:, 1].tolist()),
        ranks=heads[:, 0],
        ordinal=np.where(hidden[order] > 0, 0, -1).astype(np.int32),
        tensors=tuple(tensors),
    )
