"""Files of ``torch.save``: read as an archive with an inert pickle, written as one that streams."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.interop.archive import ReadRange, lay_out_archive, read_entries
from dcp_resume.interop.foreign import Foreign, ForeignTensor, Region, Source, row_major
from dcp_resume.interop.formats import Format
from dcp_resume.interop.inert_pickle import MAX_PICKLE_BYTES, dump_inert, load_inert
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile, Segment
from dcp_resume.interop.torch_objects import (
    StoredView,
    flatten_leaves,
    plain,
    tensor_tree,
    unknown_in,
    value_tree,
)
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.flattening import Path, fqn_of

__all__ = ["Saved", "collect", "lay_out_saved", "lay_out_torch", "read_saved", "read_torch"]

MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What parsing a hostile file raises."""


class Saved:
    """One archive of ``torch.save``, whose tensors are views of its members.

    Args:
        read: Reads bytes of the archive.
        length: Of the archive.
        key: File that it lies in.
        begin: Its first byte in that file.

    Raises:
        ValueError: Malformed.
    """

    def __init__(self, read: ReadRange, length: int, key: str, begin: int) -> None:
        self._read, self._key, self._begin = read, key, begin
        self._entries = read_entries(read, length)
        self._begins: dict[str, int] = {}
        order = self._content("byteorder", 16) if "byteorder" in self._entries else b"little"
        if order != b"little":
            raise ValueError("its numbers are big-endian")
        if "data.pkl" not in self._entries:
            raise ValueError("no data.pkl in it: it is no file of torch.save")
        self.tree = plain(load_inert(self._content("data.pkl", MAX_PICKLE_BYTES)))

    def _content(self, name: str, max_bytes: int) -> bytes:
        entry = self._entries[name]
        if entry.size > max_bytes:
            raise ValueError(f"{name} has {entry.size} bytes, at most {max_bytes} are read")
        begin = entry.begin(self._read)
        return self._read(begin, begin + entry.size)

    def tensor(self, path: Path, view: StoredView, box: Box | None = None) -> ForeignTensor:
        """A tensor of it; ``box`` is where it lies in a larger one.

        Raises:
            ValueError: It reaches past its storage.
        """
        own = Box.whole(view.shape) if box is None else box
        name = f"data/{view.storage}"
        begin = self._begins.get(name)
        if begin is None:
            begin = self._begins[name] = self._entries[name].begin(self._read)
        item = ITEMSIZES[view.dtype]
        if len(view.strides) != len(own.sizes):
            raise ValueError(f"strides {view.strides} of a tensor of shape {own.sizes}")
        at = self._begin + begin + view.offset * item
        region = Region(own, self._key, at, view.strides)
        if (view.offset + region.span) * item > self._entries[name].size:
            raise ValueError(f"{fqn_of(path)} reaches past its storage {view.storage}")
        return ForeignTensor(path, view.dtype, view.shape, (region,))


def read_saved(source: Source, key: str, size: int) -> Saved:
    """Open a whole file of ``torch.save``.

    Raises:
        ForeignDamage: Malformed.
        StorageError: The store failed.
    """
    try:
        return Saved(lambda a, b: source.read(key, a, b), size, key, 0)
    except MALFORMED as error:
        raise source.damage([Problem(key, "torch", str(error))]) from error


def read_torch(source: Source) -> Foreign:
    """Open a file of ``torch.save``.

    Raises:
        ForeignDamage: Malformed.
        StorageError: The store failed.
    """
    sizes = source.sizes()
    ((key, size),) = sizes.items()
    saved = read_saved(source, key, size)
    try:
        found = collect(saved, flatten_leaves(saved.tree))
    except MALFORMED as error:
        raise source.damage([Problem(key, "torch", str(error))]) from error
    tensors, values, ties, left = found
    return Foreign(source, Format.TORCH, tensors, values, ties, left=left).checked(sizes)


def collect(
    saved: Saved, leaves: Iterable[tuple[Path, Any]]
) -> tuple[
    dict[str, ForeignTensor], dict[str, tuple[Path, Any]], dict[str, str], tuple[Problem, ...]
]:
    """Tensors, values, ties (one view of one storage under several names), and what is left.

    Raises:
        ValueError: Two leaves share a name, or a tensor is malformed.
    """
    tensors: dict[str, ForeignTensor] = {}
    values: dict[str, tuple[Path, Any]] = {}
    ties: dict[str, str] = {}
    left: list[Problem] = []
    first: dict[StoredView, str] = {}
    for path, leaf in leaves:
        name = fqn_of(path)
        if not name or name in tensors or name in values or name in ties:
            raise ValueError(f"the name {name!r} is empty or occurs twice")
        if isinstance(leaf, StoredView):
            known = first.setdefault(leaf, name)
            tensors[name] = saved.tensor(path, leaf)
            if known != name and 0 not in leaf.shape:
                ties[name] = known
        elif (unknown := unknown_in(leaf)) is not None:
            left.append(Problem(name, "object", f"a {unknown}, which is never executed"))
        else:
            values[name] = (path, leaf)
    return tensors, values, ties, tuple(left)


def lay_out_saved(tree: Any, members: list[tuple[str, Any]]) -> list[Segment]:
    """One archive: the pickle of a tree, and the storages that it refers to."""
    head: list[tuple[str, Any]] = [("archive/data.pkl", dump_inert(tree))]
    head.append(("archive/byteorder", b"little"))
    storages = [(f"archive/data/{name}", content) for name, content in members]
    return lay_out_archive([*head, *storages, ("archive/version", b"3\n")])


def lay_out_torch(outgoing: Outgoing, name: str) -> list[OutgoingFile]:
    """The one file of an export.

    Args:
        outgoing: What is exported.
        name: Of the file.
    """
    root: dict[Any, Any] = {}
    members: list[tuple[str, Any]] = []
    trees: dict[str, Any] = {}
    for number, tensor in enumerate(outgoing.tensors):
        members.append((str(number), tensor.stored))
        tree = tensor_tree(str(number), tensor.dtype, tensor.shape, row_major(tensor.shape))
        trees[tensor.name] = tree
        _place(root, tensor.path, tree)
    for path, first in outgoing.ties.values():
        _place(root, path, trees[first])
    for path, value in outgoing.values.values():
        _place(root, path, value_tree(value))
    return [OutgoingFile(name, tuple(lay_out_saved(_listed(root), members)))]


def _place(root: dict[Any, Any], path: Path, leaf: Any) -> None:
    """Set a leaf; positions of lists are marked, so that ``_listed`` finds them again."""
    for key in path[:-1]:
        root = root.setdefault(_key(key), {})
    root[_key(path[-1])] = leaf


class _Position(int):
    """A position in a list, unlike an integer key of a mapping."""


def _key(key: Any) -> Any:
    if isinstance(key, dict):
        return key["key"]
    return _Position(key) if isinstance(key, int) else key


def _listed(node: Any) -> Any:
    if type(node) is not dict:
        return node
    items = {key: _listed(item) for key, item in node.items()}
    if items and all(type(key) is _Position for key in items):
        return [items[number] for number in sorted(items)]
    return items
