"""Directories of stock DCP: an index, ``.metadata``, and files of ``torch.save`` archives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.interop.foreign import Foreign, ForeignTensor, Region, Source, row_major
from dcp_resume.interop.formats import Format
from dcp_resume.interop.inert_pickle import (
    MAX_PICKLE_BYTES,
    Called,
    Named,
    dump_inert,
    load_inert,
)
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile, Segment, segment_size, shifted
from dcp_resume.interop.torch_file import MALFORMED, Saved, lay_out_saved
from dcp_resume.interop.torch_objects import (
    StoredView,
    flatten_leaves,
    plain,
    tensor_tree,
    unknown_in,
    value_tree,
)
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.flattening import Path
from dcp_resume.storage import ByteRange, RangeRead

__all__ = ["METADATA_NAME", "lay_out_dcp", "read_dcp"]

METADATA_NAME = ".metadata"
EDGE_BYTES = 4096
"""An archive of one tensor has its index in so many of its first and last bytes."""
EDGES_AT_ONCE = 1024
_HOME = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an archive lies."""

    key: str
    begin: int
    length: int


def read_dcp(source: Source) -> Foreign:
    """Open a directory.

    Raises:
        ForeignDamage: Malformed, compressed, or incomplete.
        StorageError: The store failed.
    """
    sizes = source.sizes()
    data = source.read_whole(METADATA_NAME, MAX_PICKLE_BYTES)
    try:
        return _Index(source, sizes, load_inert(data)).foreign().checked(sizes)
    except MALFORMED as error:
        raise source.damage([Problem(METADATA_NAME, "dcp", str(error))]) from error


class _Index:
    """A parsed ``.metadata``.

    Raises:
        ValueError: Malformed.
    """

    def __init__(self, source: Source, sizes: Mapping[str, int], tree: Any) -> None:
        self._source, self._sizes = source, sizes
        state = _state(tree, "Metadata")
        self._entries = dict(state["state_dict_metadata"])
        self._paths = state.get("planner_data") or {}
        self._places: dict[str, dict[tuple[int, ...], _Place]] = {}
        for index, info in dict(state["storage_data"]).items():
            self._add_place(_state(index, "MetadataIndex"), _state(info, "_StorageInfo"))

    def _add_place(self, index: dict[str, Any], info: dict[str, Any]) -> None:
        if info.get("transform_descriptors"):
            raise ValueError(f"{index['fqn']} is compressed or transformed")
        place = _Place(info["relative_path"], info["offset"], info["length"])
        if place.key not in self._sizes:
            raise ValueError(f"it names {place.key!r:.80}, which is no file of this directory")
        if not 0 <= place.begin <= place.begin + place.length <= self._sizes[place.key]:
            raise ValueError(f"{index['fqn']} reaches past the end of {place.key}")
        offset = plain(index.get("offset")) or ()
        self._places.setdefault(index["fqn"], {})[tuple(offset)] = place

    def foreign(self) -> Foreign:
        archives = self._open_archives()
        tensors: dict[str, ForeignTensor] = {}
        values: dict[str, tuple[Path, Any]] = {}
        left: list[Problem] = []
        ties: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        for fqn, entry in self._entries.items():
            path = self._path(fqn)
            places = self._places.get(fqn, {})
            if entry.name.endswith(".TensorStorageMetadata"):
                tensors[fqn] = self._tensor(path, fqn, entry, archives)
                whole = tensors[fqn]
                key = (whole.dtype, whole.shape, whole.regions)
                if whole.regions and first.setdefault(key, fqn) != fqn:
                    ties[fqn] = first[key]
                continue
            saved = archives[places[()]]
            unknown = unknown_in(saved.tree)
            if unknown is not None:
                left.append(Problem(fqn, "object", f"a {unknown}, which is never executed"))
            elif any(isinstance(leaf, StoredView) for _, leaf in flatten_leaves(saved.tree)):
                left.append(Problem(fqn, "object", "an object with tensors inside"))
            else:
                values[fqn] = (path, saved.tree)
        return Foreign(self._source, Format.DCP, tensors, values, ties, left=tuple(left))

    def _path(self, fqn: str) -> Path:
        path = self._paths.get(fqn) if isinstance(self._paths, dict) else None
        if not isinstance(path, tuple) or not path:
            return (fqn,)
        if not all(type(key) in (str, int) for key in path):
            raise ValueError(f"{fqn} has the path {path!r:.80}")
        return path

    def _tensor(
        self, path: Path, fqn: str, entry: Called, archives: Mapping[_Place, Saved]
    ) -> ForeignTensor:
        state = _state(entry, "TensorStorageMetadata")
        shape = tuple(plain(state["size"]))
        dtype = _dtype_of(state["properties"])
        regions: list[Region] = []
        for chunk in state["chunks"]:
            box = _box(_state(chunk, "ChunkStorageMetadata"))
            if not box.volume:
                continue
            place = self._places[fqn][box.offsets]
            view = archives[place].tree
            if not isinstance(view, StoredView) or (view.dtype, view.shape) != (dtype, box.sizes):
                raise ValueError(f"{fqn} at {box.offsets} is not the {dtype} of {box.sizes}")
            regions += archives[place].tensor(path, view, box).regions
        return ForeignTensor(path, dtype, shape, tuple(regions))

    def _open_archives(self) -> dict[_Place, Saved]:
        """Every archive, by the bytes at its edges; those of a file are read together."""
        wanted = dict.fromkeys(p for places in self._places.values() for p in places.values())
        found: dict[_Place, Saved] = {}
        for places in _batches(list(wanted)):
            reads: dict[str, list[RangeRead]] = {}
            edges: dict[_Place, list[tuple[int, bytearray]]] = {}
            for place in places:
                for start in {0, max(0, place.length - EDGE_BYTES)}:
                    stop = min(start + EDGE_BYTES, place.length)
                    memory = bytearray(stop - start)
                    span = ByteRange(place.begin + start, place.begin + stop)
                    reads.setdefault(place.key, []).append(RangeRead(span, memoryview(memory)))
                    edges.setdefault(place, []).append((start, memory))
            for key, own in reads.items():
                self._source.store.read_into(key, own)
            for place in places:
                read = _Reader(self._source, place, edges[place])
                found[place] = Saved(read, place.length, place.key, place.begin)
        return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads an archive, from what is at hand where that does."""

    source: Source
    place: _Place
    edges: list[tuple[int, bytearray]]

    def __call__(self, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop <= self.place.length:
            raise ValueError(f"bytes {start} to {stop} of an archive of {self.place.length}")
        for first, memory in self.edges:
            if first <= start and stop <= first + len(memory):
                return bytes(memory[start - first : stop - first])
        at = self.place.begin
        return self.source.read(self.place.key, at + start, at + stop)


def _batches(places: list[_Place]) -> Iterator[list[_Place]]:
    for start in range(0, len(places), EDGES_AT_ONCE):
        yield places[start : start + EDGES_AT_ONCE]


def _state(node: Any, name: str) -> dict[str, Any]:
    is_it = isinstance(node, Called) and node.name.rpartition(".")[2] == name
    state = node.state if is_it else None
    if isinstance(node, Called) and is_it and state is None:
        return {}
    if not isinstance(state, dict):
        raise ValueError(f"expected a {name}")
    return state


def _dtype_of(properties: Any) -> str:
    state = properties.state if isinstance(properties, Called) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, Named) or dtype.module != "torch" or dtype.name not in DTYPES:
        raise ValueError(f"the dtype {dtype} cannot be stored")
    return dtype.name


def _box(state: dict[str, Any]) -> Box:
    return Box(tuple(plain(state["offsets"])), tuple(plain(state["sizes"])))


# Writing.


def _object(name: str, state: Any, home: str = _HOME) -> Called:
    return Called(Named(home, name), (), is_new=True, state=state)


def _size(sizes: tuple[int, ...]) -> Called:
    return Called(Named("torch", "Size"), (sizes,))


def _properties(dtype: str) -> Called:
    layout = Called(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Called(Named(_HOME, "_MEM_FORMAT_ENCODING"), (0,))
    return _object("TensorProperties", (Named("torch", dtype), layout, False, memory_format, False))


class _Writer:
    """Lays archives end to end into files, and keeps account of them."""

    def __init__(self, shard_bytes: int) -> None:
        self._shard_bytes = shard_bytes
        self._files: list[list[Segment]] = [[]]
        self._at = 0

    def add(self, tree: Any, members: list[tuple[str, Any]]) -> Called:
        """One archive; returns where it lies."""
        segments = lay_out_saved(tree, members)
        length = sum(map(segment_size, segments))
        if self._at and self._at + length > self._shard_bytes:
            self._files.append([])
            self._at = 0
        self._files[-1] += shifted(segments, len(self._files[-1]))
        info = {
            "relative_path": f"__0_{len(self._files) - 1}.distcp",
            "offset": self._at,
            "length": length,
        }
        self._at += length
        return _object("_StorageInfo", info, "torch.distributed.checkpoint.filesystem")

    def files(self) -> list[OutgoingFile]:
        return [
            OutgoingFile(f"__0_{number}.distcp", tuple(segments))
            for number, segments in enumerate(self._files)
        ]


def _index_of(name: str, ndim: int | None) -> Called:
    state: dict[str, Any] = {"fqn": name, "index": None if ndim is None else 0}
    if ndim is not None:
        state["offset"] = _size((0,) * ndim)
    return _object("MetadataIndex", state)


def lay_out_dcp(outgoing: Outgoing) -> list[OutgoingFile]:
    """The files of a directory; two tied names lead to one archive."""
    writer = _Writer(outgoing.shard_bytes)
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    paths: dict[str, Any] = {}
    infos: dict[str, tuple[Called, Called, int]] = {}
    for tensor in outgoing.tensors:
        shape = tensor.shape
        tree = tensor_tree("0", tensor.dtype, shape, row_major(shape))
        info = writer.add(tree, [("0", tensor.stored)])
        chunk = {"offsets": _size((0,) * len(shape)), "sizes": _size(shape)}
        entry = _object(
            "TensorStorageMetadata",
            {
                "properties": _properties(tensor.dtype),
                "size": _size(shape),
                "chunks": [_object("ChunkStorageMetadata", chunk)],
            },
        )
        infos[tensor.name] = entry, info, len(shape)
        entries[tensor.name], paths[tensor.name] = entry, _path_tree(tensor.path)
        storage[_index_of(tensor.name, len(shape))] = info
    for name, (path, first) in outgoing.ties.items():
        entry, info, ndim = infos[first]
        entries[name], paths[name] = entry, _path_tree(path)
        storage[_index_of(name, ndim)] = info
    for name, (path, value) in outgoing.values.items():
        entries[name] = _object("BytesStorageMetadata", None)
        paths[name] = _path_tree(path)
        storage[_index_of(name, None)] = writer.add(value_tree(value), [])
    metadata = _object(
        "Metadata",
        {
            "state_dict_metadata": entries,
            "planner_data": paths,
            "storage_data": storage,
            "storage_meta": None,
            "version": "1.0.0",
        },
    )
    return [*writer.files(), OutgoingFile(METADATA_NAME, (dump_inert(metadata),))]


def _path_tree(path: Path) -> tuple[Any, ...]:
    return tuple(key["key"] if isinstance(key, dict) else key for key in path)
