"""What a checkpoint of another format holds: where the bytes of each tensor lie, and the values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dcp_resume.errors import ForeignDamage, ForeignFormat, KeyNotFound, Problem, ShortRead
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.tiling import tiling_faults
from dcp_resume.interop.formats import Format
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.box_rows import pad_boxes
from dcp_resume.planning.flattening import Path
from dcp_resume.problems import summarise
from dcp_resume.session.targets import Target
from dcp_resume.storage import ByteRange, ObjectStore, RangeRead

__all__ = ["Foreign", "ForeignTensor", "Region", "Source", "fill_targets", "row_major"]

MAX_TENSORS = 2_000_000
MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class Source:
    """A foreign file, or a directory of them."""

    store: ObjectStore
    key: str
    """Of a file; empty for the store's root, a directory."""

    @property
    def url(self) -> str:
        """For messages."""
        return f"{self.store.url}/{self.key}" if self.key else self.store.url

    def sizes(self) -> dict[str, int]:
        """Each file and its bytes."""
        if self.key:
            return {self.key: self.store.size(self.key)}
        return {info.key: info.size for info in self.store.list("")}

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes of one file.

        Raises:
            ForeignDamage: It is absent or shorter.
            StorageError: The store failed.
        """
        into = bytearray(stop - start)
        try:
            read = RangeRead(ByteRange(start, stop), memoryview(into))
            self.store.read_into(key, [read])
        except (KeyNotFound, ShortRead) as error:
            raise self.damage([Problem(key, "read", str(error))]) from error
        return bytes(into)

    def read_whole(self, key: str, max_bytes: int) -> bytes:
        """A whole file of at most ``max_bytes``; see ``read``."""
        try:
            return self.store.read(key, max_bytes=max_bytes)
        except (KeyNotFound, ShortRead) as error:
            raise self.damage([Problem(key, "read", str(error))]) from error

    def damage(self, problems: Sequence[Problem]) -> ForeignDamage:
        """The error of a source that contradicts itself."""
        return ForeignDamage(
            f"{self.url} is damaged; nothing was imported:\n{summarise(problems)}\n"
            "get it again from where it came",
            url=self.url,
            problems=tuple(problems),
        )

    def wrong_format(self, expected: str, found: str) -> ForeignFormat:
        """The error of a source of another format."""
        return ForeignFormat(
            f"{self.url} is {found}, expected {expected}; name its format, or another path",
            url=self.url,
            problems=(Problem(self.key or ".", "format", f"expected {expected}, found {found}"),),
        )


@dataclass(frozen=True, slots=True)
class Region:
    """Where the elements of a box lie in one file."""

    box: Box
    key: str
    begin: int
    """Byte of the first element."""
    strides: tuple[int, ...]
    """In elements, none negative."""

    @property
    def span(self) -> int:
        """Elements from the first to the last, both counted."""
        if not self.box.volume:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.box.sizes, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """One tensor, and the regions that tile it."""

    path: Path
    dtype: str
    """Name in torch, without the prefix."""
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A foreign checkpoint, of which no tensor has been read yet."""

    source: Source
    format: Format
    tensors: Mapping[str, ForeignTensor]
    values: Mapping[str, tuple[Path, Any]] = field(default_factory=dict)
    """Name → path, and the value itself."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Further name → name of the tensor that it is."""
    step: int | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    left: tuple[Problem, ...] = ()
    """What is there and cannot be taken over."""

    def checked(self, sizes: Mapping[str, int]) -> Foreign:
        """Itself, once every region is proved to lie in a file and all to tile their tensors.

        Raises:
            ForeignDamage: They do not; every fault is listed.
        """
        problems: list[Problem] = []
        if len(self.tensors) > MAX_TENSORS:
            problems.append(Problem("tensors", "cap", f"found {len(self.tensors)}"))
        for name, tensor in self.tensors.items():
            problems += _tensor_problems(name, tensor, sizes)
        problems = problems or self._tiling_problems()
        if problems:
            raise self.source.damage(problems)
        return self

    def _tiling_problems(self) -> list[Problem]:
        many = [(n, t) for n, t in self.tensors.items()]
        boxes = [region.box for _, tensor in many for region in tensor.regions]
        width = max((len(tensor.shape) for _, tensor in many), default=1) or 1
        offsets, sizes = pad_boxes(boxes, width)
        counts = [len(tensor.regions) for _, tensor in many]
        tensor = np.repeat(np.arange(len(many), dtype=np.int64), counts)
        shapes = [t.shape for _, t in many]
        faults = tiling_faults(tensor, np.arange(len(boxes)), offsets, sizes, shapes)
        return [Problem(many[f.tensor][0], f.kind, f.message) for f in faults]


def row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a box whose elements lie in order."""
    return tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def _tensor_problems(name: str, tensor: ForeignTensor, sizes: Mapping[str, int]) -> list[Problem]:
    if tensor.dtype not in ITEMSIZES:
        return [Problem(name, "dtype", f"{tensor.dtype!r} cannot be stored")]
    if len(tensor.shape) > MAX_DIMS or math.prod(tensor.shape) * 16 >= 2**63:
        return [Problem(name, "shape", f"{tensor.shape} is larger than any tensor")]
    problems: list[Problem] = []
    whole = Box.whole(tensor.shape)
    for region in tensor.regions:
        stop = region.begin + region.span * ITEMSIZES[tensor.dtype]
        size = sizes.get(region.key)
        if size is None:
            message = f"it lies in {region.key!r}, which is no file of this checkpoint"
            problems.append(Problem(name, "missing", message))
        elif region.begin < 0 or stop > size:
            message = f"bytes {region.begin} to {stop} of {region.key}, which has {size}"
            problems.append(Problem(name, "size", message))
        if not whole.contains(region.box) or len(region.strides) != len(tensor.shape):
            problems.append(Problem(name, "shape", f"{region.box} of a tensor of {tensor.shape}"))
        elif min(region.strides, default=0) < 0:
            problems.append(Problem(name, "stride", f"{region.strides}"))
    if not tensor.regions and whole.volume:
        problems.append(Problem(name, "hole", "nothing says where its bytes lie"))
    return problems


def fill_targets(foreign: Foreign, targets: Sequence[Target]) -> int:
    """Read what the targets want; each is a run of its tensor's row-major bytes.

    Memory beside the targets': as much again, and for a tensor that lies transposed in its file
    as much as the file has of it.

    Returns:
        Bytes read.

    Raises:
        ForeignDamage: A file is shorter than it was.
        StorageError: The store failed.
    """
    reads: dict[str, list[RangeRead]] = {}
    copies: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    total = 0
    for target in targets:
        tensor = foreign.tensors[target.fqn]
        item = ITEMSIZES[tensor.dtype]
        whole = _elements(target.memory, target.box.sizes, item)
        for region in tensor.regions:
            common = region.box.intersect(target.box)
            if common is None:
                continue
            start = region.begin + item * _position(region, common)
            part = Region(common, region.key, start, region.strides)
            length = part.span * item
            memory = np.empty(length, np.uint8)
            read = RangeRead(ByteRange(start, start + length), memory.data)
            reads.setdefault(region.key, []).append(read)
            total += length
            there = whole[_slices(common.relative_to(target.box))]
            copies.append((there, _strided(memory, common.sizes, region.strides, item)))
    for key, wanted in reads.items():
        try:
            foreign.source.store.read_into(key, wanted)
        except (KeyNotFound, ShortRead) as error:
            raise foreign.source.damage([Problem(key, "read", str(error))]) from error
    for there, here in copies:
        there[...] = here
    return total


def _position(region: Region, box: Box) -> int:
    relative = box.relative_to(region.box)
    return sum(o * s for o, s in zip(relative.offsets, region.strides, strict=True))


def _slices(box: Box) -> tuple[Any, ...]:
    """With an ellipsis, so that of a 0-d array comes an array, not its element."""
    inside = (slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
    return (*inside, ...)


def _elements(memory: memoryview, sizes: tuple[int, ...], item: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(memory, np.dtype((np.void, item))).reshape(sizes)


def _strided(
    memory: np.ndarray[Any, Any], sizes: tuple[int, ...], strides: tuple[int, ...], item: int
) -> np.ndarray[Any, Any]:
    flat = memory.view(np.dtype((np.void, item)))
    return np.lib.stride_tricks.as_strided(flat, sizes, tuple(s * item for s in strides))
