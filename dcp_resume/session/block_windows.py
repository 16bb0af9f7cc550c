"""Data files as they lie: windows of whole digest blocks, each of which is proved alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from dcp_resume.errors import Problem
from dcp_resume.session.opening import OpenedCheckpoint

__all__ = ["BlockWindow", "cut_file", "wrong_blocks"]


@dataclass(frozen=True, slots=True)
class BlockWindow:
    """Some consecutive blocks of one file."""

    file: int
    first: int
    """Number of the first block in the file."""
    start: int
    """Where it begins, bytes."""
    stops: tuple[int, ...]
    """Where each block ends."""

    @property
    def stop(self) -> int:
        """Where the last block ends."""
        return self.stops[-1]


def cut_file(opened: OpenedCheckpoint, file: int, read_bytes: int) -> Iterator[BlockWindow]:
    """Cut a file into windows of up to ``read_bytes``, or of one block that is larger."""
    bounds: list[int] = opened.block_bounds(file).tolist()
    first = 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= read_bytes:
            last += 1
        yield BlockWindow(file, first, bounds[first], tuple(bounds[first + 1 : last + 1]))
        first = last


def wrong_blocks(
    opened: OpenedCheckpoint, window: BlockWindow, data: memoryview
) -> Iterator[Problem]:
    """The blocks of a window whose bytes do not have their digests.

    Args:
        opened: The documents, which have the digests.
        window: Which blocks.
        data: Its bytes.
    """
    ends = (window.start, *window.stops)
    for block, (start, stop) in enumerate(pairwise(ends), window.first):
        part = data[start - window.start : stop - window.start]
        found, expected = opened.block_digests(window.file, block, part)
        if found != expected:
            names = ", ".join(opened.chunks_in_block(window.file, block)) or "the file's header"
            message = (
                f"block {block} (bytes {start} to {stop}) does not have its digest; holds {names}"
            )
            yield Problem(opened.file_key(window.file), "digest", message)
