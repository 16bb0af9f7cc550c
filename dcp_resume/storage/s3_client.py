"""Requests to one bucket: retried by our policy, with our errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from dcp_resume.errors import StorageError
from dcp_resume.storage.fsspec_bridge import PerProcess, open_s3, run_on_loop
from dcp_resume.storage.retry import Operation, RetryPolicy, TransientFault
from dcp_resume.storage.s3_errors import translate
from dcp_resume.storage.s3_session import watch_connections

__all__ = ["S3Client"]

T = TypeVar("T")


class S3Client:
    """The connection of one store.

    Args:
        bucket: Name of the bucket; every request gets it.
        url: Root of the store, for messages.
        storage_options: Options of s3fs.
        retry: Policy for each single request.
    """

    def __init__(
        self, bucket: str, url: str, storage_options: Mapping[str, Any], retry: RetryPolicy
    ) -> None:
        self._bucket = bucket
        self._url = url
        self._retry = retry
        self._calls = PerProcess(lambda: open_s3(storage_options))
        self._closed = False

    def operation(self, name: str, key: str, *, exclusive: bool = False) -> Operation:
        """Name what is being done, for messages and events."""
        return Operation(name, self._url, key, exclusive)

    def check_open(self) -> None:
        """Refuse to work after ``close``.

        Raises:
            StorageError: The store was closed.
        """
        if self._closed:
            raise StorageError(
                f"the store at {self._url} was closed. Open a new one", url=self._url, key=""
            )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of requests from any thread, and wait for it.

        Raises:
            StorageError: The store was closed, or as the coroutine says.
        """
        try:
            self.check_open()
        except StorageError:
            coroutine.close()
            raise
        return run_on_loop(coroutine)

    async def send(self, method: str, **arguments: object) -> dict[str, Any]:
        """Send one request once; for use inside ``retrying``."""
        return await self._calls.get()(method, Bucket=self._bucket, **arguments)

    async def retrying(self, operation: Operation, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat ``attempt``, which sends requests, by the policy.

        Raises:
            StorageError: In whichever subclass fits.
        """
        connection = watch_connections()

        async def translated() -> T:
            connection.forget()
            try:
                return await attempt()
            except (StorageError, TransientFault):
                raise
            except Exception as error:
                meaning = translate(error, operation)
                if meaning is error:
                    raise
                raise meaning from error

        return await self._retry.run_async(
            operation, translated, was_sent=lambda: connection.was_open
        )

    async def request(
        self, operation: Operation, method: str, **arguments: object
    ) -> dict[str, Any]:
        """Send one request whose answer has no body, with retries.

        Raises:
            StorageError: In whichever subclass fits.
        """
        return await self.retrying(operation, lambda: self.send(method, **arguments))

    def close(self) -> None:
        """Refuse further requests and let the connections go."""
        self._closed = True
        self._calls.drop()
