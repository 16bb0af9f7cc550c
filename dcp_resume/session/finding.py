"""Find a checkpoint without a trainer: in a run's log, or in a directory copied without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from dcp_resume.errors import CheckpointNotFound, InvalidDocument, KeyNotFound, ShortRead
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.keys import MANIFEST_NAME
from dcp_resume.manifest.signing import ANYONE, Signing, Trust
from dcp_resume.manifest.wire import MAX_MANIFEST_BYTES, decode_manifest
from dcp_resume.session.load import Located
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import ObjectStore

__all__ = ["Request", "find_checkpoints"]

Request = int | Literal["latest", "best", "all"]


def find_checkpoints(
    store: ObjectStore,
    request: Request,
    trust: Trust = ANYONE,
) -> list[Located]:
    """The checkpoints that answer a request: one, or with ``all`` every one that was not retired.

    A step that is quarantined answers only where no other checkpoint of that step does.

    Raises:
        CheckpointNotFound: None answers, or there is neither a log nor a manifest.
        InvalidCheckpoint: The log, or a directory's manifest, is malformed, or not signed by whom
            the policy trusts.
        StorageError: The store failed.
    """
    history = RunLog(store, signing=Signing(trust=trust)).refresh()
    if not history.last_seq:
        return [_alone(store, request, trust)]
    finders: dict[Request, Callable[[RunHistory], CommitEntry | None]] = {
        "latest": RunHistory.newest,
        "best": RunHistory.best,
    }
    if request == "all":
        entries = [CommitEntry(*item) for item in sorted(history.live_commits().items())]
    elif isinstance(request, int):
        usable = history.find_step(request, is_any_line=True)
        entries = [usable] if usable else _quarantined(history, request)
    else:
        entries = [e for e in (finders[request](history),) if e]
    if not entries:
        steps = sorted({record.step for record in history.live_commits().values()})
        raise CheckpointNotFound(
            f"{store.url} has no usable checkpoint for {request!r}; it has steps {steps}",
            url=store.url,
            request=str(request),
        )
    return [Located.of(entry) for entry in entries]


def _quarantined(history: RunHistory, step: int) -> list[CommitEntry]:
    """The youngest damaged checkpoint of a step: to be looked at, since its files are kept."""
    live = sorted(history.live_commits().items(), reverse=True)
    return [CommitEntry(seq, record) for seq, record in live if record.step == step][:1]


def _alone(store: ObjectStore, request: Request, trust: Trust) -> Located:
    """The one checkpoint of a directory that has a manifest and no log."""
    try:
        data = store.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    except KeyNotFound as error:
        raise CheckpointNotFound(
            f"{store.url} is no run and no checkpoint: it has neither log records nor a "
            f"{MANIFEST_NAME}. Check the path",
            url=store.url,
            request=str(request),
        ) from error
    except ShortRead as error:
        raise InvalidDocument(f"{MANIFEST_NAME} is too large: {error}", problems=()) from error
    trust.check(data, MANIFEST_NAME, MANIFEST_NAME)
    if isinstance(request, int):
        step = decode_manifest(data, MANIFEST_NAME).step
        if step != request:
            raise CheckpointNotFound(
                f"{store.url} holds step {step} alone, not {request}",
                url=store.url,
                request=str(request),
            )
    return Located(0, "", None)
