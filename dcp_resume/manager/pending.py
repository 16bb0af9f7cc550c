"""What ``save`` returns: a save that may still be running."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from dcp_resume.session.save import SaveResult

__all__ = ["PendingSave"]


class PendingSave:
    """One save, from staged to committed.

    The trainer may change its tensors as soon as ``save`` returned: they are staged by then.
    """

    def __init__(self, step: int, future: Future[SaveResult]) -> None:
        self.step = step
        self._future = future
        self._seen = threading.Event()

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
