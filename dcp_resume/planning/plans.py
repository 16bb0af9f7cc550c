"""The plans that travel between ranks: columns of integers, and one structure text.

A rank's plan names its tensors in ``structure``, whose bytes are equal on all ranks of one SPMD
group, so that the coordinator parses it once; everything that differs between ranks is a column.

Shapes: ``n`` chunks of a rank, ``D`` the largest number of dims; rows of fewer dims are padded by
offset 0 and size 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dcp_resume.errors import ConfigurationError
from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.digests import digest_bytes
from dcp_resume.format.leaves import pack_leaves
from dcp_resume.format.tensor_bytes import as_bytes, contiguous_cpu
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.box_rows import pad_boxes
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.flattening import part_of
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.state import PER_RANK_LEAVES, SHARED_LEAVES, LocalState
from dcp_resume.planning.ties import Ties

__all__ = [
    "PER_RANK_LEAVES",
    "SHARED_LEAVES",
    "WITHHELD",
    "FilePlan",
    "LocalPlan",
    "RankPlan",
    "local_plan",
]

I64 = npt.NDArray[np.int64]

WITHHELD = {"$withheld": True}
"""Stands for a value that another rank was declared to offer; no encoded leaf looks like it."""

CORNER_ELEMENTS = 16 * 1024
"""Of a chunk that a declaration says is replicated, so many elements are compared."""

_MAGIC = b"DCPRPLAN"
_RANK_MAGIC = b"DCPRRANK"


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What one rank holds."""

    rank: int
    structure: bytes
    """Canonical JSON: tensor entries and meshes."""
    tensor: npt.NDArray[np.int32]
    """``[n]`` position of each chunk's tensor in the structure; ascending."""
    offsets: I64
    """``[n, D]``"""
    sizes: I64
    """``[n, D]``"""
    digest: npt.NDArray[np.uint8]
    """``[n, 16]`` digest of a chunk whose replicas no placement proves; zeros elsewhere."""
    values: bytes
    """Packed shared values."""

    def to_bytes(self) -> bytes:
        """Serialise for another rank."""
        return pack_columns(
            _MAGIC,
            {
                "structure": np.frombuffer(self.structure, np.uint8),
                "tensor": self.tensor,
                "offsets": self.offsets.reshape(-1),
                "sizes": self.sizes.reshape(-1),
                "digest": self.digest.reshape(-1),
                "values": np.frombuffer(self.values, np.uint8),
            },
            {"rank": self.rank, "width": int(self.offsets.shape[1])},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> LocalPlan:
        """Read what ``to_bytes`` wrote.

        Raises:
            InvalidDocument: The bytes are no local plan.
        """
        meta, columns = unpack_columns(
            _MAGIC,
            data,
            "local plan",
            {
                "structure": ("u1", ()),
                "tensor": ("i4", ()),
                "offsets": ("i8", ()),
                "sizes": ("i8", ()),
                "digest": ("u1", ()),
                "values": ("u1", ()),
            },
        )
        shape = (len(columns["tensor"]), int(meta["width"]))
        return cls(
            rank=int(meta["rank"]),
            structure=columns["structure"].tobytes(),
            tensor=columns["tensor"],
            offsets=columns["offsets"].reshape(shape),
            sizes=columns["sizes"].reshape(shape),
            digest=columns["digest"].reshape(-1, 16),
            values=columns["values"].tobytes(),
        )


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One data file that a rank writes."""

    name: str
    part: str
    keys: tuple[str, ...]
    """Per chunk its name in the file, in file order."""


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank writes."""

    files: tuple[FilePlan, ...]
    file: npt.NDArray[np.int32]
    """``[n]`` position of each chunk's file in ``files``; ascending, in file order."""
    tensor: npt.NDArray[np.int32]
    """``[n]`` position in the rank's own structure; -1 for bytes in ``inline``."""
    offsets: I64
    """``[n, D]`` box, as the catalog will say it."""
    sizes: I64
    """``[n, D]``"""
    inline: Mapping[str, bytes]
    """Name → bytes of chunks that no tensor of this rank holds (shared values)."""

    def to_bytes(self) -> bytes:
        """Serialise for its rank."""
        names = sorted(self.inline)
        meta: dict[str, Any] = {
            "width": int(self.offsets.shape[1]),
            "files": [[f.name, f.part, list(f.keys)] for f in self.files],
            "inline": [[name, len(self.inline[name])] for name in names],
        }
        return pack_columns(
            _RANK_MAGIC,
            {
                "file": self.file,
                "tensor": self.tensor,
                "offsets": self.offsets.reshape(-1),
                "sizes": self.sizes.reshape(-1),
                "inline": np.frombuffer(b"".join(self.inline[name] for name in names), np.uint8),
                "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
            },
            {},
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> RankPlan:
        """Read what ``to_bytes`` wrote.

        Raises:
            InvalidDocument: The bytes are no rank plan.
        """
        schema = {
            "file": ("i4", ()),
            "tensor": ("i4", ()),
            "offsets": ("i8", ()),
            "sizes": ("i8", ()),
            "inline": ("u1", ()),
            "meta": ("u1", ()),
        }
        _, columns = unpack_columns(_RANK_MAGIC, data, "rank plan", schema)
        meta = json.loads(columns["meta"].tobytes())
        shape = (len(columns["tensor"]), int(meta["width"]))
        blob, position, inline = columns["inline"].tobytes(), 0, {}
        for name, length in meta["inline"]:
            inline[name] = blob[position : position + length]
            position += length
        return cls(
            files=tuple(FilePlan(name, part, tuple(keys)) for name, part, keys in meta["files"]),
            file=columns["file"],
            tensor=columns["tensor"],
            offsets=columns["offsets"].reshape(shape),
            sizes=columns["sizes"].reshape(shape),
            inline=inline,
        )


def encode_structure(tensors: Sequence[TensorEntry], meshes: Sequence[MeshEntry]) -> bytes:
    """Tensor entries and meshes as canonical JSON."""
    document = {
        "tensors": [entry.model_dump(mode="json") for entry in tensors],
        "meshes": [mesh.model_dump(mode="json") for mesh in meshes],
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def decode_structure(data: bytes) -> tuple[list[TensorEntry], list[MeshEntry]]:
    """Read what ``encode_structure`` wrote."""
    document = json.loads(data)
    return (
        [TensorEntry.model_validate(entry) for entry in document["tensors"]],
        [MeshEntry.model_validate(mesh) for mesh in document["meshes"]],
    )


def per_rank_leaves(state: LocalState) -> dict[str, bytes]:
    """Part → packed per-rank values of this rank."""
    parts: dict[str, dict[str, Any]] = {}
    for fqn, (path, value) in state.per_rank_values.items():
        parts.setdefault(part_of(path), {})[fqn] = (path, value)
    return {part: pack_leaves(values) for part, values in parts.items()}


def leaves_entry(fqn: str, part: str, size: int, *, is_per_rank: bool) -> TensorEntry:
    """Entry of a tensor that holds packed values."""
    return TensorEntry(
        fqn=fqn,
        path=(fqn,),
        part=part,
        dtype="uint8",
        global_shape=(size,),
        kind="per_rank" if is_per_rank else "replicated",
        codec="leaves",
    )


def local_plan(
    state: LocalState, rank: int, world_size: int, declarations: Declarations
) -> LocalPlan:
    """Plan what this rank offers to write.

    A tensor that placements over the whole world describe is proved replicated or sharded; the
    chunks of all others carry a digest, so that the coordinator can compare what it takes for
    replicas. Of what a declared layout over the whole world describes, a corner is compared: that
    costs nothing, and finds layers or experts that are numbered from 0 on every rank. A leaf
    declared ``from_rank`` is offered by that rank alone.

    Raises:
        ConfigurationError: ``from_rank`` names a rank that does not exist, or the declared mesh is
            another rank's.
    """
    beyond = {p: r for p, r in declarations.from_rank.items() if not 0 <= r < world_size}
    if beyond:
        raise ConfigurationError(
            f"from_rank names {beyond}; the ranks are 0 to {world_size - 1}", option="from_rank"
        )
    state.check_place(rank, world_size)
    entries: list[TensorEntry] = []
    boxes: list[Box] = []
    tensor: list[int] = []
    digests: list[bytes] = []
    whole_world = {mesh.id for mesh in state.meshes if _size(mesh) == world_size}
    ties = Ties(declarations.ties, [held.entry.fqn for held in state.tensors])
    for held in state.tensors:
        source = declarations.source_rank(held.entry.fqn)
        position = len(entries)
        entries.append(held.entry)
        if source is not None and source != rank:
            continue
        evidence = _evidence(held, whole_world, is_alone=world_size == 1, ties=ties)
        for piece in held.pieces:
            boxes.append(piece.box)
            tensor.append(position)
            digests.append(evidence(piece.memory))
    for part, data in per_rank_leaves(state).items():
        entries.append(leaves_entry(PER_RANK_LEAVES + part, part, len(data), is_per_rank=True))
        boxes.append(Box((0,), (len(data),)))
        tensor.append(len(entries) - 1)
        digests.append(bytes(16))
    width = max((len(entry.global_shape) for entry in entries), default=1) or 1
    offsets, sizes = pad_boxes(boxes, width)
    values = {
        fqn: (path, value if declarations.source_rank(fqn) in (None, rank) else WITHHELD)
        for fqn, (path, value) in state.values.items()
    }
    # The length of packed per-rank values differs between ranks; the columns carry it, so that
    # the structure text stays equal.
    shared = [
        entry.model_copy(update={"global_shape": (0,)}) if entry.codec == "leaves" else entry
        for entry in entries
    ]
    return LocalPlan(
        rank=rank,
        structure=encode_structure(shared, state.meshes),
        tensor=np.asarray(tensor, np.int32),
        offsets=offsets,
        sizes=sizes,
        digest=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
        values=pack_leaves(values),
    )


Evidence = Callable[[torch.Tensor], bytes]
"""Memory of a chunk → what is compared with other ranks' memory of it."""


def _evidence(
    held: HeldTensor, whole_world: Collection[str], *, is_alone: bool, ties: Ties
) -> Evidence:
    if held.entry.kind == "per_rank":
        return _nothing
    if ties.is_tied(held.entry.alias_of or held.entry.fqn):
        return _digest  # also of a further name that no tie names: it counts as the first one's
    if is_alone:
        return _nothing
    if held.entry.mesh in whole_world:
        return _corner_digest if held.is_declared else _nothing
    return _digest


def _nothing(memory: torch.Tensor) -> bytes:
    del memory
    return bytes(16)


def _digest(memory: torch.Tensor) -> bytes:
    return digest_bytes([as_bytes(contiguous_cpu(memory))])


def _corner_digest(memory: torch.Tensor) -> bytes:
    left = CORNER_ELEMENTS
    for dim in reversed(range(memory.ndim)):
        size = min(memory.shape[dim], left)
        memory = memory.narrow(dim, 0, size)
        left //= max(size, 1)
    return _digest(memory)


def _size(mesh: MeshEntry) -> int:
    size = 1
    for extent in mesh.shape:
        size *= extent
    return size
