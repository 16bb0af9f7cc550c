"""Where all ranks stop: agreed when a notice comes, at no cost before it.

The trainer passes *points*: the end of each step (a boundary), and each batch of an evaluation.
Every rank counts its own, in memory. When a notice comes, each rank's watcher, which runs beside
the trainer, holds its rank: from now on the trainer waits at the next point. Then it hands in a
ballot: the last point that its rank has passed. The coordinator answers with the furthest of all:
ranks behind it go on, and each stops at its first point after it. As no rank was let past a point
that it had not counted, that is the same point on all, however far they were apart.

Points are ordered (boundary, batch): ranks that have fewer batches in an evaluation than others go
on to the boundary behind it, and all meet there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from enum import Enum

import torch.distributed as dist

from dcp_resume.errors import DcpResumeError, RankSilent
from dcp_resume.session.error_wire import decode_error, encode_error
from dcp_resume.session.votes import VERDICT_GRACE, Deadline, VoteStore

__all__ = ["Answer", "Point", "StopVote"]

Point = tuple[int, int]
"""Boundaries passed, and batches of evaluation since the last one."""

_FAREWELL_POLL_S = 0.01


class Answer(Enum):
    """Whether a rank may pass a point."""

    GO_ON = "go_on"
    STOP = "stop"
    WAIT = "wait"
    """A vote is on; its outcome will say."""


class StopVote:
    """The one vote of a rank on where to stop.

    ``pass_boundary`` and ``pass_batch`` belong to the trainer's thread, ``look``, ``ask`` and
    ``settle`` to the watcher's: each is a request or two to the store and never waits. Every rank
    must pass the same boundaries.

    Args:
        store: Shared by all ranks.
        prefix: Of keys that were never used before.
        rank: This rank.
        world_size: Ranks that take part.
    """

    def __init__(self, store: VoteStore, prefix: str, *, rank: int, world_size: int) -> None:
        self._store = store
        self._prefix = prefix
        self._rank = rank
        self._world_size = world_size
        self._lock = threading.Lock()  # over the next five
        self._passed: Point = (0, 0)
        self._step = 0
        self._is_held = False
        self._furthest: Point | None = None
        self._failure: BaseException | None = None
        self._outcome = threading.Event()
        self._deadline: Deadline | None = None  # the watcher's

    # The trainer's thread.

    def pass_boundary(self, step: int) -> bool:
        """Whether to stop after this step; waits while a vote is on.

        Raises:
            RankSilent: The ranks could not agree.
        """
        return self._pass(lambda: self.try_boundary(step))

    def pass_batch(self) -> bool:
        """Whether to leave the evaluation before this batch; waits while a vote is on.

        Raises:
            RankSilent: The ranks could not agree.
        """
        return self._pass(self.try_batch)

    def try_boundary(self, step: int) -> Answer:
        """As ``pass_boundary``, without waiting."""
        self._step = step
        return self._try((self._passed[0] + 1, 0))

    def try_batch(self) -> Answer:
        """As ``pass_batch``, without waiting."""
        return self._try((self._passed[0], self._passed[1] + 1))

    def _try(self, point: Point) -> Answer:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._furthest is not None and point > self._furthest:
                return Answer.STOP
            if self._furthest is None and self._is_held:
                return Answer.WAIT
            self._passed = point
            return Answer.GO_ON

    def _pass(self, attempt: Callable[[], Answer]) -> bool:
        while (answer := attempt()) is Answer.WAIT:
            self._outcome.wait()
        return answer is Answer.STOP

    def leave(self) -> None:
        """Pass no further point; call it when the watcher has ended.

        The others are not kept waiting: what this rank has passed is its ballot, and the
        coordinator's is its verdict, for all are meant to come as far as it came.
        """
        with self._lock:
            is_decided = self._furthest is not None or self._failure is not None
            self._is_held = True
        try:
            self._store.set(self._key("ballot", self._rank), _encode(self._passed))
            if self._rank == 0 and not is_decided:
                self._store.set(self._key("verdict"), b"+" + _encode(self._passed))
        except dist.DistError as error:
            # Without the store nobody waits for us there; they find out as we did.
            self.fail(self._store_lost(error))

    def part(self, deadline_s: float) -> None:
        """Leave together: the coordinator, whose process may hold the store, is the last to go."""
        deadline = Deadline(deadline_s)
        try:
            self._store.set(self._key("farewell", self._rank), b"")
            if self._rank == 0:
                keys = [self._key("farewell", rank) for rank in range(self._world_size)]
                while not self._store.check(keys) and deadline.left_s() > 0:
                    time.sleep(_FAREWELL_POLL_S)
        except dist.DistError as error:
            self.fail(self._store_lost(error))

    # The watcher's thread.

    @property
    def is_held(self) -> bool:
        """Whether this rank waits at its next point, or has its answer."""
        return self._is_held

    @property
    def is_settled(self) -> bool:
        """Whether the outcome is known, good or bad."""
        return self._outcome.is_set()

    def look(self) -> bytes | None:
        """The notice that some rank announced; None as long as none did."""
        key = self._key("notice")
        return bytes(self._store.get(key)) if self._store.check([key]) else None

    def ask(self, notice: bytes, deadline_s: float) -> None:
        """Hold this rank, announce the notice, and hand in the ballot."""
        with self._lock:
            self._is_held = True
            passed = self._passed
        self._deadline = Deadline(deadline_s)
        try:
            self._store.set(self._key("notice"), notice)
            self._store.set(self._key("ballot", self._rank), _encode(passed))
        except dist.DistError as error:
            self.fail(self._store_lost(error))

    def settle(self) -> None:
        """Look whether the vote has an outcome; on the coordinator, whether it can have one."""
        assert self._deadline is not None, "settle() comes after ask()"
        try:
            if self._rank == 0:
                self._decide(self._deadline)
            if not self._store.check([self._key("verdict")]):
                if self._deadline.left_s(VERDICT_GRACE) <= 0:
                    self.fail(self._silent((0,), "the coordinator gave no verdict"))
                return
            verdict = bytes(self._store.get(self._key("verdict")))
        except dist.DistError as error:
            self.fail(self._store_lost(error))
            return
        if verdict[:1] == b"-":
            self.fail(decode_error(json.loads(verdict[1:])))
            return
        with self._lock:
            boundaries, batches = json.loads(verdict[1:])
            self._furthest = (boundaries, batches)
        self._outcome.set()

    def fail(self, error: BaseException) -> None:
        """Make the trainer's next point raise."""
        with self._lock:
            self._failure = self._failure or error
        self._outcome.set()

    def _decide(self, deadline: Deadline) -> None:
        keys = [self._key("ballot", rank) for rank in range(self._world_size)]
        if self._store.check(keys):
            ballots = [json.loads(bytes(self._store.get(key))) for key in keys]
            furthest = max((boundaries, batches) for boundaries, batches in ballots)
            self._store.set(self._key("verdict"), b"+" + _encode(furthest))
        elif deadline.left_s() <= 0:
            missing = tuple(r for r, key in enumerate(keys) if not self._store.check([key]))
            error = self._silent(missing, "they are dead, hung or cut off")
            self._store.set(self._key("verdict"), b"-" + json.dumps(encode_error(error)).encode())

    def _key(self, kind: str, rank: int | None = None) -> str:
        return f"{self._prefix}/{kind}" + ("" if rank is None else f"/{rank}")

    def _store_lost(self, error: Exception) -> DcpResumeError:
        return self._silent((0,), f"the store of the process group is gone ({error})")

    def _silent(self, ranks: tuple[int, ...], why: str) -> RankSilent:
        return RankSilent(
            f"after step {self._step}: rank(s) {', '.join(map(str, ranks))} did not say how far "
            f"they are, so the ranks cannot stop at one step: {why}. Start the job again; it "
            f"resumes from the newest checkpoint",
            step=self._step,
            ranks=ranks,
            phase="stop",
        )


def _encode(point: Point) -> bytes:
    return json.dumps(point).encode()
