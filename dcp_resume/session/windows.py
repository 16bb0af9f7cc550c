"""Boxes of a checkpoint that go by in windows of bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.pieces import cut_box
from dcp_resume.session.targets import Target

__all__ = ["StoredBox", "Window", "check_window", "cut_windows"]

MIN_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredBox:
    """A box of a stored tensor."""

    fqn: str
    box: Box
    itemsize: int
    """Bytes of an element."""


@dataclass(slots=True)
class Window:
    """Pieces of boxes that fill the memory one behind the other, once they are read."""

    targets: list[Target] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """Per target the position of its box among those asked for."""
    num_bytes: int = 0

    def moved_to(self, memory: memoryview) -> Window:
        """The same window, to be read into other memory of the same size."""
        moved = Window(numbers=self.numbers, num_bytes=self.num_bytes)
        start = 0
        for target in self.targets:
            stop = start + len(target.memory)
            moved.targets.append(replace(target, memory=memory[start:stop]))
            start = stop
        return moved


def check_window(window_bytes: int) -> None:
    """Refuse a window that a request would hardly pay for.

    Raises:
        ConfigurationError: It is too small.
    """
    if window_bytes < MIN_WINDOW_BYTES:
        raise ConfigurationError(
            f"the window must have at least {MIN_WINDOW_BYTES} bytes, got {window_bytes}",
            option="window_bytes",
        )


def cut_windows(wanted: Iterable[StoredBox], memory: memoryview) -> Iterator[Window]:
    """Cut boxes into windows that fit the memory; all use the same one, in turn.

    Bytes come in the order of the boxes, row-major in each.

    Args:
        wanted: Boxes; empty ones are passed over.
        memory: Holds at least one element.
    """
    window = Window()
    for number, stored in enumerate(wanted):
        for box in cut_box(stored.box, len(memory) // stored.itemsize):
            length = box.volume * stored.itemsize
            if window.num_bytes + length > len(memory):
                yield window
                window = Window()
            start = window.num_bytes
            if length:
                place = memory[start : start + length]
                window.targets.append(Target(stored.fqn, box, place, None, None))
                window.numbers.append(number)
                window.num_bytes += length
    if window.num_bytes:
        yield window
