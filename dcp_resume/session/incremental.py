"""Both sides of a save that writes only what changed: what a rank writes, what is committed.

Ballots of such saves hold a rank's report and, behind it, its division.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dcp_resume.errors import (
    CheckpointNotFound,
    InvalidCheckpoint,
    ParentRetired,
    StorageError,
)
from dcp_resume.events import ParentUnread, emit
from dcp_resume.manifest.history import CommitEntry
from dcp_resume.manifest.keys import MANIFEST_NAME
from dcp_resume.session.attempt import Attempt, Order, Run
from dcp_resume.session.changed import Division, write_all, write_changed
from dcp_resume.session.commit import Committed, no_checkpoint
from dcp_resume.session.documents import Facts, planned_tables
from dcp_resume.session.located import Located
from dcp_resume.session.milestones import Milestones
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.references import as_tables, commits_of, referred_files, written_files
from dcp_resume.session.unchanged import ChunkId, ChunkMemory, StoredChunk, stored_chunks
from dcp_resume.session.writing import RankReport, StagedRank

__all__ = ["IncrementalSave"]


@dataclass(slots=True)
class IncrementalSave:
    """One save on one rank, of a run that refers to what is unchanged.

    Args:
        run: The opened run.
        memory: Of the rank's last save; it changes only in ``keep``.
        rank: Of this process.
    """

    run: Run
    memory: ChunkMemory
    rank: int
    _chunks: Mapping[ChunkId, StoredChunk] = field(default_factory=dict)
    _parent: OpenedCheckpoint | None = None  # read in ``write`` or remembered, on the coordinator
    _own: OpenedCheckpoint | None = None  # known after ``commit``, on the coordinator

    def write(self, staged: StagedRank, order: Order, milestones: Milestones) -> bytes:
        """Write this rank's files; its ballot.

        Raises:
            StorageError: The store refused a file.
        """
        if order.refers_to:
            known = self._known(staged, order)
            changed = write_changed(staged, self.run.store, order, known, self.rank)
        else:
            changed = write_all(staged, self.run.store, order)
        self._chunks = changed.chunks
        milestones.reach("written")
        report = replace(changed.report, reached_us=milestones.reported_us()).to_bytes()
        return len(report).to_bytes(8, "little") + report + changed.division.to_bytes()

    def _known(self, staged: StagedRank, order: Order) -> Mapping[ChunkId, StoredChunk]:
        """The parent's chunks, as far as their digests are by the order's rule."""
        memory, rule = self.memory, (order.block_size, order.algorithm)
        if memory.seq == order.refers_to:
            self._parent = memory.opened
            return memory.chunks if memory.rule == rule else {}
        try:
            self._parent = self._open(order.refers_to)
        except (CheckpointNotFound, InvalidCheckpoint, StorageError) as error:
            # An older checkpoint's fault is no reason to lose this one.
            emit(ParentUnread(step=order.step, rank=self.rank, reason=str(error)))
            return {}
        digest = self._parent.manifest.digest
        if (digest.block_size, digest.algorithm) != (order.block_size, order.algorithm.value):
            return {}
        fqns = {chunk.fqn for chunks in staged.chunks for chunk in chunks}
        return stored_chunks(self._parent, fqns, self.rank)

    def _open(self, seq: int) -> OpenedCheckpoint:
        """The documents of a commit of the run, without a look at its files."""
        log = self.run.log
        history = log.history if seq <= log.history.last_seq else log.refresh()
        if seq not in history.commits:
            raise no_checkpoint(log, seq, "this rank does not see its record")
        located = Located.of(CommitEntry(seq, history.commits[seq]))
        trust = log.signing.trust
        store, prefix = self.run.store, located.prefix
        return open_checkpoint(store, prefix, located.manifest, trust=trust, is_listed=False)

    def commit(
        self, attempt: Attempt, ballots: Sequence[bytes], facts: Facts, milestones: Milestones
    ) -> Committed:
        """The coordinator's: describe what the ranks wrote and refer to, and append the commit.

        Raises:
            ParentRetired: What is referred to was retired meanwhile; the next save is in full.
            InvalidCheckpoint: The parent, to which ranks refer, cannot be read.
            CommitRefused: The log forbids the commit.
            CommitUnknown: The outcome could not be learned in time.
            Fenced: A newer incarnation owns the run.
            StorageError: The store failed; the attempt did not commit.
        """
        told = [_read_ballot(ballot) for ballot in ballots]
        reports, divisions = [report for report, _ in told], [division for _, division in told]
        references: tuple[int, ...] = ()
        if attempt.refers_to:
            files = [written_files(attempt.plan, reports, divisions, attempt.algorithm)]
            if any(len(division.referred) for division in divisions):
                parent = self._parent_again(attempt.refers_to)
                files += referred_files(attempt.plan, divisions, parent)
            tables = as_tables(attempt.plan, files)
            history = self.run.log.history
            references = commits_of(history, attempt.refers_to, tables.files)
        else:
            tables = planned_tables(attempt.plan, reports, attempt.algorithm)
        documents = attempt.describe(tables, reports, facts)
        try:
            committed = attempt.append(documents, facts, references, milestones)
        except ParentRetired:
            self.memory.is_refused = True
            raise
        prefix = committed.record.manifest.key.removesuffix(MANIFEST_NAME)
        self._own = OpenedCheckpoint(prefix, documents.manifest, documents.catalog, documents.index)
        return committed

    def _parent_again(self, seq: int) -> OpenedCheckpoint:
        """The parent, which other ranks have read, even if this one could not."""
        if self._parent is None:
            try:
                self._parent = self._open(seq)
            except InvalidCheckpoint:
                self.memory.is_refused = True
                raise
        return self._parent

    def keep(self, seq: int, order: Order) -> None:
        """Remember this save, which has committed as ``seq``."""
        self.memory.keep(seq, (order.block_size, order.algorithm), self._chunks, self._own)


def _read_ballot(ballot: bytes) -> tuple[RankReport, Division]:
    end = 8 + int.from_bytes(ballot[:8], "little")
    return RankReport.from_bytes(ballot[8:end]), Division.from_bytes(ballot[end:])
