"""The records of a run's log. Each is created if absent at the next number, and never changed.

A ``commit`` record is THE COMMIT of a checkpoint: nothing else makes an attempt count.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from dcp_resume.manifest.models import (
    Count,
    Document,
    DocumentRef,
    FormatMark,
    Seconds,
    TrainerFacts,
)

__all__ = [
    "CommitRecord",
    "DropRecord",
    "LogRecord",
    "OpenRecord",
    "PinRecord",
    "QuarantineRecord",
    "RetireRecord",
    "SaveTimes",
    "TagRecord",
    "UnpinRecord",
    "UnquarantineRecord",
    "UntagRecord",
    "is_tag_name",
    "log_record_adapter",
]


_TAG_NAME = r"^[a-z][a-z0-9._-]{0,63}$"
_SELECTORS = frozenset({"latest", "best", "all"})


def is_tag_name(name: str) -> bool:
    """Whether a tag may have this name: it must not read as a step or as a selector.

    >>> [is_tag_name(name) for name in ("before-lr-drop", "latest", "400")]
    [True, False, False]
    """
    return re.match(_TAG_NAME, name) is not None and name not in _SELECTORS


class Record(Document):
    """What every record says."""

    format: FormatMark = FormatMark()
    run: str
    """UUID of the run, made with its first record."""
    created: str
    """RFC 3339, UTC."""


class OpenRecord(Record):
    """An incarnation of the run takes over, and chooses what it resumes from: one append."""

    kind: Literal["open"] = "open"
    generation: Annotated[int, Field(ge=1)]
    """One more than the highest generation before it."""
    resume_source: Count | None
    """Log number of the commit to resume from; null to begin anew."""
    incarnation: str
    """Random id, so that a writer whose answer was lost recognises its own record."""


class SaveTimes(Document):
    """When a save got how far: seconds from the coordinator's call of ``save``."""

    staged_s: Seconds
    """Every rank had collected its state: copied it, unless the save is a blocking one."""
    written_s: Seconds
    """Every rank had written its files."""
    durable_s: Seconds
    """The coordinator saw every file at its size."""
    committed_s: Seconds
    """The commit record was made; its append is the commit."""
    blocked_s: Seconds
    """Trainers stood still for so long: until ``staged_s``, of a blocking save the commit."""


class CommitRecord(Record):
    """An attempt becomes a checkpoint."""

    kind: Literal["commit"] = "commit"
    generation: Annotated[int, Field(ge=1)]
    step: Count
    attempt: str
    manifest: DocumentRef
    """Relative to the run's root."""
    parent: Count | None
    """Log number of the newest commit at planning."""
    references: tuple[Count, ...] = Field(default=(), strict=False)
    """Log numbers of the commits whose files this checkpoint refers to."""
    num_bytes: Count
    trainer: TrainerFacts
    times: SaveTimes | None = None
    """Null where they were not measured; for people."""


class RetireRecord(Record):
    """A checkpoint no longer counts; its files may be swept after this record."""

    kind: Literal["retire"] = "retire"
    target: Count
    reason: str = ""


class PinRecord(Record):
    """A checkpoint is kept whatever the retention policy says."""

    kind: Literal["pin"] = "pin"
    target: Count
    label: str = ""


class UnpinRecord(Record):
    """A pin is lifted."""

    kind: Literal["unpin"] = "unpin"
    target: Count


class QuarantineRecord(Record):
    """A checkpoint was found damaged: it is not resumed from, and not deleted."""

    kind: Literal["quarantine"] = "quarantine"
    target: Count
    reason: str = ""


class UnquarantineRecord(Record):
    """A quarantine is lifted: the checkpoint counts again."""

    kind: Literal["unquarantine"] = "unquarantine"
    target: Count


class TagRecord(Record):
    """A checkpoint gets a name; a name that is in use moves to it."""

    kind: Literal["tag"] = "tag"
    target: Count
    name: Annotated[str, Field(pattern=_TAG_NAME)]


class UntagRecord(Record):
    """A name means no checkpoint any more."""

    kind: Literal["untag"] = "untag"
    name: Annotated[str, Field(pattern=_TAG_NAME)]


class DropRecord(Record):
    """Attempts that never committed are given up: they never will, and may be swept."""

    kind: Literal["drop"] = "drop"
    attempts: tuple[str, ...] = Field(strict=False)


LogRecord = Annotated[
    OpenRecord
    | CommitRecord
    | RetireRecord
    | PinRecord
    | UnpinRecord
    | QuarantineRecord
    | UnquarantineRecord
    | TagRecord
    | UntagRecord
    | DropRecord,
    Field(discriminator="kind"),
]

log_record_adapter: TypeAdapter[Any] = TypeAdapter(LogRecord)
