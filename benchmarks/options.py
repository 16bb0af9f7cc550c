"""What one run of the command measures, and where."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.payload import SIZES, Size
from tests.support.ranks import RankPool, RanksFailed

__all__ = ["Options", "Trials", "default_directory", "on_ranks"]

TIMEOUT_S = 1800.0
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 6 << 30
"""Of files at once: the raw limit's, and two checkpoints of one library."""


@dataclass(frozen=True)
class Options:
    """Chosen by the command's arguments."""

    sizes: Sequence[str]
    """Payloads of saves and loads."""
    libraries: Sequence[str]
    """Those that are installed."""
    repetitions: int
    """Besides the cold one."""
    directory: Path

    @property
    def is_tiny(self) -> bool:
        """Whether every subject takes the smallest payload: that it works is the question."""
        return tuple(self.sizes) == ("tiny",)

    def size(self, name: str) -> Size:
        """The payload of a subject that has one of its own."""
        return SIZES["tiny" if self.is_tiny else name]

    def label(self, name: str) -> str:
        """What the figures of such a subject are filed under; goals know nothing of tiny ones."""
        return f"{name}, tiny" if self.is_tiny else name

    def among(self, known: Iterable[str]) -> list[str]:
        """The chosen libraries that a subject knows."""
        return [name for name in known if name in self.libraries]

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty directory, deleted afterwards."""
        path = self.directory / name
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)


def default_directory() -> Path:
    """Memory-backed files if they have room: there the limit is the machine, not a disk's mood."""
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ROOM_BYTES:
        return _MEMORY
    return Path(tempfile.gettempdir())


def on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """What rank 0 returned of a call on fresh processes, which take their memory with them."""
    with RankPool() as pool:
        return pool.run(function, ranks, *args, timeout_s=TIMEOUT_S)[0]


@dataclass
class Trials:
    """Calls for one library after the other, of which one may fail without the others."""

    failures: dict[str, str] = field(default_factory=dict)
    """Library → why it was given up."""

    def on_ranks(self, function: Callable[..., Any], ranks: int, library: str, *args: Any) -> Any:
        """As ``on_ranks``; an empty list if it fails, or failed before."""
        if library in self.failures:
            return []
        try:
            return on_ranks(function, ranks, library, *args)
        except RanksFailed as error:
            self.failures[library] = str(error)
            return []
