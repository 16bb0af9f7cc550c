"""Every other scheme that fsspec serves: ``memory://`` for tests, ``gs://``, ``abfs://`` and so on.

Only the generic interface is used, so an object passes through memory whole when it is written.
Whether ``create`` is exclusive depends on the backend; ``check_exclusive_create`` tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

from dcp_resume.errors import ConfigurationError, StorageError
from dcp_resume.storage.fsspec_bridge import FileSystem, PerProcess, open_filesystem
from dcp_resume.storage.keys import check_key, check_prefix, is_key
from dcp_resume.storage.object_store import ObjectInfo, RangeRead, check_size
from dcp_resume.storage.os_errors import from_os_error, short_read
from dcp_resume.storage.retry import Operation, RetryPolicy, TransientFault

__all__ = ["FsspecStore"]

T = TypeVar("T")

_MAX_BATCH_BYTES = 128 << 20
"""Memory that one batch of ranges may take, because fsspec cannot read into ours."""
_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")
_creating = threading.Lock()
"""``memory://`` looks and then writes; in one process this lock makes that one step."""


class FsspecStore:
    """Objects under the path of an fsspec URL.

    Args:
        url: ``scheme://…``, not chained.
        storage_options: Options of the file system.
        retry: Policy for time-outs and lost connections.

    Raises:
        ConfigurationError: Nothing installed serves the scheme, or the URL is chained: a cache in
            front of the store would answer for objects that are gone.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, Any], retry: RetryPolicy) -> None:
        if "::" in url:
            raise ConfigurationError(
                "a storage URL must be scheme://path, without '::' chains", option="url"
            )
        self._url = url.rstrip("/")
        self._opened = PerProcess(lambda: open_filesystem(self._url, storage_options))
        self._opened.get()  # complain of an unknown scheme here
        self._retry = retry
        self._closed = False

    @property
    def url(self) -> str:
        """The root as it was given."""
        return self._url

    @property
    def read_bytes(self) -> int:
        """As of a remote store: what lies behind fsspec is unknown."""
        return 8 * 2**20

    def create(self, key: str, data: bytes) -> None:
        """See ``ObjectStore.create``.

        Raises:
            KeyExists: The key is taken.
            OutcomeUnknown: No answer came before the deadline.
        """

        def attempt(files: FileSystem, path: str) -> None:
            with _creating:
                files.pipe_file(path, bytes(data), mode="create")

        self._run("create", check_key(key), attempt, exclusive=True)

    def write(self, key: str, buffers: Iterable[memoryview], *, size: int | None = None) -> int:
        """See ``ObjectStore.write``.

        Raises:
            ValueError: Another number of bytes than ``size``.
        """
        # One by one, because the memory of one may become that of the next; `join` takes all first.
        content = b"".join(
            buffers if isinstance(buffers, Sequence) else [bytes(buffer) for buffer in buffers]
        )
        check_size(len(content), size)
        self._run("write", check_key(key), lambda files, path: files.pipe_file(path, content))
        return len(content)

    def read(self, key: str, *, max_bytes: int) -> bytes:
        """See ``ObjectStore.read``."""
        size = self.size(key)
        content = b""
        if size <= max_bytes:
            content = self._run("read", key, lambda files, path: files.cat_file(path))
            size = max(size, len(content))
        if size > max_bytes:
            raise short_read(
                url=self._url,
                key=key,
                expected_bytes=max_bytes,
                found_bytes=size,
                where="it is larger than any object of its kind",
            )
        return content

    def read_into(self, key: str, reads: Sequence[RangeRead]) -> None:
        """See ``ObjectStore.read_into``."""
        self._check_open()
        check_key(key)
        batch: list[RangeRead] = []
        for read in reads:
            if sum(len(other.into) for other in batch) + len(read.into) > _MAX_BATCH_BYTES:
                self._read_batch(key, batch)
                batch = []
            if len(read.into):  # many servers answer an empty range with the whole object
                batch.append(read)
        self._read_batch(key, batch)

    def size(self, key: str) -> int:
        """See ``ObjectStore.size``."""

        def attempt(files: FileSystem, path: str) -> int:
            info = files.info(path)
            if info.get("type") == "directory":
                raise FileNotFoundError(f"{path} is a directory, not an object")
            return int(info["size"])

        return self._run("look up", check_key(key), attempt)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """See ``ObjectStore.list``."""
        self._check_open()
        check_prefix(prefix)
        check_prefix(start_after, option="start_after")
        return self._objects(prefix, start_after)

    def delete(self, keys: Iterable[str]) -> None:
        """See ``ObjectStore.delete``."""
        self._check_open()
        first: StorageError | None = None

        def attempt(files: FileSystem, path: str) -> None:
            with suppress(FileNotFoundError):
                files.rm_file(path)

        for key in [check_key(key) for key in keys]:
            try:
                self._run("delete", key, attempt)
            except StorageError as error:
                first = first or error
        if first is not None:
            raise first

    def prepare(self, prefix: str) -> None:
        """See ``ObjectStore.prepare``: nothing to do."""
        self._check_open()
        check_prefix(prefix)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``ObjectStore.unfinished``: fsspec has no word for it, so nothing is listed."""
        self._check_open()
        check_prefix(prefix)
        return iter(())

    def discard(self, unfinished: Iterable[ObjectInfo]) -> None:
        """See ``ObjectStore.discard``.

        Raises:
            ConfigurationError: There was an entry, although ``unfinished`` lists none.
        """
        for info in unfinished:
            raise ConfigurationError(
                f"cannot discard {info.key!r} at {self._url}: this store lists nothing as"
                " unfinished. Pass on what `unfinished` yields, unchanged",
                option="unfinished",
            )

    def close(self) -> None:
        """See ``ObjectStore.close``."""
        self._closed = True
        self._opened.drop()

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError(
                f"the store at {self._url} was closed. Open a new one", url=self._url, key=""
            )

    def _run(
        self,
        name: str,
        key: str,
        attempt: Callable[[FileSystem, str], T],
        *,
        exclusive: bool = False,
    ) -> T:
        """Call the file system with the full path of a key; retries and translates."""
        self._check_open()
        files, root = self._opened.get()
        path = f"{root}/{key}" if key else root

        def translated() -> T:
            try:
                return attempt(files, path)
            except (TimeoutError, ConnectionError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise TransientFault(reason, ambiguous=True) from error
            except StorageError:
                raise
            except OSError as error:
                raise from_os_error(error, action=name, url=self._url, key=key) from error

        return self._retry.run(Operation(name, self._url, key, exclusive), translated)

    def _read_batch(self, key: str, batch: Sequence[RangeRead]) -> None:
        if not batch:
            return
        contents = self._run(
            "read",
            key,
            lambda files, path: files.cat_ranges(
                [path] * len(batch),
                [read.byte_range.start for read in batch],
                [read.byte_range.stop for read in batch],
                on_error="raise",
            ),
        )
        for read, content in zip(batch, contents, strict=True):
            if len(content) != len(read.into):
                raise short_read(
                    url=self._url,
                    key=key,
                    expected_bytes=len(read.into),
                    found_bytes=len(content),
                    where=f"the range from byte {read.byte_range.start} reaches past its end",
                )
            read.into[:] = content

    def _objects(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        now_s = time.time()
        root = self._opened.get()[1]

        def attempt(files: FileSystem, path: str) -> Mapping[str, Mapping[str, Any]]:
            try:
                return files.find(path, detail=True)
            except FileNotFoundError:
                return {}

        found = self._run("list", prefix.rpartition("/")[0], attempt)
        infos = {path.removeprefix(f"{root}/"): info for path, info in found.items()}
        for key in sorted(infos):
            if is_key(key) and key.startswith(prefix) and key > start_after:
                info = infos[key]
                yield ObjectInfo(
                    key=key, size=int(info["size"]), modified_s=_modified_s(info, now_s)
                )


def _modified_s(info: Mapping[str, Any], now_s: float) -> float:
    """Time of the last change; now, where the backend does not tell, so nothing seems old."""
    for name in _MODIFIED:
        value = info.get(name)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return now_s
