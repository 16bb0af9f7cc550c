"""Who says that this process will be stopped: signals, a clock, the launcher, the user's code."""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dcp_resume.errors import ConfigurationError
from dcp_resume.events import NoticeSourceFailed, emit

__all__ = ["Clock", "Launcher", "Notice", "NoticePoller", "NoticeSource", "SignalListener"]

ORPHAN_GRACE_S = 30.0
"""What processes whose launcher died are given to end by themselves; as torchrun gives them."""


@dataclass(frozen=True, slots=True)
class Notice:
    """The platform will stop us."""

    reason: str
    grace_s: float = 30.0
    """Seconds from now until it does; infinite if nothing but we ourselves stops us."""


NoticeSource = Callable[[], "Notice | None"]
"""Asked again and again, in a thread of its own; None as long as there is no notice."""


class SignalListener:
    """Hears signals at once, even while the main thread is inside a collective or a kernel.

    Python runs a signal's handler when the main thread comes back to Python code. Before that its C
    part writes the signal's number to a pipe, where another thread reads it. The handler itself
    does nothing but remember, and give way to a second Ctrl-C.

    Args:
        graces: Signal → seconds from it until the process is killed.
    """

    def __init__(self, graces: Mapping[signal.Signals, float]) -> None:
        self._graces = graces
        self._handled: set[int] = set()  # the handler's; it may run long after the signal
        self._told: set[int] = set()
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._read_fd, self._write_fd = -1, -1

    def start(self) -> None:
        """Install the handlers.

        Raises:
            ConfigurationError: Not in the main thread, or the process handles a signal outside of
                Python.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError(
                "signals can be heard from the main thread only; enter Preemption there, or set "
                "signals={}",
                option="signals",
            )
        foreign = [number.name for number in self._graces if signal.getsignal(number) is None]
        if foreign:
            raise ConfigurationError(
                f"{foreign} are handled outside of Python and could not be restored; leave them "
                f"out of signals",
                option="signals",
            )
        self._read_fd, self._write_fd = os.pipe()
        for fd in (self._read_fd, self._write_fd):
            os.set_blocking(fd, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        if self._previous_fd != -1:  # an event loop's, which needs it more than we do
            signal.set_wakeup_fd(self._previous_fd)
        self._previous = {n: signal.signal(n, self._handle) for n in self._graces}
        _listening.add(self)

    def stop(self, *, keep: Collection[signal.Signals] = ()) -> None:
        """Restore the handlers that were there before, but those of ``keep``, which do nothing."""
        _listening.discard(self)
        self._restore(keep)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def wait(self, timeout_s: float) -> None:
        """Wait for a signal, or for ``wake``."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._read_fd, selectors.EVENT_READ)
            selector.select(timeout_s)

    def wake(self) -> None:
        """End a ``wait``."""
        os.write(self._write_fd, b"\0")

    def heard(self) -> Iterator[Notice]:
        """Each signal that came since the last call, the first time it came."""
        caught = set(self._handled)
        with contextlib.suppress(BlockingIOError):  # the pipe is empty
            caught.update(os.read(self._read_fd, 4096))
        for number, grace_s in self._graces.items():
            if number in caught and number not in self._told:
                self._told.add(number)
                yield Notice(number.name, grace_s)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # It may run at any line of the main thread: no locks, no I/O.
        del frame
        if number == signal.SIGINT and number in self._handled:
            raise KeyboardInterrupt
        self._handled.add(number)

    def _restore(self, keep: Collection[signal.Signals] = ()) -> None:
        for number, handler in self._previous.items():
            if number not in keep and signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        if self._previous_fd == -1:
            signal.set_wakeup_fd(-1)


_listening: weakref.WeakSet[SignalListener] = weakref.WeakSet()


def _restore_in_child() -> None:
    """A forked child (a data worker, say) would swallow its SIGTERM, and write into our pipe."""
    for listener in list(_listening):
        listener._restore()
    _listening.clear()


os.register_at_fork(after_in_child=_restore_in_child)


class Clock:
    """Ends of the wall clock: one that we chose, and one that the platform will enforce.

    Args:
        exit_after_s: Seconds from now.
        end_time: Unix time at which the platform stops us.
        lead_s: The notice comes this long before ``end_time``.
    """

    def __init__(self, *, exit_after_s: float, end_time: float, lead_s: float) -> None:
        self._exit_at = time.monotonic() + exit_after_s
        self._exit_after_s = exit_after_s
        self._end_time = end_time
        self._lead_s = lead_s

    def __call__(self) -> Notice | None:
        """The end that has come."""
        left_s = self._end_time - time.time()
        if left_s <= self._lead_s:
            return Notice(f"the allocation ends in {left_s:.0f} s", max(left_s, 0.0))
        if time.monotonic() >= self._exit_at:
            return Notice(f"exit_after_s={self._exit_after_s:g} is over", math.inf)
        return None


class Launcher:
    """The parent process: when torchrun is killed, nobody ends its workers any more."""

    def __init__(self) -> None:
        # Other parents may go: a shell leaves what nohup or setsid started in it.
        self._pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @property
    def is_gone(self) -> bool:
        """Whether it has died."""
        return self._pid is not None and os.getppid() != self._pid

    def __call__(self) -> Notice | None:
        """Its end."""
        if self.is_gone:
            return Notice("torchrun is gone", ORPHAN_GRACE_S)
        return None


class NoticePoller:
    """Asks the user's functions, in a thread, for each may take long.

    Args:
        sources: The functions.
        interval_s: Seconds between two rounds.
        tell: Called with each notice, from that thread.
    """

    def __init__(
        self, sources: Sequence[NoticeSource], interval_s: float, tell: Callable[[Notice], object]
    ) -> None:
        self._sources = list(sources)
        self._interval_s = interval_s
        self._tell = tell
        self._is_over = threading.Event()

    def start(self) -> None:
        """Begin, if there is anyone to ask."""
        if self._sources:
            threading.Thread(target=self._ask, name="dcp-resume-notices", daemon=True).start()

    def stop(self) -> None:
        """Ask no more; a function that is being asked is not waited for."""
        self._is_over.set()

    def _ask(self) -> None:
        while not self._is_over.is_set():
            for source in list(self._sources):
                try:
                    notice = source()
                except Exception as error:
                    emit(NoticeSourceFailed(source=repr(source), reason=repr(error)))
                    continue
                if notice is not None:
                    self._sources.remove(source)
                    self._tell(notice)
            self._is_over.wait(self._interval_s)
