"""One save, from start to outcome.

1. Agree (every rank, caller's thread). Each rank describes its state and offers a local plan; the
   coordinator merges the plans, names the attempt, makes its directories durable, and gives each
   rank its part.
2. Stage (every rank, caller's thread). The planned chunks are copied into reused host buffers, or
   borrowed where the caller waits. From here on the trainer may change its tensors, and the rest
   may run in the background.
3. Write (every rank). Digest, then write, each data file.
4. Commit (coordinator). Each rank reports sizes and digests, or its error. One listing must show
   every file at its size; then index, catalog and manifest are written, and the ``commit`` record
   is appended to the log: this append is the commit, nothing before it counts.
5. Learn (every rank). All hear the outcome. A rank that hears nothing by the deadline reads the
   log itself.

A crash before the append leaves an attempt that no reader sees; a crash after it leaves a whole
checkpoint. The crash tests kill ranks at each of these numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcp_resume.errors import (
    CommitUnknown,
    ConfigurationError,
    RankSilent,
    StorageError,
    StoreNotShared,
)
from dcp_resume.events import CheckpointCommitted, PhaseFinished, StepReached, emit
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.digests import choose_block_size, digest_hex
from dcp_resume.manifest.keys import CATALOG_NAME, INDEX_NAME, MANIFEST_NAME
from dcp_resume.manifest.keys import attempt_prefix, new_attempt_id
from dcp_resume.manifest.models import DocumentRef, FileEntry
from dcp_resume.planning.merge import GlobalPlan, merge
from dcp_resume.planning.plans import LocalPlan, RankPlan, local_plan, per_rank_leaves
from dcp_resume.planning.state import Declarations, LocalState, describe_state
from dcp_resume.session.commit import Opened, commit
from dcp_resume.session.documents import AttemptIdentity, Documents, Facts, build_documents
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.staging import BufferPool
from dcp_resume.session.votes import Votes
from dcp_resume.session.writing import (
    RankReport,
    RankSource,
    StagedRank,
    stage_rank,
    write_rank,
)
from dcp_resume.storage import ObjectStore

__all__ = ["Run", "SaveResult", "SaveSession"]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that this incarnation has opened."""

    store: ObjectStore
    log: RunLog
    opened: Opened


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A committed checkpoint."""

    step: int
    seq: int
    """Log number of its commit."""
    attempt: str
    num_bytes: int
    """Bytes of its data files, over all ranks."""
    duration_s: float
    """From the call of ``save`` to the commit."""


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What step 1 gave this rank."""

    attempt: str
    block_size: int
    plan: RankPlan


class SaveSession:
    """One save on one rank. Call ``stage`` in the trainer's thread, then ``finish`` anywhere.

    Args:
        run: The opened run.
        votes: This save's rounds.
        step: Optimizer steps completed.
        facts: For the manifest; the coordinator's count.
        declarations: What the caller knows of its leaves.
    """

    def __init__(
        self,
        run: Run,
        votes: Votes,
        *,
        step: int,
        facts: Facts,
        declarations: Declarations | None = None,
    ) -> None:
        if step < 0:
            raise ConfigurationError(f"step must not be negative, got {step}", option="step")
        self._run = run
        self._votes = votes
        self._step = step
        self._facts = facts
        self._declarations = declarations or Declarations()
        self._started = time.monotonic()
        # Set by step 1 and 2:
        self._agreed: _Agreed | None = None
        self._staged: StagedRank | None = None
        # Set by step 1 on the coordinator:
        self._global: GlobalPlan | None = None
        self._identity: AttemptIdentity | None = None
        self._planned_at = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank writes; known after ``stage``."""
        return self._staged.num_bytes if self._staged else 0

    def stage(self, state: Mapping[str, Any], pool: BufferPool | None) -> None:
        """Steps 1 and 2.

        Args:
            state: Nested mapping of this rank's leaves.
            pool: Buffers to copy into, or None to borrow the tensors' memory until ``finish`` ends.

        Raises:
            RankErrors: A rank's state cannot be saved, or the store failed; names ranks and causes.
            RankSilent: A rank did not answer by the deadline.
            StateError: The ranks' states contradict each other.
            Fenced: A newer incarnation owns the run.
        """
        self._reach(1)
        started = time.monotonic()
        described: list[LocalState] = []

        def offer() -> bytes:
            described.append(describe_state(state, self._declarations))
            plan = local_plan(
                described[0], self._votes.rank, self._votes.world_size, self._declarations
            )
            return _with_step(self._step, plan.to_bytes())

        self._agreed = _decode_agreed(self._votes.round("agree", offer, self._agree))
        self._finish_phase("plan", started, 0)

        self._reach(2)
        started = time.monotonic()
        source = RankSource(described[0].tensors, per_rank_leaves(described[0]))
        self._staged = stage_rank(self._agreed.plan, source, pool)
        self._finish_phase("stage", started, self.num_bytes)

    def finish(self) -> SaveResult:
        """Steps 3 to 5.

        Raises:
            RankErrors: A rank could not write.
            RankSilent: A rank did not report by the deadline.
            StoreNotShared: The coordinator does not see files that a rank wrote.
            CommitRefused: The log forbids the commit.
            CommitUnknown: The outcome could not be learned in time.
            Fenced: A newer incarnation owns the run.
            StorageError: The store failed on the coordinator; the attempt did not commit.
        """
        try:
            answer = self._votes.round("report", self._write, self._commit)
        except RankSilent as error:
            answer = self._outcome_from_log(error)
        finally:
            if self._staged is not None:
                self._staged.release()
        self._reach(5)
        seq, attempt, num_bytes = json.loads(answer)
        duration = time.monotonic() - self._started
        if self._votes.rank == 0:
            emit(
                CheckpointCommitted(
                    url=self._run.store.url,
                    step=self._step,
                    attempt=attempt,
                    num_bytes=num_bytes,
                    duration_s=duration,
                )
            )
        return SaveResult(self._step, seq, attempt, num_bytes, duration)

    # Step 1, coordinator.

    def _agree(self, ballots: Sequence[bytes]) -> list[bytes]:
        steps = [_split_step(ballot) for ballot in ballots]
        wrong = {rank: step for rank, (step, _) in enumerate(steps) if step != self._step}
        if wrong:
            raise ConfigurationError(
                f"ranks save different steps: rank 0 saves {self._step}, others {wrong}. Call "
                f"save() on every rank with the same step",
                option="step",
            )
        plan = merge([LocalPlan.from_bytes(data) for _, data in steps])
        history = self._run.log.refresh()
        newest = history.newest()
        self._planned_at = history.last_seq
        self._identity = AttemptIdentity(
            run=str(history.run),
            step=self._step,
            attempt=new_attempt_id(),
            generation=self._run.opened.generation,
            parent=newest.seq if newest else None,
            resume_source=self._run.opened.resume_source,
        )
        self._global = plan
        self._run.store.prepare(attempt_prefix(self._step, self._identity.attempt))
        block_size = choose_block_size(_planned_bytes(plan))
        return [
            _encode_agreed(self._identity.attempt, block_size, plan.rank_plan(rank))
            for rank in range(self._votes.world_size)
        ]

    # Step 3, every rank.

    def _write(self) -> bytes:
        assert self._agreed is not None
        assert self._staged is not None
        self._reach(3)
        started, num_bytes = time.monotonic(), self.num_bytes
        prefix = attempt_prefix(self._step, self._agreed.attempt)
        report = write_rank(self._staged, self._run.store, prefix, self._agreed.block_size)
        self._finish_phase("write", started, num_bytes)
        return report.to_bytes()

    # Step 4, coordinator.

    def _commit(self, ballots: Sequence[bytes]) -> list[bytes]:
        assert self._global is not None
        assert self._identity is not None
        assert self._agreed is not None
        self._reach(4)
        started = time.monotonic()
        documents = build_documents(
            self._global,
            [RankReport.from_bytes(ballot) for ballot in ballots],
            self._identity,
            self._facts,
            self._agreed.block_size,
        )
        prefix = attempt_prefix(self._step, self._identity.attempt)
        self._check_listing(prefix, documents.files)
        self._write_documents(prefix, documents)
        committed = commit(
            self._run.log,
            generation=self._identity.generation,
            step=self._step,
            attempt=self._identity.attempt,
            manifest=DocumentRef(
                key=prefix + MANIFEST_NAME,
                size=len(documents.manifest_bytes),
                digest=digest_hex(documents.manifest_bytes),
            ),
            parent=self._identity.parent,
            references=(),
            planned_at=self._planned_at,
            num_bytes=documents.manifest.counts.num_bytes,
            trainer=self._facts.trainer,
        )
        self._finish_phase("commit", started, 0)
        outcome = [committed.seq, committed.record.attempt, committed.record.num_bytes]
        return [json.dumps(outcome).encode()] * self._votes.world_size

    def _check_listing(self, prefix: str, files: Sequence[FileEntry]) -> None:
        found = {info.key: info.size for info in self._run.store.list(prefix)}
        unseen = sorted({file.rank for file in files if prefix + file.key not in found})
        if unseen:
            raise StoreNotShared(
                f"step {self._step}: the coordinator does not see the files that rank(s) "
                f"{', '.join(map(str, unseen))} wrote below {self._run.store.url}/{prefix}. Use a "
                f"root that is the same storage on every host (shared file system or s3://)",
                step=self._step,
                ranks=tuple(unseen),
            )
        for file in files:
            if found[prefix + file.key] != file.size:
                raise StorageError(
                    f"{prefix + file.key} has {found[prefix + file.key]} bytes, rank {file.rank} "
                    f"wrote {file.size}; the attempt is dropped",
                    url=self._run.store.url,
                    key=prefix + file.key,
                )

    def _write_documents(self, prefix: str, documents: Documents) -> None:
        for name, data in (
            (INDEX_NAME, documents.index_bytes),
            (CATALOG_NAME, documents.catalog_bytes),
            (MANIFEST_NAME, documents.manifest_bytes),
        ):
            self._run.store.write(prefix + name, [memoryview(data)])

    # Step 5, a rank that heard nothing.

    def _outcome_from_log(self, silence: RankSilent) -> bytes:
        if silence.ranks != (0,) or self._votes.rank == 0 or self._agreed is None:
            raise silence
        try:
            entry = self._run.log.refresh().find_attempt(self._agreed.attempt)
        except StorageError as error:
            raise CommitUnknown(
                f"step {self._step}: the coordinator is silent and the log cannot be read "
                f"({error}); attempt {self._agreed.attempt} may or may not have committed",
                step=self._step,
                attempt=self._agreed.attempt,
            ) from silence
        if entry is None:
            raise silence
        record = entry.record
        return json.dumps([entry.seq, record.attempt, record.num_bytes]).encode()

    def _reach(self, number: int) -> None:
        emit(StepReached(number=number, step=self._step, rank=self._votes.rank))

    def _finish_phase(self, phase: str, started: float, num_bytes: int) -> None:
        emit(
            PhaseFinished(
                phase=phase,
                step=self._step,
                rank=self._votes.rank,
                duration_s=time.monotonic() - started,
                num_bytes=num_bytes,
            )
        )


def _planned_bytes(plan: GlobalPlan) -> int:
    itemsizes = [ITEMSIZES[entry.dtype] for entry in plan.tensors]
    chunks = plan.layout.chunks
    volumes = chunks.sizes.prod(axis=1).tolist()
    return sum(
        volume * itemsizes[tensor]
        for tensor, volume in zip(chunks.tensor.tolist(), volumes, strict=True)
    )


def _with_step(step: int, data: bytes) -> bytes:
    return step.to_bytes(8, "little") + data


def _split_step(ballot: bytes) -> tuple[int, bytes]:
    return int.from_bytes(ballot[:8], "little"), ballot[8:]


def _encode_agreed(attempt: str, block_size: int, plan: RankPlan) -> bytes:
    return block_size.to_bytes(8, "little") + attempt.encode().ljust(32) + plan.to_bytes()


def _decode_agreed(data: bytes) -> _Agreed:
    return _Agreed(
        attempt=data[8:40].decode().strip(),
        block_size=int.from_bytes(data[:8], "little"),
        plan=RankPlan.from_bytes(data[40:]),
    )
