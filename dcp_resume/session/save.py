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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dcp_resume.errors import CommitUnknown, ConfigurationError, RankSilent, StorageError
from dcp_resume.events import CheckpointCommitted, PhaseFinished, PlanAgreed, StepReached, emit
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.plans import LocalPlan
from dcp_resume.planning.state import LocalState, describe_state
from dcp_resume.session.attempt import Attempt, Order, Run
from dcp_resume.session.chunk_sources import RankSource
from dcp_resume.session.copies import AtOnce, Copies
from dcp_resume.session.device_copies import prompt_copies
from dcp_resume.session.documents import Facts
from dcp_resume.session.incremental import IncrementalSave
from dcp_resume.session.milestones import Milestones
from dcp_resume.session.plan_memory import TELL_ALL, PlanMemory
from dcp_resume.session.staging import Staging
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.unchanged import ChunkMemory, Unchanged
from dcp_resume.session.votes import Votes
from dcp_resume.session.writing import (
    RankReport,
    StagedRank,
    stage_rank,
    write_rank,
)

__all__ = ["SaveResult", "SaveSession"]


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A committed checkpoint."""

    step: int
    seq: int
    """Log number of its commit."""
    attempt: str
    num_bytes: int
    """Bytes of its data files, over all ranks; also of older ones that it refers to."""
    duration_s: float
    """From the call of ``save`` to the commit."""


class SaveSession:
    """One save on one rank. Call ``stage`` in the trainer's thread, then ``finish`` anywhere.

    Args:
        run: The opened run.
        votes: This save's rounds.
        step: Optimizer steps completed.
        facts: For the manifest; the coordinator's count.
        declarations: What the caller knows of its leaves.
        tensor_digests: Whether to record a digest of each tensor; the coordinator's word counts.
        memory: Of earlier saves' plans; by default there is none.
        unchanged: What to do with chunks that the newest checkpoint has; the coordinator's word
            counts.
        chunks: Of the last save, to compare with; by default there is none.
    """

    def __init__(
        self,
        run: Run,
        votes: Votes,
        *,
        step: int,
        facts: Facts,
        declarations: Declarations | None = None,
        tensor_digests: TensorDigests = TensorDigests.OMIT,
        memory: PlanMemory | None = None,
        unchanged: Unchanged = Unchanged.WRITE,
        chunks: ChunkMemory | None = None,
    ) -> None:
        self._run = run
        self._votes = votes
        self._step = step
        self._facts = facts
        self._declarations = declarations or Declarations()
        self._tensor_digests = tensor_digests
        self._memory = memory or PlanMemory()
        self._unchanged = unchanged
        self._incremental = IncrementalSave(run, chunks or ChunkMemory(), votes.rank)
        self._milestones = Milestones(step, votes.rank)
        self._stage_started = time.monotonic()
        self._copies: Copies = AtOnce()
        self._order: Order | None = None  # known after step 1
        self._staged: StagedRank | None = None  # known after step 2
        self._failure: Exception | None = None  # of step 2, told to all ranks in step 4
        self._attempt: Attempt | None = None  # known after step 1, on the coordinator

    @property
    def _head(self) -> bytes:
        """Of each ballot."""
        return self._step.to_bytes(8, "little")

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank writes; known after ``stage``."""
        return self._staged.num_bytes if self._staged else 0

    def stage(
        self,
        state: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        staging: Staging,
        copies: Copies | None = None,
    ) -> None:
        """Steps 1 and 2.

        Args:
            state: Nested mapping of this rank's leaves, or a function that returns it: what that
                raises is told to all ranks.
            staging: Where the bytes are until ``finish`` ends.
            copies: How they get there; by default at once. What is left is done in ``finish``.

        Raises:
            RankErrors: A rank's state cannot be saved, or the store failed; names ranks and causes.
            RankSilent: A rank did not answer by the deadline.
            StateError: The ranks' states contradict each other.
        """
        self._reach(1)
        self._milestones.is_blocking = not staging.is_trainer_free
        started = time.monotonic()
        memory, offered = self._memory, list[tuple[LocalState, LocalPlan]]()

        def offer() -> bytes:
            leaves = state() if callable(state) else state
            described = describe_state(leaves, self._declarations, memory.outline)
            rank, world_size = self._votes.rank, self._votes.world_size
            plan = local_plan(described, rank, world_size, self._declarations, memory.offer)
            offered.append((described, plan))
            return self._head + memory.ballot(plan)

        answer = self._votes.round("agree", offer, self._begin)
        described, plan = offered[0]
        if answer == TELL_ALL:
            answer = self._votes.round(
                "agree in full", lambda: self._head + memory.full_ballot(plan), self._begin
            )
        self._order = Order.from_bytes(answer)
        told = answer[Order.NUM_BYTES :]
        rank_plan = memory.learn(told, plan)
        self._milestones.reach("planned")
        self._finish_phase("plan", started, 0)
        is_remembered = memory.is_remembered(told)
        emit(PlanAgreed(step=self._step, rank=self._votes.rank, is_remembered=is_remembered))

        self._reach(2)
        self._stage_started = time.monotonic()
        self._copies = copies or prompt_copies()
        source = RankSource(described.tensors, described.per_rank_leaves, memory.placed)
        try:
            self._staged = stage_rank(rank_plan, source, staging, self._copies)
        except Exception as error:
            # The others are past this step: they hear of it, with its cause, when they report.
            self._failure = error
        if self._copies.are_done and self._failure is None:
            self._note_staged()

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
            self._copies.abandon()
            if self._staged is not None:
                self._staged.release()
        self._reach(5)
        seq, attempt, num_bytes = json.loads(answer)
        assert self._order is not None
        if self._order.unchanged is Unchanged.REFER:
            self._incremental.keep(seq, self._order)
        self._milestones.reach("committed")
        duration = self._milestones.elapsed_s
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

    def _begin(self, ballots: Sequence[bytes]) -> list[bytes]:
        steps = {rank: int.from_bytes(b[:8], "little") for rank, b in enumerate(ballots)}
        wrong = {rank: step for rank, step in steps.items() if step != self._step}
        if wrong:
            raise ConfigurationError(
                f"ranks save different steps: rank 0 saves {self._step}, others {wrong}. Call "
                f"save() on every rank with the same step",
                option="step",
            )
        told = [ballot[8:] for ballot in ballots]
        if not self._memory.can_merge(told):
            return [TELL_ALL] * len(ballots)
        plan = self._memory.merge(told)
        is_referring = self._unchanged is Unchanged.REFER
        find = self._incremental.memory.parent_in if is_referring else lambda history: 0
        self._attempt = Attempt.begin(
            self._run, plan, self._step, self._tensor_digests, self._unchanged, find
        )
        order = self._attempt.order.to_bytes()
        return [order + answer for answer in self._memory.answers(told, plan)]

    # Step 3, every rank.

    def _write(self) -> bytes:
        assert self._order is not None
        self._reach(3)
        if self._failure is not None:
            raise self._failure
        assert self._staged is not None
        self._copies.finish()
        if not self._milestones.is_reached("staged"):
            self._note_staged()
        started, num_bytes = time.monotonic(), self.num_bytes
        order = self._order
        if order.unchanged is Unchanged.REFER:
            ballot = self._incremental.write(self._staged, order, self._milestones)
        else:
            report = write_rank(
                self._staged,
                self._run.store,
                order.prefix,
                order.block_size,
                order.algorithm,
                order.tensor_digests,
            )
            self._milestones.reach("written")
            ballot = replace(report, reached_us=self._milestones.reported_us()).to_bytes()
        self._finish_phase("write", started, num_bytes)
        return ballot

    # Step 4, coordinator.

    def _commit(self, ballots: Sequence[bytes]) -> list[bytes]:
        assert self._attempt is not None
        self._reach(4)
        started = time.monotonic()
        if self._attempt.unchanged is Unchanged.REFER:
            committed = self._incremental.commit(
                self._attempt, ballots, self._facts, self._milestones
            )
        else:
            reports = [RankReport.from_bytes(ballot) for ballot in ballots]
            committed = self._attempt.commit(reports, self._facts, milestones=self._milestones)
        self._finish_phase("commit", started, 0)
        outcome = [committed.seq, committed.record.attempt, committed.record.num_bytes]
        return [json.dumps(outcome).encode()] * len(ballots)

    # Step 5, a rank that heard nothing.

    def _outcome_from_log(self, silence: RankSilent) -> bytes:
        if silence.ranks != (0,) or self._order is None:
            raise silence
        attempt = self._order.attempt
        try:
            entry = self._run.log.refresh().find_attempt(attempt)
        except StorageError as error:
            raise CommitUnknown(
                f"step {self._step}: the coordinator is silent and the log cannot be read "
                f"({error}); attempt {attempt} may or may not have committed",
                step=self._step,
                attempt=attempt,
            ) from silence
        if entry is None:
            raise silence
        return json.dumps([entry.seq, attempt, entry.record.num_bytes]).encode()

    def _reach(self, number: int) -> None:
        emit(StepReached(number=number, step=self._step, rank=self._votes.rank))

    def _note_staged(self) -> None:
        self._milestones.reach("staged")
        self._finish_phase("stage", self._stage_started, self.num_bytes)

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
