"""Lay the written chunks of all ranks into data files. Columns in, columns out.

The n-th chunk of a tensor on a rank goes to the rank's n-th file of that part, because a stock
safetensors reader finds a chunk by its tensor's name. A tensor with more than four chunks on any
rank, or of a dtype that stock readers cannot represent, goes on every rank to a ``.part`` file
under the names ``<fqn>#<n>``: a stock reader then says that it is missing, and never loads a part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.dtypes import DTYPES, ITEMSIZES
from dcp_resume.format.index_structure import IndexStructure
from dcp_resume.manifest.keys import data_file_name
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.plans import FilePlan, chunk_key
from dcp_resume.planning.row_order import stable_order
from dcp_resume.planning.table import Table

__all__ = ["MAX_CHUNKS_A_NAME", "FileLayout", "file_names", "index_structure", "lay_out_files"]

I64 = npt.NDArray[np.int64]

MAX_CHUNKS_A_NAME = 4
"""Chunks of one tensor that a rank may write under the tensor's own name, a file each."""


@dataclass(frozen=True, eq=False)
class FileLayout:
    """Every chunk of the checkpoint in file order, and what follows from it, worked out once."""

    chunks: Table
    """Sorted by file, then by position in the file."""
    file: npt.NDArray[np.int32]
    """``[n]`` file of each chunk; ascending."""
    names: tuple[str, ...]
    parts: tuple[str, ...]
    ranks: I64
    """``[files]`` writing rank; ascending."""
    ordinal: npt.NDArray[np.int32]
    """``[n]`` number of the chunk among its rank's chunks of the tensor, from 0; -1 under the
    tensor's own name."""
    tensors: tuple[TensorEntry, ...]

    @cached_property
    def file_chunk_count(self) -> npt.NDArray[np.uint32]:
        """``[files]`` number of chunks."""
        return np.bincount(self.file, minlength=len(self.names)).astype(np.uint32)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all chunks."""
        return int(self.chunks.num_bytes([ITEMSIZES[e.dtype] for e in self.tensors]).sum())

    @cached_property
    def structure(self) -> IndexStructure:
        """What the chunk index says of these files, whatever is in them."""
        return index_structure(self.file_chunk_count, self.chunks, self.tensors, self.names)

    @cached_property
    def _bounds(self) -> tuple[list[int], list[int]]:
        """The first file and the first chunk of each rank, and those behind the last rank's."""
        ranks = np.arange(int(self.ranks.max(initial=-1)) + 2)
        files = np.searchsorted(self.ranks, ranks)
        return files.tolist(), np.searchsorted(self.file, files).tolist()

    def of_rank(self, rank: int) -> tuple[tuple[FilePlan, ...], npt.NDArray[np.int32], slice]:
        """The rank's files, the file of each of its chunks, and the rows of those chunks."""
        files, chunks = self._bounds
        last = len(files) - 1
        begin, end = files[min(rank, last)], files[min(rank + 1, last)]
        rows = slice(chunks[min(rank, last)], chunks[min(rank + 1, last)])
        own = tuple(map(FilePlan, self.names[begin:end], self.parts[begin:end]))
        return own, self.file[rows] - np.int32(begin), rows

    def key_of(self, row: int) -> str:
        """Name of a chunk in its file."""
        fqn = self.tensors[int(self.chunks.tensor[row])].fqn
        return chunk_key(fqn, int(self.ordinal[row]))


def index_structure(
    counts: npt.NDArray[Any],
    chunks: Table,
    tensors: Sequence[TensorEntry],
    keys: Sequence[str],
) -> IndexStructure:
    """What the chunk index says of files and their chunks.

    Args:
        counts: ``[files]`` number of chunks.
        chunks: By file and position; the tensor of unused ones is -1.
        tensors: Of the catalog.
        keys: Of the files.
    """
    index = ChunkIndex.build(
        file_chunk_count=counts,
        chunk_tensor=chunks.tensor.astype(np.uint32),  # -1 becomes UNUSED, all bits set
        chunk_box=chunks.box,
        offsets=chunks.boxes.offsets,
        sizes=chunks.boxes.sizes,
        ndims=[len(entry.global_shape) for entry in tensors],
        block_digest=np.zeros((0, 16), np.uint8),
    )
    return IndexStructure(index, tuple(tensors), keys)


def _ordinals(table: Table, num_tensors: int) -> npt.NDArray[np.int32]:
    """Number of each row among the rows of the same rank and tensor, by offset."""
    ordinal = np.zeros(len(table.tensor), np.int32)
    pair = table.rank.astype(np.int64) * num_tensors
    pair += table.tensor
    if (pair[1:] > pair[:-1]).all():  # no pair twice: the plain sharded case
        return ordinal
    order, pairs = stable_order(pair)
    recurs = pairs[1:] == pairs[:-1]
    rows = order[np.append(recurs, False) | np.append(False, recurs)]
    offsets = table.boxes.offsets[table.box[rows]]
    rows = rows[np.lexsort((*offsets.T[::-1], pair[rows]))]
    is_new = np.append(True, np.diff(pair[rows]) != 0)[: len(rows)]
    number = np.arange(len(rows))
    ordinal[rows] = number - np.maximum.accumulate(np.where(is_new, number, 0))
    return ordinal


def lay_out_files(table: Table, tensors: Sequence[TensorEntry]) -> FileLayout:
    """Assign each written chunk to a file, and order the chunks of each file.

    Within a file wide dtypes come first, so that every chunk begins at a multiple of its item
    size; of one dtype those that every rank will read come first, next to one another, so that a
    rank reads few bytes that it does not want; else chunks keep the order of the tensors.
    """
    if not len(table.tensor):
        empty = np.zeros(0, np.int64)
        none = np.zeros(0, np.int32)
        return FileLayout(table, none, (), (), empty, none, tuple(tensors))
    part_names = sorted({entry.part for entry in tensors})
    part_of_tensor = np.asarray([part_names.index(entry.part) for entry in tensors], np.int64)
    itemsize = np.asarray([DTYPES[entry.dtype].itemsize for entry in tensors], np.int64)
    readable = np.asarray([DTYPES[entry.dtype].stock_readable for entry in tensors], bool)
    is_own = np.asarray([entry.kind != "replicated" for entry in tensors], bool)
    ordinal = _ordinals(table, len(tensors))
    recurring = np.flatnonzero(ordinal)
    most = np.ones(len(tensors), np.int64)
    np.maximum.at(most, table.tensor[recurring], ordinal[recurring] + 1)
    is_hidden = ~readable | (most > MAX_CHUNKS_A_NAME)

    # A file is a number made of rank, part, hidden and number; a row's place, of its file, the
    # place of its tensor among those of any file, and its ordinal.
    shape = (int(table.rank.max()) + 1, len(part_names), 2, MAX_CHUNKS_A_NAME)
    code_of_tensor = np.ravel_multi_index((0, part_of_tensor, is_hidden.astype(int), 0), shape)
    place = np.empty(len(tensors), np.int64)
    place[np.lexsort((is_own, -itemsize))] = np.arange(len(tensors))
    row = table.rank.astype(np.int64) * (math.prod(shape[1:]) * len(tensors))
    row += (code_of_tensor * len(tensors) + place)[table.tensor]
    num_ordinals = int(ordinal.max()) + 1
    if len(recurring):
        number = np.where(is_hidden[table.tensor], 0, ordinal)
        row = (row + number * len(tensors)) * num_ordinals + ordinal
    order: Any = slice(None)
    if not (row[1:] >= row[:-1]).all():
        order, row = stable_order(row)
    code = row // (len(tensors) * num_ordinals)
    is_new = np.append(True, code[1:] != code[:-1])
    heads = np.column_stack(np.unravel_index(code[is_new], shape))
    hidden = is_hidden[table.tensor[order]] if is_hidden.any() else False
    return FileLayout(
        chunks=table.take(order),
        file=np.cumsum(is_new, dtype=np.int32) - 1,
        names=file_names(heads, part_names),
        parts=tuple(part_names[p] for p in heads[:, 1].tolist()),
        ranks=heads[:, 0],
        ordinal=np.where(hidden, ordinal[order], np.int32(-1)),
        tensors=tuple(tensors),
    )


def file_names(heads: I64, part_names: Sequence[str]) -> tuple[str, ...]:
    """Names of data files; rows: rank, part, whether stock readers must not see it, number."""
    rows = [tuple(row) for row in heads.tolist()]
    counts: dict[tuple[int, int, int], int] = {}
    for rank, part, hidden, _ in rows:
        counts[rank, part, hidden] = counts.get((rank, part, hidden), 0) + 1
    names: list[str] = []
    taken: set[str] = set()
    for rank, part, hidden, number in rows:
        count = counts[rank, part, hidden]
        text = part_names[part]
        name = data_file_name(rank, text, number + 1, count, is_complete=not hidden)
        attempt = part
        while name in taken:  # two part names that differ only in characters no key may have
            text, attempt = f"{part_names[part][:30]}.{attempt}", attempt + len(part_names)
            name = data_file_name(rank, text, number + 1, count, is_complete=not hidden)
        taken.add(name)
        names.append(name)
    return tuple(names)
