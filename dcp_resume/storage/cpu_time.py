"""CPU seconds of the threads that move a store's bytes, apart from those of the trainer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

__all__ = ["moving_cpu_s"]

_MOVERS = ("dcp-resume-http", "fsspecIO", "asyncio_")
"""How threads are called that work for a call of the store. They outlive the call."""


def moving_cpu_s() -> float:
    """Of this thread and of all that send and receive, since each began; for differences.

    Only Linux tells of other threads than this one.
    """
    own = threading.get_native_id()
    others = {t.native_id for t in threading.enumerate() if t.name.startswith(_MOVERS)}
    return time.thread_time() + sum(_cpu_s(other) for other in others if other != own)


def _cpu_s(native_id: int | None) -> float:
    try:
        spent = Path(f"/proc/self/task/{native_id}/schedstat").read_text()
    except OSError:  # it ended just now
        return 0.0
    return int(spent.split()[0]) / 1e9
