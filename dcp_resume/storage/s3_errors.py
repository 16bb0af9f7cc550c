"""What an S3 answer means: by error code and HTTP status, never by the class of the exception.

s3fs maps one and the same refusal to different classes for different servers.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcp_resume.errors import KeyExists, KeyNotFound, StorageDenied, StorageError, StorageFull
from dcp_resume.storage.fsspec_bridge import (
    is_misconfiguration,
    is_missing_credentials,
    is_no_answer,
    was_never_sent,
)
from dcp_resume.storage.retry import Operation, TransientFault

__all__ = ["Refusal", "refusal_in", "refused", "translate"]

_DENIED = frozenset(
    {
        *("401", "403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden"),
        *("InvalidAccessKeyId", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "Unauthorized"),
        *("ExpiredToken", "InvalidToken", "RequestExpired", "TokenRefreshRequired"),
    }
)
_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_EXISTS = frozenset({"412", "PreconditionFailed"})
_FULL = frozenset({"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
_NOT_APPLIED = frozenset(
    {
        *("409", "ConditionalRequestConflict", "OperationAborted"),
        *("429", "RequestThrottled", "Throttling", "ThrottlingException", "TooManyRequests"),
        *("503", "ServiceUnavailable", "SlowDown", "RequestTimeout", "IncompleteBody"),
        *("BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"),
    }
)
"""Transient, and the server says that it did nothing."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error that the server answered with."""

    code: str
    status: int
    message: str

    def __str__(self) -> str:
        return f"{self.code} ({self.message})" if self.message else self.code


def refusal_in(error: BaseException | None) -> Refusal | None:
    """Find the server's answer in an exception or its causes; None if there was none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            fields = response["Error"]
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            message = str(fields.get("Message") or "")  # None where Ceph leaves it out
            return Refusal(str(fields.get("Code", "")), status, message)
        error = error.__cause__
    return None


def translate(error: Exception, operation: Operation) -> Exception:
    """Turn whatever a raw call raised into a ``StorageError`` or a ``TransientFault``.

    A fault of neither kind is a bug, and comes back as it is.
    """
    refusal = refusal_in(error)
    if refusal is not None:
        return refused(refusal, operation)
    if is_no_answer(error):
        reason = f"{type(error).__name__}: {error}"
        return TransientFault(reason, ambiguous=not was_never_sent(error))
    what = f"cannot {operation.name} {operation.key!r} at {operation.url}"
    facts = {"url": operation.url, "key": operation.key}
    if is_missing_credentials(error):
        return StorageDenied(
            f"{what}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a"
            " role, or give storage_options",
            **facts,
        )
    if is_misconfiguration(error) or isinstance(error, OSError):
        return StorageError(
            f"{what}: {error}. Check the endpoint, the region and storage_options", **facts
        )
    return error


def refused(refusal: Refusal, operation: Operation) -> StorageError | TransientFault:
    """Translate an error that the server answered with."""
    codes = {refusal.code, str(refusal.status)}
    what = f"cannot {operation.name} {operation.key!r} at {operation.url}: {refusal}"
    facts = {"url": operation.url, "key": operation.key}
    if refusal.code == "NoSuchBucket":
        return StorageError(f"{what}. Create the bucket, or correct the URL", **facts)
    if codes & _FULL:  # before the rights: Ceph answers 403 with its quota
        return StorageFull(f"{what}. Free space or raise the quota", **facts)
    if codes & _DENIED:
        return StorageDenied(
            f"{what}. Check the credentials, their expiry, the policy and this machine's clock",
            **facts,
        )
    if codes & _EXISTS:
        return KeyExists(f"{what}. The key is taken, maybe by an earlier try", **facts)
    if codes & _NOT_APPLIED:
        # Were the request sent twice below us (as aiohttp does by itself after a reset, unless told
        # not to; proxies too), the refusal would answer the second, and the first may have worked.
        return TransientFault(str(refusal), ambiguous=operation.exclusive)
    if refusal.status >= 500 or refusal.code in ("500", "InternalError"):
        return TransientFault(str(refusal), ambiguous=True)
    if refusal.code in _ABSENT:
        return KeyNotFound(what, **facts)
    return StorageError(f"{what}. The server does not accept this request", **facts)
