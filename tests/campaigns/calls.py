"""Every call that the library makes, also into C: between any two of them a process may be hit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["ignore_calls", "watch_calls"]


def watch_calls(see: Callable[[str, int], None]) -> None:
    """Tell ``see`` of each call that a file of the library makes: the file, and the line.

    In this thread, and in those that start from now on.
    """

    def look(frame: FrameType, event: str, argument: object) -> None:
        del argument
        if event not in ("call", "c_call"):
            return
        _, is_ours, file = frame.f_code.co_filename.rpartition("/dcp_resume/")
        if is_ours:
            see(file, frame.f_lineno)

    threading.setprofile(look)
    sys.setprofile(look)


def ignore_calls() -> None:
    """Watch no longer, in this thread and those that start from now on."""
    threading.setprofile(None)
    sys.setprofile(None)
