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
from typing import cast

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.columns import pack_columns, unpack_columns
from dcp_resume.format.digests import digest_bytes
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.box_rows import Boxes

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
_FORMAT = 2
"""Of what a fingerprint covers."""
_HEAD = struct.Struct("<8s8q")
"""Magic, rank, world size, rows, how many are compared, boxes, width; bytes of structure,
contents."""
_RANK_MAGIC = b"DCPRRANK"
_RANK_HEAD = struct.Struct("<8s4q")
"""Magic, rows, width; bytes of the names, values."""
_INLINE_MAGIC = b"DCPRINLN"


class Structures:
    """Keeps each distinct structure once, so that thousands of equal ones are compared as one."""

    def __init__(self) -> None:
        self._last = b""
        self._column = np.zeros(0, np.uint8)
        self._known: dict[bytes, bytes] = {}

    def one_of(self, structure: memoryview) -> bytes:
        """The structure, in the same object for all that are equal."""
        column = np.frombuffer(structure, np.uint8)
        if not np.array_equal(column, self._column):
            own = column.tobytes()
            self._last = self._known.setdefault(own, own)
            self._column = np.frombuffer(self._last, np.uint8)
        return self._last


@dataclass(frozen=True, eq=False)
class PlanShape:
    """What one rank holds, whatever the contents are."""

    rank: int
    world_size: int
    structure: bytes
    """Canonical JSON: tensor entries and meshes."""
    tensor: npt.NDArray[np.int32]
    """``[n]`` position of each chunk's tensor in the structure; ascending."""
    box: npt.NDArray[np.int32]
    """``[n]`` row of each chunk's box."""
    boxes: Boxes
    compared: npt.NDArray[np.int32]
    """``[k]`` ascending positions of the chunks whose replicas no placement proves."""

    @cached_property
    def structure_digest(self) -> bytes:
        """16 bytes over the structure."""
        return digest_bytes([self.structure])

    @cached_property
    def fingerprint(self) -> bytes:
        """16 bytes over all of it; equal shapes have equal ones."""
        shape = self.boxes.offsets.shape
        numbers = (_FORMAT, self.rank, self.world_size, len(self.tensor), *shape)
        columns = (self.boxes.offsets, self.boxes.sizes, self.tensor, self.box, self.compared)
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
        columns = (shape.boxes.offsets, shape.boxes.sizes, shape.tensor, shape.box, shape.compared)
        head = _HEAD.pack(
            _MAGIC,
            shape.rank,
            shape.world_size,
            len(shape.tensor),
            len(shape.compared),
            *shape.boxes.offsets.shape,
            len(shape.structure),
            len(contents),
        )
        return b"".join([head, *(c.tobytes() for c in columns), shape.structure, contents])

    @classmethod
    def from_bytes(
        cls, data: bytes | memoryview, known: Structures | bytes | None = None
    ) -> LocalPlan:
        """Read what ``to_bytes`` wrote; thousands of ranks' are read in one go.

        Args:
            data: Of one rank.
            known: Of ranks that were read before; or the structure itself, which ``data`` leaves
                out. By default neither is known.

        Raises:
            InvalidDocument: The bytes are no local plan.
        """
        numbers = _read_head(data)
        rank, world_size, rows, compared, num_boxes, width, structure_size, _ = numbers
        # Wide columns first: each is aligned as far as the whole plan is.
        wide = np.frombuffer(data, "<i8", 2 * num_boxes * width, _HEAD.size)
        position = _HEAD.size + wide.nbytes
        narrow = np.frombuffer(data, "<i4", 2 * rows + compared, position)
        position += narrow.nbytes
        end = position + structure_size
        offsets, sizes = wide.reshape(2, num_boxes, width)
        if not isinstance(known, bytes):
            known = (known or Structures()).one_of(memoryview(data)[position:end])
        shape = PlanShape(
            rank=rank,
            world_size=world_size,
            structure=known,
            tensor=narrow[:rows],
            box=narrow[rows : 2 * rows],
            boxes=Boxes(offsets, sizes),
            compared=narrow[2 * rows :],
        )
        return cls(shape, PlanContents.from_bytes(bytes(data[end:])))


def _read_head(data: bytes | memoryview) -> tuple[int, ...]:
    """Numbers of a local plan that add up to its length."""
    if len(data) >= _HEAD.size:
        magic, *numbers = _HEAD.unpack_from(data)
        _, _, rows, compared, num_boxes, width, structure, contents = numbers
        columns = 16 * num_boxes * width + 8 * rows + 4 * compared
        size = _HEAD.size + columns + structure + contents
        if magic == _MAGIC and min(numbers) >= 0 and size == len(data):
            return tuple(numbers)
    message = f"{len(data)} bytes that begin with {bytes(data[:8])!r} are no local plan"
    raise _not_ours("local plan", message)


def _not_ours(where: str, message: str) -> InvalidDocument:
    problem = Problem(where, "header", message)
    return InvalidDocument(f"{message}; use one version of dcp_resume", problems=(problem,))


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
        """Serialise for its rank; thousands of ranks' are written in one go."""
        named = [[[f.name, f.part] for f in self.files], list(self.names.items())]
        names, inline = json.dumps(named).encode(), pack_inline(self.inline)
        head = _RANK_HEAD.pack(_RANK_MAGIC, *self.offsets.shape, len(names), len(inline))
        columns = (self.offsets, self.sizes, self.file, self.tensor, self.ordinal)
        return b"".join([head, *(column.tobytes() for column in columns), names, inline])

    @classmethod
    def from_bytes(cls, data: bytes) -> RankPlan:
        """Read what ``to_bytes`` wrote.

        Raises:
            InvalidDocument: The bytes are no rank plan.
        """
        rows, width, names_size, _ = _read_rank_head(data)
        wide = np.frombuffer(data, "<i8", 2 * rows * width, _RANK_HEAD.size)
        narrow = np.frombuffer(data, "<i4", 3 * rows, _RANK_HEAD.size + wide.nbytes)
        position = _RANK_HEAD.size + wide.nbytes + narrow.nbytes
        end = position + names_size
        offsets, sizes = wide.reshape(2, rows, width)
        file, tensor, ordinal = narrow.reshape(3, rows)
        files, names = json.loads(data[position:end])
        return cls(
            files=tuple(FilePlan(name, part) for name, part in files),
            file=file,
            tensor=tensor,
            ordinal=ordinal,
            offsets=offsets,
            sizes=sizes,
            names=dict(names),
            inline=unpack_inline(data[end:]),
        )


def _read_rank_head(data: bytes) -> tuple[int, ...]:
    """Numbers of a rank plan that add up to its length."""
    if len(data) >= _RANK_HEAD.size:
        magic, *numbers = _RANK_HEAD.unpack_from(data)
        rows, width, names, inline = numbers
        size = _RANK_HEAD.size + rows * (16 * width + 12) + names + inline
        if magic == _RANK_MAGIC and min(numbers) >= 0 and size == len(data):
            return tuple(numbers)
    message = f"{len(data)} bytes that begin with {data[:8]!r} are no rank plan"
    raise _not_ours("rank plan", message)


def pack_inline(inline: Mapping[str, bytes]) -> bytes:
    """Name → bytes, as bytes; none as none."""
    if not inline:
        return b""
    data = np.frombuffer(b"".join(inline.values()), np.uint8)
    sizes = [[name, len(data)] for name, data in inline.items()]
    return pack_columns(_INLINE_MAGIC, {"data": data}, {"sizes": sizes})


def unpack_inline(data: bytes) -> dict[str, bytes]:
    """Read what ``pack_inline`` wrote.

    Raises:
        InvalidDocument: The bytes are no such table.
    """
    if not data:
        return {}
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
