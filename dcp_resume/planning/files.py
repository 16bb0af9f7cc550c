"""Lay the written chunks of all ranks into data files. Columns in, columns out.

The n-th chunk of a tensor on a rank goes to the rank's n-th file of that part, because a stock
safetensors reader finds a chunk by its tensor's name. A tensor with more than four chunks on any
rank, or of a dtype that stock readers cannot represent, goes on every rank to a ``.part`` file
under the names ``<fqn>#<n>``: a stock reader then says that it is missing, and never loads a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_resume.format.dtypes import DTYPES
from dcp_resume.manifest.keys import data_file_name
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.plans import FilePlan, chunk_key
from dcp_resume.planning.table import Table

__all__ = ["MAX_CHUNKS_A_NAME", "FileLayout", "file_names", "lay_out_files"]

I64 = npt.NDArray[np.int64]

MAX_CHUNKS_A_NAME = 4
"""Chunks of one tensor that a rank may write under the tensor's own name, a file each."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Every chunk of the checkpoint in file order."""

    chunks: Table
    """Sorted by file, then by position in the file."""
    file: I64
    """``[n]`` file of each chunk; ascending."""
    names: tuple[str, ...]
    parts: tuple[str, ...]
    ranks: I64
    """``[files]`` writing rank; ascending."""
    ordinal: I64
    """``[n]`` number of the chunk among its rank's chunks of the tensor, from 0; -1 under the
    tensor's own name."""
    fqns: tuple[str, ...]
    """Per tensor its FQN."""

    @property
    def file_chunk_count(self) -> npt.NDArray[np.uint32]:
        """``[files]`` number of chunks."""
        return np.bincount(self.file, minlength=len(self.names)).astype(np.uint32)

    def of_rank(self, rank: int) -> tuple[tuple[FilePlan, ...], npt.NDArray[np.int32], slice]:
        """The rank's files, the file of each of its chunks, and the rows of those chunks."""
        begin, end = np.searchsorted(self.ranks, [rank, rank + 1]).tolist()
        rows = slice(*np.searchsorted(self.file, [begin, end]).tolist())
        files = tuple(map(FilePlan, self.names[begin:end], self.parts[begin:end]))
        return files, (self.file[rows] - begin).astype(np.int32), rows

    def key_of(self, row: int) -> str:
        """Name of a chunk in its file."""
        return chunk_key(self.fqns[int(self.chunks.tensor[row])], int(self.ordinal[row]))


def _ordinals(table: Table, num_tensors: int) -> I64:
    """Number of each row among the rows of the same rank and tensor, by offset."""
    pair = table.rank * num_tensors + table.tensor
    if (np.diff(pair) > 0).all():  # sorted, and no pair twice: the plain sharded case
        return np.zeros(len(pair), np.int64)
    columns = [table.offsets[:, d] for d in reversed(range(table.offsets.shape[1]))]
    order = np.lexsort((*columns, pair))
    is_new = np.r_[True, np.diff(pair[order]) != 0]
    starts = np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))
    ordinal = np.empty(len(order), np.int64)
    ordinal[order] = np.arange(len(order)) - starts
    return ordinal


def lay_out_files(table: Table, tensors: Sequence[TensorEntry]) -> FileLayout:
    """Assign each written chunk to a file, and order the chunks of each file.

    Within a file wide dtypes come first, so that every chunk begins at a multiple of its item
    size; of one dtype those that every rank will read come first, next to one another, so that a
    rank reads few bytes that it does not want; else chunks keep the order of the tensors.
    """
    fqns = tuple(entry.fqn for entry in tensors)
    if not len(table.tensor):
        empty = np.zeros(0, np.int64)
        return FileLayout(table, empty, (), (), empty, empty, fqns)
    part_names = sorted({entry.part for entry in tensors})
    part_of_tensor = np.asarray([part_names.index(entry.part) for entry in tensors], np.int64)
    itemsize = np.asarray([DTYPES[entry.dtype].itemsize for entry in tensors], np.int64)
    readable = np.asarray([DTYPES[entry.dtype].stock_readable for entry in tensors], bool)
    is_own = np.asarray([entry.kind != "replicated" for entry in tensors], bool)
    ordinal = _ordinals(table, len(tensors))
    most = np.zeros(len(tensors), np.int64)
    np.maximum.at(most, table.tensor, ordinal + 1)
    is_hidden = ~readable | (most > MAX_CHUNKS_A_NAME)

    # A file is a number made of rank, part, hidden and number; a row's place, of its file, the
    # place of its tensor among those of any file, and its ordinal.
    hidden = is_hidden[table.tensor]
    number = np.where(hidden, 0, ordinal)
    place = np.empty(len(tensors), np.int64)
    place[np.lexsort((is_own, -itemsize))] = np.arange(len(tensors))
    shape = (int(table.rank.max()) + 1, len(part_names), 2, MAX_CHUNKS_A_NAME)
    code = np.ravel_multi_index(
        (table.rank, part_of_tensor[table.tensor], hidden.astype(np.int64), number), shape
    )
    row = code * len(tensors) + place[table.tensor]
    order = np.lexsort((ordinal, row)) if ordinal.any() else np.argsort(row, kind="stable")
    is_new = np.r_[True, np.diff(code[order]) != 0]
    file = np.cumsum(is_new) - 1
    heads = np.column_stack(np.unravel_index(code[order][is_new], shape))
    names = file_names(heads, part_names)
    return FileLayout(
        chunks=table.take(order),
        file=file,
        names=names,
        parts=tuple(part_names[p] for p in heads[:, 1].tolist()),
        ranks=heads[:, 0],
        ordinal=np.where(hidden, ordinal, -1)[order],
        fqns=fqns,
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
