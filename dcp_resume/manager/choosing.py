"""Which checkpoint answers a request: a step, the newest, the best by a metric, or a tag."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from dcp_resume.errors import (
    CheckpointNotFound,
    ConfigurationError,
    PartialLoad,
)
from dcp_resume.manager.settings import Settings
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.records import is_tag_name
from dcp_resume.session.quarantining import Damage

__all__ = ["Request", "find_commit", "resume_source", "uncovered"]

Request = int | str
"""A step, ``latest``, ``best``, or a tag."""


def find_commit(history: RunHistory, request: Request, settings: Settings, url: str) -> CommitEntry:
    """The commit that answers the request.

    Raises:
        CheckpointNotFound: None does.
        ConfigurationError: It is no request.
    """
    if request == "latest":
        entry = history.newest()
    elif request == "best":
        mode: Literal["min", "max"] = "max" if settings.monitor_mode == "max" else "min"
        entry = history.best(settings.monitor, mode)
    elif isinstance(request, int):
        entry = history.find_step(request, is_any_line=True)
    elif isinstance(request, str) and is_tag_name(request):
        entry = history.find_tag(request)
    else:
        raise ConfigurationError(
            f"step must be an integer, 'latest', 'best' or a tag, got {request!r}", option="step"
        )
    if entry is None:
        steps = [e.record.step for e in history.lineage()]
        tags = f" and tags {sorted(history.tags)}" if history.tags else ""
        raise CheckpointNotFound(
            f"{url} has no usable checkpoint for {request!r}; it has steps {steps[::-1]}{tags}",
            url=url,
            request=str(request),
        )
    return entry


def resume_source(
    history: RunHistory, request: Request, settings: Settings, url: str, failure: Damage | None
) -> int | None:
    """Log number of the commit to resume from; None for a run that has not saved anything yet.

    A run whose every checkpoint was found damaged does not begin anew unasked.

    Args:
        history: The log so far.
        request: What the caller asked.
        settings: Of the manager.
        url: Root of the run, for messages.
        failure: What was wrong with the first checkpoint that this resume tried.

    Raises:
        CheckpointNotFound: None answers the request.
        InvalidCheckpoint: ``failure``, if nothing is left to fall back to.
        PartialLoad: Likewise.
    """
    if request != "latest" or history.newest() is not None:
        return find_commit(history, request, settings, url).seq
    if failure is not None:
        raise failure
    generations = {record.generation for record in history.commits.values()}
    if history.sources.get(history.generation) or history.generation in generations:
        raise CheckpointNotFound(
            f"{url} has checkpoints, and each of them is marked as damaged. Look at them with "
            f"`dcp-resume verify`, and lift what is whole with `dcp-resume unquarantine`; to begin "
            f"anew, choose another root, or save() without resume()",
            url=url,
            request=request,
        )
    return None


def uncovered(fqns: Collection[str], why: str) -> PartialLoad:
    """The error for tensors that a damaged checkpoint changed, and that no older one restores."""
    return PartialLoad(
        f"tensors {sorted(fqns)} were already changed by a damaged checkpoint, and {why}; start "
        f"from fresh objects",
        written_fqns=tuple(sorted(fqns)),
        problems=(),
    )
