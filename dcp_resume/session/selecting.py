"""Which commits of a run answer an operator's request: read from the log alone, without torch."""

from __future__ import annotations

from dcp_resume.errors import CheckpointNotFound
from dcp_resume.manifest.history import CommitEntry, RunHistory

__all__ = ["Request", "select_commits"]

Request = int | str
"""A step, ``latest``, ``best``, ``all``, or a tag."""


def select_commits(history: RunHistory, request: Request, url: str) -> list[CommitEntry]:
    """The commits that answer: one, or with ``all`` every one that was not retired.

    One that is quarantined answers to its step or tag only where no other one does.

    Args:
        history: The log so far.
        request: What was asked.
        url: Root of the run, for the message.

    Raises:
        CheckpointNotFound: None answers.
    """
    live = [CommitEntry(*item) for item in sorted(history.live_commits().items())]
    entries: list[CommitEntry | None]
    if request == "all":
        entries = [*live]
    elif request == "latest":
        entries = [history.newest()]
    elif request == "best":
        entries = [history.best()]
    elif isinstance(request, int):
        of_step = [entry for entry in live if entry.record.step == request]
        usable = history.find_step(request, is_any_line=True)
        entries = [usable] if usable else [*of_step[-1:]]
    else:
        entries = [entry for entry in live if entry.seq == history.tags.get(request)]
    found = [entry for entry in entries if entry is not None]
    if not found:
        steps = sorted({entry.record.step for entry in live})
        tags = f" and tags {sorted(history.tags)}" if history.tags else ""
        raise CheckpointNotFound(
            f"{url} has no usable checkpoint for {request!r}; it has steps {steps}{tags}",
            url=url,
            request=str(request),
        )
    return found
