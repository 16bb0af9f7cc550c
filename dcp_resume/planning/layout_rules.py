"""What the user says of a target layout: its mesh, and which axis splits which dim of a tensor.

    mesh    ``tp=2,pp=2,dp=1``
    layout  {"rules": [{"match": "model.*.wq.weight", "tp": 0}, {"match": "*.head.*", "stage": 1}],
             "axes": {"dp_shard": "dp"}, "replicate": ["dp"], "stages": [[0, 1], [2, 3]]}

Of several rules that match a tensor the first one counts, and it replaces what the checkpoint says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.models import MeshEntry
from dcp_resume.planning.mesh_place import PIPELINE_AXIS, mesh_entry

__all__ = ["LayoutRules", "TargetMesh", "TensorRule"]

MAX_WORLD_SIZE = 99_999
"""Names of data files have five digits for the rank."""

_AXIS = re.compile(r"([a-z][a-z0-9_]{0,31})=([1-9][0-9]{0,4})")
_DATA_AXES = ("dp", "fsdp", "hsdp", "cp", "data")
_REPLICATING_AXES = frozenset({"dp_replicate", "cp"})
"""Axes that hold copies of parameters wherever no rule says otherwise."""


class Axis(NamedTuple):
    """One axis of a mesh."""

    name: str
    size: int

    @property
    def is_data(self) -> bool:
        """Whether it splits what the other axes left, as FSDP does with a TP shard."""
        return self.name.startswith(_DATA_AXES)


@dataclass(frozen=True, slots=True)
class TargetMesh:
    """The arrangement of target ranks: pipeline stages, each a mesh of the other axes.

    >>> TargetMesh.parse("tp=2,pp=3").shape
    (3, 2)
    """

    axes: tuple[Axis, ...]
    """Outermost first; ``pp`` is the first where there is one."""

    @classmethod
    def parse(cls, text: str) -> TargetMesh:
        """Read ``axis=size,…``; axes keep their order, but ``pp`` becomes the outermost.

        Raises:
            ConfigurationError: Malformed, an axis twice, or too many ranks.
        """
        matches = [_AXIS.fullmatch(item.strip()) for item in text.split(",")]
        axes = [Axis(match[1], int(match[2])) for match in matches if match]
        names = [axis.name for axis in axes]
        if len(axes) != len(matches) or len(set(names)) != len(names):
            raise ConfigurationError(
                f"cannot read the mesh {text!r}; expected distinct axes with sizes of 1 and up, "
                "such as tp=2,pp=2,dp=1",
                option="to",
            )
        mesh = cls(tuple(sorted(axes, key=lambda axis: axis.name != PIPELINE_AXIS)))
        if mesh.world_size > MAX_WORLD_SIZE:
            raise ConfigurationError(
                f"the mesh {text!r} has {mesh.world_size} ranks; at most {MAX_WORLD_SIZE}",
                option="to",
            )
        return mesh

    def __str__(self) -> str:
        return ",".join(f"{axis.name}={axis.size}" for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    @property
    def inner(self) -> tuple[Axis, ...]:
        """The axes of one pipeline stage."""
        return tuple(axis for axis in self.axes if axis.name != PIPELINE_AXIS)

    @property
    def ranks_a_stage(self) -> int:
        """Ranks of one pipeline stage; their numbers follow one another."""
        return math.prod(axis.size for axis in self.inner)

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.world_size // self.ranks_a_stage

    def stage_meshes(self) -> tuple[MeshEntry, ...]:
        """Per stage its mesh, as placements refer to it."""
        axes = self.inner or (Axis("rank", 1),)
        size = self.ranks_a_stage
        return tuple(
            _entry(axes, range(stage * size, (stage + 1) * size))
            for stage in range(self.num_stages)
        )

    def meshes(self) -> tuple[MeshEntry, ...]:
        """Every mesh, the whole one first."""
        whole = _entry(self.axes, range(self.world_size))
        return tuple({mesh.id: mesh for mesh in (whole, *self.stage_meshes())}.values())


def _entry(axes: Sequence[Axis], ranks: range) -> MeshEntry:
    names, shape = tuple(axis.name for axis in axes), tuple(axis.size for axis in axes)
    return mesh_entry(names, shape, tuple(ranks))


@dataclass(frozen=True, slots=True)
class TensorRule:
    """How the tensors of one pattern are placed."""

    match: str
    """Pattern of FQNs, as in ``fnmatch``."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Target axis → tensor dim; on all other axes the tensor is replicated."""
    stage: int | None = None
    """Pipeline stage, instead of the one that the layer gives."""


@dataclass(frozen=True, slots=True)
class LayoutRules:
    """What the checkpoint does not say, or says otherwise."""

    rules: tuple[TensorRule, ...] = ()
    axes: Mapping[str, str] = field(default_factory=dict)
    """Axis in the checkpoint → axis of the target."""
    replicate: tuple[str, ...] = ()
    """Target axes that hold copies on purpose."""
    stages: tuple[tuple[int, ...], ...] | None = None
    """Per pipeline stage its layers."""

    def find(self, fqn: str) -> TensorRule | None:
        """The first rule that matches a tensor."""
        return next((rule for rule in self.rules if fnmatchcase(fqn, rule.match)), None)

    def renamed(self, axis: str) -> str:
        """The target's name of an axis of the checkpoint."""
        return self.axes.get(axis, axis)

    def is_replicating(self, axis: str) -> bool:
        """Whether an axis is known to hold copies of whatever no rule splits."""
        return axis in self.replicate or axis in _REPLICATING_AXES

    @classmethod
    def from_document(cls, document: object) -> LayoutRules:
        """Read a layout file's JSON.

        Raises:
            ConfigurationError: It is no layout; every fault is listed.
        """
        faults: list[str] = []
        known = {"rules", "axes", "replicate", "stages"}
        if not isinstance(document, Mapping):
            faults.append(f"expected an object with {sorted(known)}, found {document!r:.80}")
            document = {}
        faults += [f"unknown field {name!r}" for name in document if name not in known]
        layout = cls(
            rules=tuple(_read_rules(document.get("rules", []), faults)),
            axes=_read_axes(document.get("axes", {}), faults),
            replicate=tuple(_read_names(document.get("replicate", []), faults)),
            stages=_read_stages(document.get("stages"), faults),
        )
        if faults:
            lines = "\n".join(f"  - {fault}" for fault in faults)
            raise ConfigurationError(f"the layout cannot be used:\n{lines}", option="layout")
        return layout


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_layers(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_index, value))


def _read_rules(items: object, faults: list[str]) -> Iterator[TensorRule]:
    if not isinstance(items, list):
        faults.append(f"rules: expected a list, found {items!r:.80}")
        return
    for number, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("match"), str):
            faults.append(f"rules[{number}]: expected an object with a pattern 'match'")
            continue
        dims = {axis: dim for axis, dim in item.items() if axis not in ("match", "stage")}
        stage = item.get("stage")
        faults += [
            f"rules[{number}].{axis}: expected a tensor dim of 0 and up or null, found {dim!r:.40}"
            for axis, dim in dims.items()
            if dim is not None and not _is_index(dim)
        ]
        if stage is not None and not _is_index(stage):
            faults.append(f"rules[{number}].stage: expected a stage from 0, found {stage!r:.40}")
        split = {axis: dim for axis, dim in dims.items() if dim is not None}
        yield TensorRule(item["match"], split, stage)


def _read_axes(value: object, faults: list[str]) -> Mapping[str, str]:
    if isinstance(value, dict) and all(isinstance(name, str) for name in value.values()):
        return value
    faults.append(f"axes: expected an object of names, found {value!r:.80}")
    return {}


def _read_names(value: object, faults: list[str]) -> list[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    faults.append(f"replicate: expected a list of axes, found {value!r:.80}")
    return []


def _read_stages(value: object, faults: list[str]) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(map(_is_layers, value)):
        return tuple(map(tuple, value))
    faults.append(f"stages: expected a list of lists of layers, found {value!r:.80}")
    return None
