"""The tables of files and chunks of a checkpoint that refers to files of its parent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import IncompletePlan, Problem
from dcp_resume.format.chunk_index import UNUSED
from dcp_resume.format.digests import DigestAlgorithm
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.models import FileEntry
from dcp_resume.planning.files import index_structure
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.planning.table import Table
from dcp_resume.session.changed import Division
from dcp_resume.session.documents import FileTables, file_entries
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.sweep import directory_of
from dcp_resume.session.unchanged import file_base
from dcp_resume.session.writing import RankReport

__all__ = ["FileChunks", "as_tables", "commits_of", "referred_files", "written_files"]


@dataclass(frozen=True, slots=True)
class FileChunks:
    """Some files of a checkpoint, and their chunks."""

    files: tuple[FileEntry, ...]
    counts: npt.NDArray[np.int64]
    """``[files]`` chunks of each."""
    chunks: Table
    """By file and position; the tensor of unused ones is -1."""
    digests: npt.NDArray[np.uint8]
    """``[blocks, 16]``"""


def as_tables(plan: GlobalPlan, parts: Sequence[FileChunks]) -> FileTables:
    """Files one behind the other, as the documents list them.

    Args:
        plan: What the checkpoint holds.
        parts: All of its files.
    """
    files = tuple(file for part in parts for file in part.files)
    structure = index_structure(
        np.concatenate([part.counts for part in parts]),
        Table.concatenate([part.chunks for part in parts]),
        plan.tensors,
        [file.key for file in files],
    )
    return FileTables(files, structure, np.concatenate([part.digests for part in parts]))


def commits_of(history: RunHistory, parent: int, files: Iterable[FileEntry]) -> tuple[int, ...]:
    """Log numbers of the commits in whose directories files lie, other than the own.

    Args:
        history: The log.
        parent: Log number of the parent.
        files: Its own, and those of the parent and of what that refers to.
    """
    record = history.commits[parent]
    known = {
        directory_of(history.commits[seq]).rstrip("/"): seq for seq in (parent, *record.references)
    }
    return tuple(sorted({known[file.base] for file in files if file.base != "self"}))


def written_files(
    plan: GlobalPlan,
    reports: Sequence[RankReport],
    divisions: Sequence[Division],
    algorithm: DigestAlgorithm,
) -> FileChunks:
    """List what the ranks of a save that may refer to older files have written.

    Args:
        plan: What the checkpoint holds.
        reports: One of each rank.
        divisions: One of each rank.
        algorithm: Of the digests.
    """
    starts = _starts(plan, divisions)
    own = [division.rows + start for division, start in zip(divisions, starts, strict=True)]
    written = plan.layout.chunks.take(np.concatenate(own))
    files = file_entries(
        [name for division in divisions for name in division.names],
        [part for division in divisions for part in division.parts],
        [rank for rank, division in enumerate(divisions) for _ in division.names],
        reports,
        algorithm,
    )
    return FileChunks(
        files,
        np.concatenate([division.counts for division in divisions]),
        written,
        np.concatenate([report.digests for report in reports]),
    )


def referred_files(
    plan: GlobalPlan, divisions: Sequence[Division], parent: OpenedCheckpoint
) -> list[FileChunks]:
    """List each file of the parent's that ranks refer to, whole.

    Args:
        plan: What the checkpoint holds.
        divisions: One of each rank.
        parent: The checkpoint that they refer to.

    Raises:
        IncompletePlan: A rank refers to a chunk that the parent does not have.
    """
    uses = _uses(divisions, _starts(plan, divisions), parent)
    return [_whole_file(plan, parent, file, uses[file]) for file in sorted(uses)]


def _starts(plan: GlobalPlan, divisions: Sequence[Division]) -> list[int]:
    """Per rank the first of its chunks in the plan."""
    return [plan.layout.of_rank(rank)[2].start for rank in range(len(divisions))]


def _uses(
    divisions: Sequence[Division], starts: Sequence[int], parent: OpenedCheckpoint
) -> dict[int, dict[int, int]]:
    """File of the parent → position in it → planned chunk."""
    numbers = {
        (file_base(parent, number), file.key): number
        for number, file in enumerate(parent.catalog.files)
    }
    uses: dict[int, dict[int, int]] = defaultdict(dict)
    for division, start in zip(divisions, starts, strict=True):
        for row, base, position in division.referred.tolist():
            file = numbers.get(division.bases[base])
            if file is None:
                raise _wrong(parent, "/".join(division.bases[base]), "it has no such file")
            uses[file][position] = row + start
    return uses


def _whole_file(
    plan: GlobalPlan, parent: OpenedCheckpoint, file: int, use: dict[int, int]
) -> FileChunks:
    """All chunks of one file; those that are not needed any more are unused."""
    chunks, index = plan.layout.chunks, parent.index
    first, last = index.file_bounds(file)
    lengths = index.chunk_bytes(parent.itemsizes)[first:last]
    tensor = np.full(last - first, -1, np.int32)
    offsets = np.zeros((last - first, max(1, chunks.boxes.width)), np.int64)
    sizes = np.ones_like(offsets)
    sizes[:, 0] = lengths
    for position, row in use.items():
        entry, box = plan.tensors[int(chunks.tensor[row])], int(chunks.box[row])
        size = int(chunks.boxes.sizes[box].prod()) * ITEMSIZES[entry.dtype]
        known = int(index.chunk_tensor[first + position]) if position < len(tensor) else UNUSED
        is_same = known != UNUSED and parent.catalog.tensors[known].fqn == entry.fqn
        if not is_same or int(lengths[position]) != size:
            raise _wrong(parent, parent.file_key(file), f"chunk {position} is not {entry.fqn}'s")
        tensor[position] = chunks.tensor[row]
        offsets[position], sizes[position] = chunks.boxes.offsets[box], chunks.boxes.sizes[box]
    blocks = slice(*parent.blocks.first[file : file + 2].tolist())
    entry_of_file = parent.catalog.files[file].model_copy(update={"base": file_base(parent, file)})
    return FileChunks(
        (entry_of_file,),
        np.asarray([last - first], np.int64),
        Table.of(tensor, np.full(last - first, entry_of_file.rank), offsets, sizes),
        index.block_digest[blocks],
    )


def _wrong(parent: OpenedCheckpoint, where: str, why: str) -> IncompletePlan:
    problem = Problem(where, "reference", f"of {parent.prefix}: {why}")
    return IncompletePlan(
        f"cannot refer to {problem}; nothing was committed. Use one version of dcp_resume on all "
        "ranks",
        problems=(problem,),
    )
