"""Stop all ranks at one step when the platform says that it will stop us, and save in time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from dcp_resume.errors import ConfigurationError, SaveError, StorageError
from dcp_resume.events import (
    CheckpointCommitted,
    Event,
    OrphanEnded,
    PreemptionFinished,
    PreemptionNoticed,
    VoteStoreLost,
    emit,
    subscribe,
)
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.grace import (
    Budget,
    ExitAction,
    RunningSave,
    SaveTimes,
    WhenShort,
    optimizer_share,
)
from dcp_resume.manager.notices import (
    Clock,
    Launcher,
    Notice,
    NoticePoller,
    NoticeSource,
    SignalListener,
)
from dcp_resume.manager.preemption_settings import PreemptionSettings
from dcp_resume.manager.stateful import OptimizerState, without_optimizers
from dcp_resume.manager.stop_vote import StopVote
from dcp_resume.session.ranks import Ranks

__all__ = ["Preemption"]

_VOTE_POLL_S = 0.01
_LEAST_DEADLINE_S = 5.0
"""Even after the end of the grace period: the kill may be late."""


class Preemption:
    """Listens for notices while it is entered, and lets all ranks stop at one step.

    Make one on every rank, and enter it in the main thread; making it takes one collective of the
    default group.

        >>> import tempfile, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> with CheckpointManager(tempfile.mkdtemp()) as checkpoints:
        ...     with Preemption(checkpoints) as preemption:
        ...         for step in range(1, 11):
        ...             if preemption.should_stop(step):
        ...                 preemption.save_and_exit(step, {"model": model})

    Args:
        checkpoints: Of the run; ``save_and_exit`` saves there.
        settings: Options.

    Raises:
        ConfigurationError: Optimizer state may be left out by ``when_short``, and is required by
            the settings of ``checkpoints``.
    """

    def __init__(
        self, checkpoints: CheckpointManager, settings: PreemptionSettings | None = None
    ) -> None:
        self.settings = settings or PreemptionSettings()
        self._checkpoints = checkpoints
        _check_optimizer(self.settings, checkpoints)
        self._ranks = Ranks()
        store, prefix = self._ranks.board()
        self._vote = StopVote(
            store, prefix, rank=self._ranks.rank, world_size=self._ranks.world_size
        )
        self._times = SaveTimes()
        self._saved_step: int | None = None
        graces = {signal.Signals[name]: grace for name, grace in self.settings.signals.items()}
        self._signals = SignalListener(graces)
        clock = Clock(
            exit_after_s=self.settings.exit_after_s,
            end_time=self.settings.end_time,
            lead_s=self.settings.lead_s,
        )
        self._launcher = Launcher()
        self._unheard: list[NoticeSource] = [clock, self._launcher]
        self._told: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        self._poller = NoticePoller(
            self.settings.sources, self.settings.sources_interval_s, self._told.put
        )
        self._heard: list[Notice] = []
        self._kill_at = math.inf  # monotonic
        self._is_over = False
        self._is_leaving = False
        self._is_store_lost = False

    # The trainer's thread.

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What this rank has heard, from its own sources or from other ranks, the first first."""
        return tuple(self._heard)

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step: true for the same step on all ranks.

        Call it once a step, on every rank; it waits only while a vote is on. Evaluate before the
        call that follows the step, so that a notice in the evaluation stops the job at that step,
        not at the next.

        Args:
            step: Optimizer steps completed.

        Raises:
            RankSilent: There is a notice, and the ranks could not agree: one is dead, or the store
                of the process group is gone.
        """
        return self._vote.pass_boundary(step)

    def should_stop_evaluating(self) -> bool:
        """Whether to leave the evaluation: true at the same batch on all ranks that come to it.

        Call it before each batch of an evaluation; what was evaluated so far is incomplete then.

        Raises:
            RankSilent: As ``should_stop``.
        """
        return self._vote.pass_batch()

    def save_and_exit(self, step: int, state: Mapping[str, Any]) -> NoReturn:
        """Save what there is time for, and leave with ``exit_code``; call it on every rank.

        Args:
            step: Optimizer steps completed.
            state: As for ``CheckpointManager.save``.

        Raises:
            SystemExit: With ``exit_code``, when the save is committed, or there was no time for it.
            RankErrors: A rank failed.
            RankSilent: A rank did not answer in time.
            SaveError: The save did not commit.
            Fenced: A newer incarnation owns the run.
            StorageError: The store failed.
            TimeoutError: A save that ran already did not end in the grace period.
        """
        action, left_s = self._plan(step, optimizer_share(state))
        deadline_s = self._deadline_s(left_s)
        pending = self._checkpoints.pending
        if action is ExitAction.WAIT and pending is not None:
            pending.result(deadline_s)
        elif action in (ExitAction.SAVE, ExitAction.SAVE_WITHOUT_OPTIMIZER):
            is_light = action is ExitAction.SAVE_WITHOUT_OPTIMIZER
            self._save(step, without_optimizers(state) if is_light else state, deadline_s)
        self._vote.part(deadline_s)
        if self._ranks.rank == 0:
            left_s = self._kill_at - time.monotonic()
            emit(PreemptionFinished(step=step, action=action.value, left_s=left_s))
        self._is_leaving = True
        raise SystemExit(self.settings.exit_code)

    def __enter__(self) -> Self:
        """Begin to listen.

        Raises:
            ConfigurationError: Signals cannot be heard here.
        """
        self._signals.start()
        self._unsubscribe = subscribe(self._note_event)
        self._poller.start()
        self._watcher = threading.Thread(target=self._watch, name="dcp-resume-watch", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening, restore the signals' handlers, and keep no other rank waiting.

        After ``save_and_exit`` all handlers but Ctrl-C's stay, and do nothing: a launcher that
        signals twice shall not turn the exit code into another.
        """
        self._is_over = True
        self._signals.wake()
        self._watcher.join()
        self._poller.stop()
        self._unsubscribe()
        kept = set(signal.Signals) - {signal.SIGINT} if self._is_leaving else ()
        self._signals.stop(keep=kept)
        self._vote.leave()

    # Before leaving.

    def _plan(self, step: int, share: float) -> tuple[ExitAction, float]:
        """The same plan on all ranks: from the times of the coordinator, and the shortest grace."""
        settings = self.settings
        pending = self._checkpoints.pending
        running = None
        if pending is not None and not pending.is_done:
            running = RunningSave(pending.step, time.monotonic() - pending.started)

        def decide(ballots: Sequence[bytes]) -> list[bytes]:
            left_s = min(json.loads(ballot) for ballot in ballots)
            budget = Budget(left_s, self._times.save_s, share, settings.margin)
            action = budget.choose(step, running, self._saved_step, settings.when_short)
            return [json.dumps([action.value, left_s]).encode()] * len(ballots)

        left_s = max(0.0, self._kill_at - time.monotonic())
        votes = self._ranks.votes(step=step, deadline_s=self._deadline_s(left_s))
        action, left_s = json.loads(votes.round("exit", json.dumps(left_s).encode, decide))
        return ExitAction(action), left_s

    def _save(self, step: int, state: Mapping[str, Any], deadline_s: float) -> None:
        # An earlier save that failed, as SaveFailed has told, shall not be in the way of this one.
        pending = self._checkpoints.pending
        if pending is not None:
            with contextlib.suppress(SaveError, StorageError):
                pending.result(deadline_s)
        self._checkpoints.save(step, state, deadline_s=deadline_s).result()

    def _note_event(self, event: Event) -> None:
        if isinstance(event, CheckpointCommitted) and event.url == self._checkpoints.url:
            self._times.note(event.duration_s)
            self._saved_step = event.step

    # The watcher's thread.

    def _watch(self) -> None:
        try:
            while not self._is_over:
                self._tick()
                is_voting = self._vote.is_held and not self._vote.is_settled
                self._signals.wait(_VOTE_POLL_S if is_voting else self.settings.poll_s)
        except BaseException as error:
            self._vote.fail(error)  # else the trainer would wait for ever

    def _tick(self) -> None:
        for notice in self._own_notices():
            emit(
                PreemptionNoticed(
                    rank=self._ranks.rank, reason=notice.reason, grace_s=notice.grace_s
                )
            )
            self._note(notice)
        if not self._vote.is_held:
            self._look()
        if self._vote.is_held and not self._vote.is_settled:
            self._vote.settle()
        if self._launcher.is_gone and time.monotonic() >= self._kill_at:
            emit(OrphanEnded(rank=self._ranks.rank, exit_code=self.settings.exit_code))
            os._exit(self.settings.exit_code)  # the trainer hangs, and nobody is left to end it

    def _own_notices(self) -> list[Notice]:
        found = [*self._signals.heard()]
        for source in list(self._unheard):
            notice = source()
            if notice is not None:
                self._unheard.remove(source)
                found.append(notice)
        while not self._told.empty():
            found.append(self._told.get())
        return found

    def _look(self) -> None:
        """For the notice of another rank."""
        if self._is_store_lost:
            return
        try:
            announced = self._vote.look()
        except dist.DistError as error:
            self._is_store_lost = True
            emit(VoteStoreLost(rank=self._ranks.rank, reason=str(error)))
            return
        if announced is not None:
            rank, reason, grace_s = json.loads(announced)
            self._note(Notice(f"rank {rank}: {reason}", grace_s))

    def _note(self, notice: Notice) -> None:
        self._heard.append(notice)
        self._kill_at = min(self._kill_at, time.monotonic() + notice.grace_s)
        if not self._vote.is_held:
            announcement = json.dumps([self._ranks.rank, notice.reason, notice.grace_s])
            self._vote.ask(announcement.encode(), self._deadline_s(notice.grace_s))

    def _deadline_s(self, left_s: float) -> float:
        return max(min(left_s, self._checkpoints.settings.deadline_s), _LEAST_DEADLINE_S)


def _check_optimizer(settings: PreemptionSettings, checkpoints: CheckpointManager) -> None:
    of_run = checkpoints.settings
    required = OptimizerState.REQUIRED in (of_run.save_optimizer_state, of_run.load_optimizer_state)
    if settings.when_short is WhenShort.LEAVE_OUT_OPTIMIZER and required:
        raise ConfigurationError(
            "when_short=LEAVE_OUT_OPTIMIZER, but the run's settings make optimizer state REQUIRED: "
            "such a checkpoint could not be saved or resumed. Use AS_GIVEN, or WhenShort.LEAVE",
            option="when_short",
        )
