"""System calls of this process that fail or drag on request, by strace: a disk as bad as need be.

with failing_syscalls("fsync", "EIO"):
    ...  # every fsync of every thread of this process fails
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["failing_syscalls", "slow_syscalls"]

_ATTACH_S = 60.0


def failing_syscalls(
    names: str, error: str, *, path: Path | None = None
) -> contextlib.AbstractContextManager[None]:
    """Let system calls of all threads of this process fail.

    Args:
        names: As strace takes them, separated by commas.
        error: Name of the error number.
        path: Only those on this file or directory, which must exist.
    """
    return _injected(names, f"error={error}", path)


def slow_syscalls(names: str, delay_s: float) -> contextlib.AbstractContextManager[None]:
    """Let each system call of these names take longer, in all threads of this process."""
    return _injected(names, f"delay_exit={round(delay_s * 1e6)}", None)


@contextlib.contextmanager
def _injected(names: str, effect: str, path: Path | None) -> Iterator[None]:
    program = shutil.which("strace")
    if program is None:
        pytest.skip("NOT TESTED: a failing disk needs strace")
    inject = ["-e", f"trace={names}", "-e", f"inject={names}:{effect}"]
    where = ["-P", str(path)] if path else []
    command = [program, "-f", "-qq", "-o", os.devnull, *where, *inject, "-p", str(os.getpid())]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        end_s = time.monotonic() + _ATTACH_S
        while not _is_traced():
            if tracer.poll() is not None or time.monotonic() > end_s:
                pytest.skip(f"NOT TESTED: strace may not attach here (status {tracer.poll()})")
            time.sleep(0.005)
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


def _is_traced() -> bool:
    """Whether every thread of this process has a tracer."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it ended
            if "\nTracerPid:\t0\n" in (task / "status").read_text():
                return False
    return True
