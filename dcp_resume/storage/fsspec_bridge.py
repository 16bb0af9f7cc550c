"""The one door to fsspec and s3fs: opening file systems, running coroutines, telling faults apart.

No other file of the library imports either, so their traps are met here: caches are off (a cached
listing answers for objects that are gone), and s3fs and botocore never retry (their loops nest).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

import fsspec
from fsspec.asyn import get_loop

from dcp_resume.errors import ConfigurationError
from dcp_resume.storage.s3_session import http_session

__all__ = [
    "FileSystem",
    "PerProcess",
    "S3Calls",
    "is_misconfiguration",
    "is_missing_credentials",
    "is_no_answer",
    "open_filesystem",
    "open_s3",
    "run_on_loop",
    "was_never_sent",
]

T = TypeVar("T")

_UNCACHED = {"use_listings_cache": False, "skip_instance_cache": True}
_CLEANUP_S = 30.0
"""How long an interrupted call may take to clean up after itself on the loop."""


class FileSystem(Protocol):
    """What the generic store uses of an fsspec file system."""

    def pipe_file(self, path: str, value: bytes, mode: str = ...) -> object:
        """Write a whole object; ``mode="create"`` refuses to replace one."""

    def cat_file(self, path: str, start: int | None = ..., end: int | None = ...) -> bytes:
        """Read an object, or one range of it."""

    def cat_ranges(
        self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int], *, on_error: str
    ) -> Sequence[bytes]:
        """Read several ranges, concurrently where the backend can."""

    def info(self, path: str) -> Mapping[str, Any]:
        """Describe one object or directory."""

    def find(self, path: str, *, detail: bool) -> Mapping[str, Mapping[str, Any]]:
        """Describe every object below a directory."""

    def rm_file(self, path: str) -> None:
        """Delete one object."""


class S3Calls(Protocol):
    """One raw S3 request by the name of its botocore method."""

    async def __call__(self, method: str, **arguments: object) -> dict[str, Any]:
        """Send it once and return the parsed answer."""


class PerProcess(Generic[T]):
    """A value built on first use in each process: connections must not be used across a fork.

    There is no lock, which a fork could copy in its locked state; two threads may build two values
    at first, and one of them is dropped unused.
    """

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """Return the value of this process."""
        pid = os.getpid()
        try:
            return self._values[pid]
        except KeyError:
            return self._values.setdefault(pid, self._build())

    def drop(self) -> None:
        """Forget the value of this process; its finalizer closes what it held."""
        self._values.pop(os.getpid(), None)


def open_filesystem(url: str, storage_options: Mapping[str, Any]) -> tuple[FileSystem, str]:
    """Open the file system of a URL, without any cache.

    Returns:
        The file system, and the URL's path in it.

    Raises:
        ConfigurationError: Nothing installed serves the scheme.
    """
    scheme = url.partition("://")[0]
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **{**storage_options, **_UNCACHED})
    except ImportError as error:
        raise ConfigurationError(
            f"storage scheme {scheme!r} needs a package that is not installed: {error}",
            option="url",
        ) from error
    except ValueError as error:
        raise ConfigurationError(
            f"cannot open storage scheme {scheme!r}: {error}. Install the fsspec package that"
            f" serves {scheme}://, or check the spelling",
            option="url",
        ) from error
    return cast("FileSystem", filesystem), str(path)


def open_s3(storage_options: Mapping[str, Any]) -> S3Calls:
    """Open S3 by s3fs, with lean requests and no retries below ours.

    Args:
        storage_options: As s3fs takes them; ``config_kwargs`` are laid over ours.

    Raises:
        ConfigurationError: The options contradict each other.
    """
    _refuse_endpoint_credentials(storage_options)
    options = dict(storage_options)
    options["config_kwargs"] = _config(options.get("config_kwargs", {}))
    try:
        filesystem = fsspec.filesystem("s3", **{**options, **_UNCACHED})
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"s3fs does not take the storage_options {sorted(storage_options)}: {error}",
            option="storage_options",
        ) from error
    filesystem.retries = 1  # s3fs counts tries, not repetitions
    return cast("S3Calls", filesystem._call_s3)


def _refuse_endpoint_credentials(storage_options: Mapping[str, Any]) -> None:
    """Refuse secrets in the endpoint: botocore's errors, and so our causes, show it whole."""
    endpoints = {
        "endpoint_url": storage_options.get("endpoint_url"),
        "client_kwargs": (storage_options.get("client_kwargs") or {}).get("endpoint_url"),
        **{name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")},
    }
    for name, endpoint in endpoints.items():
        if "@" in (endpoint or ""):
            raise ConfigurationError(
                f"{name} holds credentials, or another '@'; expected http(s)://host:port. Give "
                "credentials in storage_options or in AWS_… variables.",
                option=name,
            )


def _config(override: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "connect_timeout": 5,
        "read_timeout": 30,
        "max_pool_connections": 64,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "http_session_cls": http_session(),
        # Our own checksum headers and TLS protect the bytes. Without the pair, botocore hashes
        # every payload with SHA-256, which costs more than the rest of the upload together.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        **override,
    }
    config["s3"] = {"payload_signing_enabled": False, **override.get("s3", {})}
    return config


def run_on_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on fsspec's I/O thread and wait for it.

    If the wait is interrupted (Ctrl-C, a signal handler that raises), the coroutine is cancelled
    and gets a moment to clean up, so that no upload stays open.

    Raises:
        RuntimeError: Called on the I/O thread itself, which would wait for itself.
    """
    loop = get_loop()
    if asyncio._get_running_loop() is loop:
        coroutine.close()
        raise RuntimeError("a store was called on fsspec's I/O thread; call it from any other")
    ended = threading.Event()
    tasks: list[asyncio.Task[T]] = []

    def start() -> None:
        tasks.append(loop.create_task(coroutine))
        tasks[0].add_done_callback(lambda _: ended.set())

    loop.call_soon_threadsafe(start)
    try:
        ended.wait()
    except BaseException:
        # The loop runs callbacks in order, so the task exists by then.
        loop.call_soon_threadsafe(lambda: tasks[0].cancel())
        ended.wait(_CLEANUP_S)
        raise
    return tasks[0].result()


def is_no_answer(error: BaseException) -> bool:
    """Whether a request got no answer, or only a part of one: time-outs, resets, truncation."""
    import aiohttp
    from botocore import exceptions, parsers

    return isinstance(
        error,
        (
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            parsers.ResponseParserError,
            aiohttp.ClientError,
            TimeoutError,
            ConnectionError,
        ),
    )


def was_never_sent(error: BaseException) -> bool:
    """Whether the connection for a request could not even be opened."""
    import aiohttp
    from botocore import exceptions

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (aiohttp.ClientConnectorError, exceptions.ConnectTimeoutError)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def is_missing_credentials(error: BaseException) -> bool:
    """Whether no usable credentials were found, before anything was sent."""
    from botocore import exceptions

    return isinstance(
        error,
        (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.TokenRetrievalError,
            exceptions.SSOError,
        ),
    )


def is_misconfiguration(error: BaseException) -> bool:
    """Whether botocore refused a request or a setting before anything was sent."""
    from botocore import exceptions

    return isinstance(error, exceptions.BotoCoreError)
