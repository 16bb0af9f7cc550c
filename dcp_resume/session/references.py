"""The tables of files and chunks of a checkpoint that refers to files of its parent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from dcp_resume.errors import IncompletePlan, Problem
from dcp_resume.format.chunk_index import UNUSED
from dcp_resume.format.digests import DigestAlgorithm
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.models import FileEntry
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.session.changed import Division
from dcp_resume.session.documents import FileTables, file_entries
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.sweep import directory_of
from dcp_resume.session.unchanged import file_base
from dcp_resume.session.writing import RankReport

__all__ = ["commits_of", "referred_tables", "written_tables"]


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


def written_tables(
    plan: GlobalPlan,
    reports: Sequence[RankReport],
    divisions: Sequence[Division],
    algorithm: DigestAlgorithm,
) -> FileTables:
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
    return FileTables(
        files,
        np.concatenate([division.counts for division in divisions]),
        written.tensor,
        written.offsets,
        written.sizes,
        np.concatenate([report.digests for report in reports]),
    )


def referred_tables(
    plan: GlobalPlan, divisions: Sequence[Division], parent: OpenedCheckpoint
) -> list[FileTables]:
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
) -> FileTables:
    """All chunks of one file; those that are not needed any more are unused."""
    chunks, index = plan.layout.chunks, parent.index
    first, last = index.file_bounds(file)
    lengths = index.chunk_bytes(parent.itemsizes)[first:last]
    tensor = np.full(last - first, UNUSED, np.int64)
    offsets = np.zeros((last - first, chunks.offsets.shape[1]), np.int64)
    sizes = np.ones_like(offsets)
    sizes[:, 0] = lengths
    for position, row in use.items():
        entry = plan.tensors[int(chunks.tensor[row])]
        size = int(chunks.sizes[row].prod()) * ITEMSIZES[entry.dtype]
        known = int(index.chunk_tensor[first + position]) if position < len(tensor) else UNUSED
        is_same = known != UNUSED and parent.catalog.tensors[known].fqn == entry.fqn
        if not is_same or int(lengths[position]) != size:
            raise _wrong(parent, parent.file_key(file), f"chunk {position} is not {entry.fqn}'s")
        tensor[position] = chunks.tensor[row]
        offsets[position], sizes[position] = chunks.offsets[row], chunks.sizes[row]
    blocks = slice(*parent.blocks.first[file : file + 2].tolist())
    entry_of_file = parent.catalog.files[file].model_copy(update={"base": file_base(parent, file)})
    return FileTables(
        (entry_of_file,),
        np.asarray([last - first], np.int64),
        tensor,
        offsets,
        sizes,
        index.block_digest[blocks],
    )


def _wrong(parent: OpenedCheckpoint, where: str, why: str) -> IncompletePlan:
    problem = Problem(where, "reference", f"of {parent.prefix}: {why}")
    return IncompletePlan(
        f"cannot refer to {problem}; nothing was committed. Use one version of dcp_resume on all "
        "ranks",
        problems=(problem,),
    )
