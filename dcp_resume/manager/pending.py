"""What ``save`` returns: a save that may still be running."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

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
        try:
            result = self._future.result(timeout_s)
        except FutureTimeoutError:
            if not self._future.done():
                raise TimeoutError(
                    f"save of step {self.step} is still running after {timeout_s} s"
                ) from None
            self._seen.set()
            raise
        except BaseException:
            self._seen.set()
            raise
        return result

    def raise_unseen(self) -> None:
        """Raise the save's error, unless ``result`` already did.

        Raises:
            SaveError: As ``result``.
        """
        if self._future.done() and not self._seen.is_set():
            self.result()
