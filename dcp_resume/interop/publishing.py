"""Where an export is written, and how it appears whole.

On a local file system everything is staged beside the target, read back, and renamed to it. An
object store has no rename: there the file that readers look for first is written last, and all is
taken back if it does not read back.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from dcp_resume.errors import ConfigurationError, KeyNotFound
from dcp_resume.interop.foreign import Source
from dcp_resume.interop.opening import split_url
from dcp_resume.manifest.keys import new_attempt_id
from dcp_resume.storage import ObjectStore

__all__ = ["published"]

OpenUrl = Callable[[str], ObjectStore]


@contextmanager
def published(url: str, keys: Sequence[str], open_url: OpenUrl, name: str) -> Iterator[Source]:
    """A place to write to, which is the target once the block has ended without an error.

    Args:
        url: Of the target, where nothing must be yet.
        keys: The files that will be written, in order.
        open_url: Opens the store of a URL.
        name: Of the one file; empty for a directory.

    Raises:
        ConfigurationError: There is something at the target.
        StorageError: The store failed.
    """
    is_local = "://" not in url or url.startswith("file://")
    if is_local:
        path = unquote(urlsplit(url).path) if "://" in url else url
        with _staged(os.path.abspath(path), open_url, name) as source:
            yield source
    else:
        with _in_place(url, keys, open_url, name) as source:
            yield source


@contextmanager
def _staged(path: str, open_url: OpenUrl, name: str) -> Iterator[Source]:
    if os.path.lexists(path) and (name or not os.path.isdir(path) or os.listdir(path)):
        raise _taken(path)
    staging = f"{path}.export-{new_attempt_id()}"
    try:
        yield Source(open_url(staging), name)
        os.rename(os.path.join(staging, name) if name else staging, path)
        _sync(os.path.dirname(path))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _in_place(url: str, keys: Sequence[str], open_url: OpenUrl, name: str) -> Iterator[Source]:
    source = Source(open_url(split_url(url)[0] if name else url), name)
    if _is_taken(source):
        raise _taken(url)
    try:
        yield source
    except BaseException:
        source.store.delete(list(reversed(keys)))
        raise


def _is_taken(source: Source) -> bool:
    if not source.key:
        return next(iter(source.store.list("")), None) is not None
    try:
        source.store.size(source.key)
    except KeyNotFound:
        return False
    return True


def _taken(url: str) -> ConfigurationError:
    return ConfigurationError(
        f"there is something at {url} already, and an export replaces nothing; name another target",
        option="target",
    )
