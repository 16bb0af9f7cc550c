"""How the ranks of one save or load agree: rounds of ballots, with a deadline.

One round: every rank does its work and hands in a ballot (a payload, or the error it met); the
coordinator decides over all of them and answers each rank. If any rank failed, or did not answer
by the deadline, the round fails on every rank with the same error. No rank waits for ever, and no
collective of the training's process groups is used, so that rounds may run in the background.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from dcp_resume.errors import DcpResumeError, RankErrors, RankSilent
from dcp_resume.session.error_wire import decode_error, describe_error, encode_error

__all__ = [
    "VERDICT_GRACE",
    "Deadline",
    "LonelyVotes",
    "StoreVotes",
    "VoteStore",
    "Votes",
    "Wait",
]

Work = Callable[[], bytes]
Decide = Callable[[Sequence[bytes]], Sequence[bytes]]
Wait = Callable[[list[str], float], bool]
"""Waits until all keys exist, for so many seconds at most; returns whether they do."""

VERDICT_GRACE = 1.25
"""A rank waits this much longer for the verdict than the coordinator for ballots, so that a dead
rank is named by the coordinator, not guessed by each rank alone."""


class Deadline:
    """A point in time by which a session must end."""

    def __init__(self, duration_s: float) -> None:
        self.duration_s = duration_s
        self._end = time.monotonic() + duration_s

    def left_s(self, stretch: float = 1.0) -> float:
        """Seconds left, never below zero; ``stretch`` lengthens the whole duration."""
        return max(0.0, self._end + self.duration_s * (stretch - 1.0) - time.monotonic())


class Votes(Protocol):
    """One session's rounds, on one rank."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """Ranks that take part."""

    def round(self, phase: str, work: Work, decide: Decide) -> bytes:
        """Run one round.

        Args:
            phase: Name of the numbered step, for messages; unique in a session.
            work: This rank's part; its result is the ballot.
            decide: Called on the coordinator with the ballots by rank; one answer a rank.

        Returns:
            The coordinator's answer to this rank.

        Raises:
            RankErrors: Some rank's work failed.
            RankSilent: Some rank, or the coordinator, did not answer by the deadline.
            DcpResumeError: What ``decide`` raised, on every rank alike.
        """


class VoteStore(Protocol):
    """What is asked of a ``torch.distributed`` store; never a blocking wait."""

    def set(self, key: str, value: bytes) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Value of a key that is known to exist."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""

    def delete_key(self, key: str) -> bool:
        """Delete a key."""


class LonelyVotes:
    """The rounds of a world of one rank: no transport, errors unwrapped."""

    rank = 0
    world_size = 1

    def round(self, phase: str, work: Work, decide: Decide) -> bytes:
        """Run the work and the decision in turn."""
        del phase
        return decide([work()])[0]


class StoreVotes:
    """Rounds over a ``torch.distributed`` store of our own.

    Args:
        store: A clone, so that the trainer's own requests never stand behind ours.
        wait: Waits for keys of the same store, through a client of its own.
        prefix: Never used before, so that no ballot of an earlier session is counted.
        rank: This rank.
        world_size: Ranks that take part.
        step: For messages.
        deadline: Of the whole session.
    """

    def __init__(
        self,
        store: VoteStore,
        wait: Wait,
        prefix: str,
        *,
        rank: int,
        world_size: int,
        step: int,
        deadline: Deadline,
    ) -> None:
        self._store = store
        self._wait = wait
        self._prefix = prefix
        self._rank = rank
        self._world_size = world_size
        self._step = step
        self._deadline = deadline

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks that take part."""
        return self._world_size

    def round(self, phase: str, work: Work, decide: Decide) -> bytes:
        """Run one round; see ``Votes.round``."""
        import torch.distributed as dist  # here alone: a lonely world needs no torch

        failure: BaseException | None = None
        try:
            ballot = b"+" + work()
        except BaseException as error:
            # Told to every rank below, and raised here as the cause of the round's error.
            failure = error
            ballot = b"-" + describe_error(error).encode(errors="backslashreplace")
        try:
            self._store.set(self._key(phase, "ballot", self._rank), ballot)
            if failure is not None and not isinstance(failure, Exception):
                if self._rank == 0:
                    self._refuse(phase, failure)
                raise failure  # Ctrl-C or exit: this rank leaves at once, the others know why
            if self._rank == 0:
                self._decide(phase, decide)
            verdict = self._wait_verdict(phase)
        except dist.DistError as error:
            raise self._silent((0,), phase, f"the vote store is gone ({error})") from error
        if verdict[:1] == b"+":
            return verdict[1:]
        raise decode_error(json.loads(verdict[1:])) from failure

    def _key(self, phase: str, kind: str, rank: int) -> str:
        return f"{self._prefix}/{phase}/{kind}/{rank}"

    def _decide(self, phase: str, decide: Decide) -> None:
        try:
            answers = [b"+" + bytes(a) for a in decide(self._collect(phase))]
        except DcpResumeError as error:
            answers = [b"-" + json.dumps(encode_error(error)).encode()] * self._world_size
        except Exception as error:
            self._refuse(phase, error)
            return
        self._answer(phase, answers)

    def _refuse(self, phase: str, error: BaseException) -> None:
        """The coordinator's own fault is rank 0's error: every rank must hear of it."""
        wrapped = self._rank_errors(phase, {0: describe_error(error)})
        answer = b"-" + json.dumps(encode_error(wrapped)).encode()
        self._answer(phase, [answer] * self._world_size)

    def _answer(self, phase: str, answers: Sequence[bytes]) -> None:
        for rank, answer in enumerate(answers):
            self._store.set(self._key(phase, "verdict", rank), answer)

    def _collect(self, phase: str) -> list[bytes]:
        keys = [self._key(phase, "ballot", rank) for rank in range(self._world_size)]
        if not self._wait(keys, self._deadline.left_s()):
            missing = tuple(r for r, key in enumerate(keys) if not self._store.check([key]))
            raise self._silent(missing, phase, "they are dead, hung or cut off")
        ballots = [bytes(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        failed = {r: b[1:].decode() for r, b in enumerate(ballots) if b[:1] == b"-"}
        if failed:
            raise self._rank_errors(phase, failed)
        return [ballot[1:] for ballot in ballots]

    def _wait_verdict(self, phase: str) -> bytes:
        key = self._key(phase, "verdict", self._rank)
        if not self._wait([key], self._deadline.left_s(VERDICT_GRACE)):
            raise self._silent((0,), phase, "the coordinator gave no verdict")
        verdict = bytes(self._store.get(key))
        self._store.delete_key(key)
        return verdict

    def _silent(self, ranks: tuple[int, ...], phase: str, why: str) -> RankSilent:
        return RankSilent(
            f"step {self._step}: rank(s) {', '.join(map(str, ranks))} did not report in phase "
            f"{phase!r} within {self._deadline.duration_s:g} s: {why}. Training may go on; the "
            f"previous checkpoint is untouched",
            step=self._step,
            ranks=ranks,
            phase=phase,
        )

    def _rank_errors(self, phase: str, failed: dict[int, str]) -> RankErrors:
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in sorted(failed.items()))
        return RankErrors(
            f"step {self._step}: {len(failed)} rank(s) failed in phase {phase!r}:\n{lines}",
            step=self._step,
            errors=failed,
        )
