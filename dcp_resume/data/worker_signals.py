"""Data workers outlive the signals that tell a job to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable

__all__ = ["ignore_notices", "start_worker"]

_NOTICES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore_notices(worker_id: int) -> None:
    """Ignore the signals that launchers send, in a data worker: its trainer decides when it ends.

    torchrun and Slurm signal every process of a rank. A worker would die of that, and with it the
    trainer, instead of saving. ``ResumableLoader`` does it by itself; for another one pass it as
    ``DataLoader(…, worker_init_fn=ignore_notices)``.

    Args:
        worker_id: As ``DataLoader`` counts them; any.
    """
    del worker_id
    for number in _NOTICES:
        signal.signal(number, signal.SIG_IGN)


def start_worker(worker_init_fn: Callable[[int], object] | None, worker_id: int) -> None:
    """Ignore notices, then do what the user wants done in a new worker."""
    ignore_notices(worker_id)
    if worker_init_fn is not None:
        worker_init_fn(worker_id)
