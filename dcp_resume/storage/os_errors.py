"""From errno to this library's errors."""

from __future__ import annotations

import errno

from dcp_resume.errors import (
    KeyExists,
    KeyNotFound,
    ShortRead,
    StorageDenied,
    StorageError,
    StorageFull,
)

__all__ = ["AMBIGUOUS", "from_os_error", "short_read"]

AMBIGUOUS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN})
"""What a remote file system says where it gave up waiting: the server may have done it."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})


def from_os_error(error: OSError, *, action: str, url: str, key: str) -> StorageError:
    """Translate what the operating system, or a backend in its terms, said.

    Args:
        error: The original.
        action: Verb in the infinitive, for the message.
        url: Root of the store.
        key: Key that the action was about; may be empty.
    """
    what = f"cannot {action} {key!r} at {url}: {error.strerror or error}"
    if error.errno in _FULL:
        return StorageFull(f"{what}. Free space or raise the quota", url=url, key=key)
    if error.errno in _DENIED or isinstance(error, PermissionError):
        return StorageDenied(f"{what}. Check owner, mode and mount options", url=url, key=key)
    if error.errno in _ABSENT or isinstance(error, FileNotFoundError):
        return KeyNotFound(what, url=url, key=key)
    if error.errno == errno.EEXIST or isinstance(error, FileExistsError):
        return KeyExists(f"{what}. The key is taken", url=url, key=key)
    return StorageError(what, url=url, key=key)


def short_read(
    *, url: str, key: str, expected_bytes: int, found_bytes: int, where: str
) -> ShortRead:
    """Build the error for a read that cannot give what was asked for."""
    return ShortRead(
        f"cannot read {key!r} at {url}: {where}; expected {expected_bytes} bytes, found"
        f" {found_bytes}. The object is not the one that was recorded",
        url=url,
        key=key,
        expected_bytes=expected_bytes,
        found_bytes=found_bytes,
    )
