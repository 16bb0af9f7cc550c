"""Events as lines of JSON in a file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from dcp_resume.events import Event

__all__ = ["JsonLines"]


class JsonLines:
    """A subscriber that appends one line an event: ``time``, ``rank``, ``event``, its fields.

    Each line is one write in append mode, so that processes of a host may share a file. Rotation
    is left to others, by copy and truncate.

        >>> import tempfile; from dcp_resume.events import SaveFailed
        >>> path = tempfile.mktemp()
        >>> with JsonLines(path, rank=3) as log:
        ...     log(SaveFailed(step=40, reason="disk full"))
        >>> sorted(json.loads(open(path).read()))
        ['event', 'rank', 'reason', 'step', 'time']

    Args:
        path: File to append to; made if absent, with its directories.
        rank: Of this process, for events that name none; by default ``RANK`` of the environment.
        now: The time.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        rank: int | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._now = now
        self._lock = threading.Lock()
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file: int | None = os.open(path, flags, 0o644)

    def __call__(self, event: Event) -> None:
        """Append the event; after ``close`` nothing."""
        fields: dict[str, Any] = {
            "time": self._now().isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "rank": self._rank,
            "event": type(event).__name__,
        }
        for field in dataclasses.fields(event):
            value = getattr(event, field.name)
            is_number = not isinstance(value, float) or math.isfinite(value)
            fields[field.name] = value if is_number else str(value)
        line = json.dumps(fields, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"
        with self._lock:
            if self._file is not None:
                os.write(self._file, line.encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _plain(value: object) -> object:
    """What JSON has no word for: a record by its fields, anything else as it shows itself."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return str(value)
