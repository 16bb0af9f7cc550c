"""From a URL to a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dcp_resume.errors import ConfigurationError
from dcp_resume.storage.object_store import ObjectStore
from dcp_resume.storage.retry import RetryPolicy

__all__ = ["open_store"]


def open_store(
    url: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
) -> ObjectStore:
    """Open the store under a URL; nothing is read or written yet.

    Args:
        url: A path, ``file:///path``, ``s3://bucket/prefix``, or any other URL that fsspec knows.
        storage_options: Options of s3fs or of another fsspec package, such as ``endpoint_url``.
        retry: For transient faults; file systems have none.

    Raises:
        ConfigurationError: The URL or an option cannot work, or a package is missing; the message
            names it.

    Example:
        >>> store = open_store("memory://runs/a")
        >>> store.write("step-00000001/x/data", [memoryview(b"abc")])
        3
        >>> store.size("step-00000001/x/data")
        3
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme == "file":
        return _open_directory(url, storage_options)
    _refuse_credentials(scheme, rest)
    options = storage_options or {}
    if scheme in ("s3", "s3a"):
        from dcp_resume.storage.s3_store import S3Store

        bucket, prefix = _split_bucket(url)
        return S3Store(bucket, prefix, storage_options=options, retry=retry)
    from dcp_resume.storage.fsspec_store import FsspecStore

    return FsspecStore(url, storage_options=options, retry=retry)


def _refuse_credentials(scheme: str, rest: str) -> None:
    """Refuse a URL that may hold a secret, and show none of it: URLs are logged and recorded."""
    host = rest.partition("/")[0]
    # A secret may hold a slash, so that its end is no longer in the host.
    is_login = "@" in host or (":" in host and "@" in rest)
    if is_login or "?" in rest or "#" in rest:
        raise ConfigurationError(
            f"invalid store URL, which begins with {scheme}:// and is not shown; expected no "
            "credentials and no query in it. Give them in storage_options or in the environment.",
            option="url",
        )


def _split_bucket(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    if not parts.netloc:
        raise ConfigurationError(
            f"invalid store URL {url!r}; expected s3://bucket or s3://bucket/prefix. Correct it.",
            option="url",
        )
    return parts.netloc, parts.path.strip("/")


def _open_directory(url: str, storage_options: Mapping[str, Any] | None) -> ObjectStore:
    from dcp_resume.storage.posix_store import PosixStore

    if storage_options:
        raise ConfigurationError(
            f"invalid storage_options {sorted(storage_options)} for the directory {url!r}; "
            "expected none. Remove them.",
            option="storage_options",
        )
    path = url
    if url.startswith("file://"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigurationError(
                f"invalid URL {url!r}; expected file:///absolute/path. Correct it.", option="url"
            )
        path = unquote(parts.path)
    if not path:
        raise ConfigurationError("invalid URL ''; expected a path or a URL.", option="url")
    return PosixStore(Path(path))
