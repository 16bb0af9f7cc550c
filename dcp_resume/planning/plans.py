"""The plans that travel between ranks: columns of integers, and one structure text.

A rank's plan names its tensors in ``structure``, whose bytes are equal on all ranks of one SPMD
group, so that the coordinator parses it once; everything that differs between ranks is a column.

Shapes: ``n`` chunks of a rank, ``D`` the largest number of dims; rows of fewer dims are padded by
offset 0 and size 1.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.digests import digest_bytes
from dcp_resume.manifest.models import MeshEntry, TensorEntry

__all__ = [
    "FilePlan",
    "LocalPlan",
    "PlanContents",
    "PlanShape",
    "RankPlan",
    "Structures",
    "chunk_key",
    "decode_structure",
    "encode_structure",
    "leaves_entry",
    "pack_inline",
    "unpack_inline",
]

I64 = npt.NDArray[np.int64]

_MAGIC = b"DCPRPLAN"
_FORMAT = 1
"""Of what a fingerprint covers."""
_HEAD = struct.Struct("<8s7q")
"""Magic, rank, world size, rows, width, and how many are compared; bytes of structure, contents."""
_RANK_MAGIC = b"DCPRRANK"
_INLINE_MAGIC = b"DCPRINLN"


class Structures:
    """Keeps each distinct structure once, so that thousands of equal ones are compared as one."""

    def __init__(self) -> None:
        self._last = b""
        self._column = np.zeros(0, np.uint8)
        self._known: dict[bytes, bytes] = {}

    def one_of(self, structure: npt.NDArray[np.uint8]) -> bytes:
        """The structure, in the same object for all that are equal."""
        if not np.array_equal(structure, self._column):
            self._last = self.kept(structure.tobytes())
            self._column = np.frombuffer(self._last, np.uint8)
        return self._last

    def kept(self, structure: bytes) -> bytes:
        """The same, of a structure that is no column."""
        return self._known.setdefault(structure, structure)


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
    def structure_digest(self) -> bytes:
        """16 bytes over the structure."""
        return digest_bytes([self.structure])

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
        shape, contents = self.shape, self.contents.to_bytes()
        columns = (shape.offsets, shape.sizes, shape.tensor, shape.compared)
        head = _HEAD.pack(
            _MAGIC,
            shape.rank,
            shape.world_size,
            *shape.offsets.shape,
            len(shape.compared),
            len(shape.structure),
            len(contents),
        )
        return b"".join([head, *(c.tobytes() for c in columns), shape.structure, contents])

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, structures: Structures | None = None
    ) -> LocalPlan:
        """Read what ``to_bytes`` wrote; thousands of ranks' are read in one go.

        Args:
            data: Of one rank.
            structures: Of ranks that were read before; by default there are none.

        Raises:
            InvalidDocument: The bytes are no local plan.
        """
        rank, world_size, rows, width, *lengths = _read_head(data)
        columns: list[npt.NDArray[Any]] = []
        position = _HEAD.size
        for dtype, count in zip(
            ("<i8", "<i8", "<i4", "<i4", "u1"),
            (rows * width, rows * width, rows, *lengths[:2]),
            strict=True,
        ):
            columns.append(np.frombuffer(data, dtype, count, position))
            position += columns[-1].nbytes
        offsets, sizes, tensor, compared, structure = columns
        shape = PlanShape(
            rank=rank,
            world_size=world_size,
            structure=(structures or Structures()).one_of(structure),
            tensor=tensor,
            offsets=offsets.reshape(rows, width),
            sizes=sizes.reshape(rows, width),
            compared=compared,
        )
        return cls(shape, PlanContents.from_bytes(bytes(data[position:])))


def _read_head(data: bytes | memoryview) -> tuple[int, ...]:
    """Numbers of a local plan that add up to its length."""
    if len(data) >= _HEAD.size:
        magic, *numbers = _HEAD.unpack_from(data)
        _, _, rows, width, compared, structure, contents = numbers
        size = _HEAD.size + rows * (16 * width + 4) + 4 * compared + structure + contents
        if magic == _MAGIC and min(numbers) >= 0 and size == len(data):
            return tuple(numbers)
    message = f"{len(data)} bytes that begin with {bytes(data[:8])!r} are no local plan"
    problem = Problem("local plan", "header", message)
    raise InvalidDocument(f"{message}; use one version of dcp_resume", problems=(problem,))


def chunk_key(fqn: str, ordinal: int) -> str:
    """Name of a chunk in its file."""
    return fqn if ordinal < 0 else f"{fqn}#{ordinal}"


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One data file that a rank writes."""

    name: str
    part: str


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank writes."""

    files: tuple[FilePlan, ...]
    file: npt.NDArray[np.int32]
    """``[n]`` position of each chunk's file in ``files``; ascending, in file order."""
    tensor: npt.NDArray[np.int32]
    """``[n]`` position in the rank's own structure; -1 for bytes in ``inline``."""
    ordinal: npt.NDArray[np.int32]
    """``[n]`` number behind the chunk's name in its file; -1 for none."""
    offsets: I64
    """``[n, D]`` box, as the catalog will say it."""
    sizes: I64
    """``[n, D]``"""
    names: Mapping[int, str]
    """Chunk → FQN, of those that are not stored under their tensor's own."""
    inline: Mapping[str, bytes]
    """Name → bytes of chunks that no tensor of this rank holds (shared values)."""

    def rows(self, fqns: Sequence[str]) -> Iterator[tuple[int, str, str, list[int], list[int]]]:
        """Each chunk's tensor, FQN, name in its file, offsets and sizes, in file order.

        Args:
            fqns: Of the tensors of the rank's own structure.
        """
        tensors = self.tensor.tolist()
        names = [fqns[tensor] if tensor >= 0 else "" for tensor in tensors]
        for row, name in self.names.items():
            names[row] = name
        keys = map(chunk_key, names, self.ordinal.tolist())
        return zip(tensors, names, keys, self.offsets.tolist(), self.sizes.tolist(), strict=True)

    def to_bytes(self) -> bytes:
        """Serialise for its rank."""
        meta: dict[str, Any] = {
            "width": int(self.offsets.shape[1]),
            "files": [[f.name, f.part] for f in self.files],
            "names": list(self.names.items()),
        }
        return pack_columns(
            _RANK_MAGIC,
            {
                "file": self.file,
                "tensor": self.tensor,
                "ordinal": self.ordinal,
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
            "ordinal": ("i4", ()),
            "offsets": ("i8", ()),
            "sizes": ("i8", ()),
            "inline": ("u1", ()),
            "meta": ("u1", ()),
        }
        _, columns = unpack_columns(_RANK_MAGIC, data, "rank plan", schema)
        meta = json.loads(columns["meta"].tobytes())
        shape = (len(columns["tensor"]), int(meta["width"]))
        return cls(
            files=tuple(FilePlan(name, part) for name, part in meta["files"]),
            file=columns["file"],
            tensor=columns["tensor"],
            ordinal=columns["ordinal"],
            offsets=columns["offsets"].reshape(shape),
            sizes=columns["sizes"].reshape(shape),
            names=dict(meta["names"]),
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
