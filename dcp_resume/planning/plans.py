"""The plans that travel between ranks: columns of integers, and one structure text.

A rank's plan names its tensors in ``structure``, whose bytes are equal on all ranks of one SPMD
group, so that the coordinator parses it once; everything that differs between ranks is a column.

Shapes: ``n`` chunks of a rank, ``D`` the largest number of dims; rows of fewer dims are padded by
offset 0 and size 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dcp_resume.format.columns import Schema, pack_columns, unpack_columns
from dcp_resume.format.digests import digest_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import MeshEntry, TensorEntry

__all__ = [
    "FilePlan",
    "LocalPlan",
    "PlanContents",
    "PlanShape",
    "RankPlan",
    "decode_structure",
    "encode_structure",
    "leaves_entry",
    "pack_inline",
    "pad_boxes",
    "resize",
    "unpack_inline",
    "unpad_box",
]

I64 = npt.NDArray[np.int64]

_MAGIC = b"DCPRPLAN"
_FORMAT = 1
"""Of what a fingerprint covers."""
_SCHEMA: Schema = {
    "structure": ("u1", ()),
    "tensor": ("i4", ()),
    "offsets": ("i8", ()),
    "sizes": ("i8", ()),
    "compared": ("i4", ()),
    "contents": ("u1", ()),
}
_RANK_MAGIC = b"DCPRRANK"
_INLINE_MAGIC = b"DCPRINLN"


def pad_boxes(boxes: Sequence[Box], width: int) -> tuple[I64, I64]:
    """Offsets and sizes of boxes as two ``[n, width]`` matrices."""
    offsets = np.zeros((len(boxes), width), np.int64)
    sizes = np.ones((len(boxes), width), np.int64)
    for row, box in enumerate(boxes):
        offsets[row, : len(box.offsets)] = box.offsets
        sizes[row, : len(box.sizes)] = box.sizes
    return offsets, sizes


def unpad_box(offsets: I64, sizes: I64, ndim: int) -> Box:
    """One row of padded matrices as a box."""
    return Box(tuple(offsets[:ndim].tolist()), tuple(sizes[:ndim].tolist()))


def resize(matrix: I64, width: int, fill: int) -> I64:
    """Widen an ``[n, d]`` matrix to ``[n, width]``."""
    if matrix.shape[1] == width:
        return matrix
    wide = np.full((matrix.shape[0], width), fill, np.int64)
    wide[:, : matrix.shape[1]] = matrix
    return wide


@dataclass(frozen=True, eq=False)
class PlanShape:
    """What one rank holds, whatever the contents are."""

    rank: int
    world_size: int
    structure: bytes
    """Canonical JSON: tensor entries and meshes."""
    tensor: npt.NDArray[np.int32]
    """``[n]`` position of each chunk's tensor in the structure; ascending."""
    offsets: I64
    """``[n, D]``"""
    sizes: I64
    """``[n, D]``"""
    compared: npt.NDArray[np.int32]
    """``[k]`` ascending positions of the chunks whose replicas no placement proves."""

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes over all of it; equal shapes have equal ones."""
        numbers = (_FORMAT, self.rank, self.world_size, *self.offsets.shape, len(self.compared))
        columns = (self.tensor, self.offsets, self.sizes, self.compared)
        parts = (np.asarray(numbers, np.int64), *columns)
        return digest_bytes([*(part.tobytes() for part in parts), self.structure])


@dataclass(frozen=True, slots=True)
class PlanContents:
    """What may differ between two saves of one shape."""

    digests: bytes
    """16 bytes for each compared chunk of the shape, in its order."""
    values: bytes
    """Packed shared values."""

    def to_bytes(self) -> bytes:
        """Serialise for another rank."""
        return len(self.digests).to_bytes(8, "little") + self.digests + self.values

    @classmethod
    def from_bytes(cls, data: bytes) -> PlanContents:
        """Read what ``to_bytes`` wrote."""
        end = 8 + int.from_bytes(data[:8], "little")
        return cls(data[8:end], data[end:])


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What one rank offers."""

    shape: PlanShape
    contents: PlanContents

    def to_bytes(self) -> bytes:
        """Serialise for another rank."""
        shape = self.shape
        return pack_columns(
            _MAGIC,
            {
                "structure": np.frombuffer(shape.structure, np.uint8),
                "tensor": shape.tensor,
                "offsets": shape.offsets.reshape(-1),
                "sizes": shape.sizes.reshape(-1),
                "compared": shape.compared,
                "contents": np.frombuffer(self.contents.to_bytes(), np.uint8),
            },
            {
                "rank": shape.rank,
                "world_size": shape.world_size,
                "width": int(shape.offsets.shape[1]),
            },
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> LocalPlan:
        """Read what ``to_bytes`` wrote.

        Raises:
            InvalidDocument: The bytes are no local plan.
        """
        meta, columns = unpack_columns(_MAGIC, data, "local plan", _SCHEMA)
        matrix = (len(columns["tensor"]), int(meta["width"]))
        shape = PlanShape(
            rank=int(meta["rank"]),
            world_size=int(meta["world_size"]),
            structure=columns["structure"].tobytes(),
            tensor=columns["tensor"],
            offsets=columns["offsets"].reshape(matrix),
            sizes=columns["sizes"].reshape(matrix),
            compared=columns["compared"],
        )
        return cls(shape, PlanContents.from_bytes(columns["contents"].tobytes()))


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

    def rows(self) -> Iterator[tuple[int, str, list[int], list[int]]]:
        """Each chunk's tensor, name in its file, offsets and sizes, in file order."""
        keys = (key for file in self.files for key in file.keys)
        boxes = (self.offsets.tolist(), self.sizes.tolist())
        return zip(self.tensor.tolist(), keys, *boxes, strict=True)

    def to_bytes(self) -> bytes:
        """Serialise for its rank."""
        meta: dict[str, Any] = {
            "width": int(self.offsets.shape[1]),
            "files": [[f.name, f.part, list(f.keys)] for f in self.files],
        }
        return pack_columns(
            _RANK_MAGIC,
            {
                "file": self.file,
                "tensor": self.tensor,
                "offsets": self.offsets.reshape(-1),
                "sizes": self.sizes.reshape(-1),
                "inline": np.frombuffer(pack_inline(self.inline), np.uint8),
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
        return cls(
            files=tuple(FilePlan(name, part, tuple(keys)) for name, part, keys in meta["files"]),
            file=columns["file"],
            tensor=columns["tensor"],
            offsets=columns["offsets"].reshape(shape),
            sizes=columns["sizes"].reshape(shape),
            inline=unpack_inline(columns["inline"].tobytes()),
        )


def pack_inline(inline: Mapping[str, bytes]) -> bytes:
    """Name → bytes, as bytes."""
    data = np.frombuffer(b"".join(inline.values()), np.uint8)
    sizes = [[name, len(data)] for name, data in inline.items()]
    return pack_columns(_INLINE_MAGIC, {"data": data}, {"sizes": sizes})


def unpack_inline(data: bytes) -> dict[str, bytes]:
    """Read what ``pack_inline`` wrote.

    Raises:
        InvalidDocument: The bytes are no such table.
    """
    meta, columns = unpack_columns(_INLINE_MAGIC, data, "inline values", {"data": ("u1", ())})
    joined, position = columns["data"].tobytes(), 0
    inline: dict[str, bytes] = {}
    for name, size in cast("list[tuple[str, int]]", meta["sizes"]):
        inline[name] = joined[position : position + size]
        position += size
    return inline


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
