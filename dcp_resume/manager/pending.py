"""What ``save`` returns: a save that may still be running."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait

from dcp_resume.errors import SaveInProgress
from dcp_resume.session.copies import Copies
from dcp_resume.session.save import SaveResult
from dcp_resume.session.votes import Votes

__all__ = ["PendingSave", "refuse_if_busy"]


class PendingSave:
    """One save, from staged to committed.

    The trainer may change its tensors as soon as ``save`` returned: they are staged by then. In
    ``SaveMode.LAZY`` only optimizers may; before any other change call ``wait_until_staged``.
    """

    def __init__(self, step: int, future: Future[SaveResult], copies: Copies) -> None:
        self.step = step
        self.started = time.monotonic()
        self._future = future
        self._copies = copies
        self._seen = threading.Event()

    @property
    def is_staged(self) -> bool:
        """Whether the trainer may change every tensor on this rank."""
        return self._copies.are_done

    def wait_until_staged(self) -> None:
        """Copy what is left to copy, and return when the trainer may change every tensor."""
        self._copies.drain()

    @property
    def is_done(self) -> bool:
        """Whether the outcome is known, good or bad."""
        return self._future.done()

    @property
    def is_committed(self) -> bool:
        """Whether the checkpoint counts: durable on every rank, and in the log."""
        return self._future.done() and self._future.exception() is None

    def result(self, timeout_s: float | None = None) -> SaveResult:
        """Wait for the outcome.

        Raises:
            TimeoutError: Still running after ``timeout_s``.
            SaveError: The save did not commit; the subclass says why.
            Fenced: A newer incarnation owns the run.
            StorageError: The store failed on the coordinator.
        """
        self.wait(timeout_s)
        self._seen.set()
        return self._future.result()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the outcome is known, and say nothing of it.

        Raises:
            TimeoutError: Still running after ``timeout_s``.
        """
        if not wait([self._future], timeout_s).done:
            raise TimeoutError(f"save of step {self.step} is still running after {timeout_s} s")

    def raise_unseen(self) -> None:
        """Raise the save's error, unless ``result`` already did.

        Raises:
            SaveError: As ``result``.
        """
        if self._future.done() and not self._seen.is_set():
            self.result()


def refuse_if_busy(votes: Votes, step: int, pending: PendingSave) -> None:
    """Refuse a save on every rank while one is running on any.

    Ranks learn of an outcome one after the other, so they decide together.

    Raises:
        SaveInProgress: It is running somewhere.
    """

    def decide(ballots: Sequence[bytes]) -> list[bytes]:
        if b"busy" in ballots:
            raise SaveInProgress(
                f"cannot save step {step}: step {pending.step} is still being written; save "
                f"less often, or set when_busy=WhenBusy.WAIT",
                step=step,
                running_step=pending.step,
            )
        return [b""] * len(ballots)

    votes.round("busy", lambda: b"" if pending.is_done else b"busy", decide)
