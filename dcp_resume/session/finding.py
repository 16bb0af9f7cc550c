"""Find a checkpoint without a trainer: in a run's log, or in a directory copied without one."""

from __future__ import annotations

from dcp_resume.errors import CheckpointNotFound, InvalidDocument, KeyNotFound, ShortRead
from dcp_resume.manifest.keys import MANIFEST_NAME
from dcp_resume.manifest.signing import ANYONE, Signing, Trust
from dcp_resume.manifest.wire import MAX_MANIFEST_BYTES, decode_manifest
from dcp_resume.session.located import Located
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.selecting import Request, select_commits
from dcp_resume.storage import ObjectStore

__all__ = ["find_checkpoints"]


def find_checkpoints(
    store: ObjectStore,
    request: Request,
    trust: Trust = ANYONE,
) -> list[Located]:
    """The checkpoints that answer a request; see ``select_commits``.

    Raises:
        CheckpointNotFound: None answers, or there is neither a log nor a manifest.
        InvalidCheckpoint: The log, or a directory's manifest, is malformed, or not signed by whom
            the policy trusts.
        StorageError: The store failed.
    """
    history = RunLog(store, signing=Signing(trust=trust)).refresh()
    if not history.last_seq:
        return [_alone(store, request, trust)]
    return [Located.of(entry) for entry in select_commits(history, request, store.url)]


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
    if request not in ("latest", "best", "all"):
        step = decode_manifest(data, MANIFEST_NAME).step
        if step != request:
            raise CheckpointNotFound(
                f"{store.url} holds step {step} alone, not {request!r}",
                url=store.url,
                request=str(request),
            )
    return Located(0, "", None)
