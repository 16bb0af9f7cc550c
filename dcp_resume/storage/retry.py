"""The only retry loop of the storage layer: which faults, how long, how spread out.

Backends turn a fault that may pass into ``TransientFault``; the loop here repeats the operation
after a random delay until it succeeds, fails otherwise, or the deadline passes. Clients below
(botocore, s3fs) have their own retries turned off: nested loops multiply into minutes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dcp_resume.errors import (
    ConfigurationError,
    KeyExists,
    OutcomeUnknown,
    StorageError,
    StorageUnavailable,
)
from dcp_resume.events import StorageRetried, emit

__all__ = ["Operation", "RetryPolicy", "TransientFault"]

T = TypeVar("T")


class TransientFault(Exception):
    """A fault that may pass; never leaves the storage package.

    Args:
        reason: The fault in a few words, for events and messages.
        ambiguous: The request may have taken effect although no answer came.
    """

    def __init__(self, reason: str, *, ambiguous: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.ambiguous = ambiguous


@dataclass(frozen=True, slots=True)
class Operation:
    """What is being tried, for messages and events."""

    name: str
    """Verb in the infinitive: ``create``, ``list``."""
    url: str
    key: str
    exclusive: bool = False
    """An exclusive create: once a try was ambiguous, giving up means ``OutcomeUnknown``."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often one request is repeated while its faults are transient.

    Raises:
        ConfigurationError: A time is negative, or the delays are out of order.
    """

    deadline_s: float = 120.0
    """Seconds after which one request is given up, however often it was tried."""
    first_delay_s: float = 0.1
    """Upper bound of the first delay; it doubles with every further one."""
    max_delay_s: float = 5.0
    """Upper bound of any delay."""
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)
    uniform: Callable[[float, float], float] = field(
        default=random.uniform, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not (self.deadline_s > 0 and 0 <= self.first_delay_s <= self.max_delay_s):
            raise ConfigurationError(
                "a retry policy needs deadline_s > 0 and 0 <= first_delay_s <= max_delay_s,"
                f" got {self}",
                option="retry",
            )

    def delay_s(self, attempt: int) -> float:
        """Draw the delay after the ``attempt``-th try (from 1), uniform from zero ("full jitter").

        Ranks that were throttled together must not come back together.
        """
        doublings = min(attempt - 1, 60)  # beyond, the product only grows past the cap
        return self.uniform(0.0, min(self.max_delay_s, self.first_delay_s * 2.0**doublings))

    def run(self, operation: Operation, attempt: Callable[[], T]) -> T:
        """Call ``attempt`` until it does anything else than raise ``TransientFault``.

        Raises:
            StorageUnavailable: Transient faults lasted until the deadline.
            OutcomeUnknown: An exclusive create failed for whatever reason, and an earlier try may
                have taken effect.
        """
        tries = _Tries(self, operation)
        while True:
            try:
                return attempt()
            except TransientFault as fault:
                delay_s = tries.delay_after(fault)
            except StorageError as error:
                tries.check_known(error)
                raise
            self.sleep(delay_s)

    async def run_async(
        self,
        operation: Operation,
        attempt: Callable[[], Awaitable[T]],
        *,
        was_sent: Callable[[], bool] = lambda: True,
    ) -> T:
        """Do what ``run`` does for a coroutine function; a try that hangs ends at the deadline.

        Args:
            operation: What is being tried.
            attempt: One try.
            was_sent: Whether the try that the deadline ended may have reached the server.

        Raises:
            StorageUnavailable: Transient faults lasted until the deadline.
            OutcomeUnknown: An exclusive create failed for whatever reason, and an earlier try may
                have taken effect.
        """
        tries = _Tries(self, operation)
        while True:
            try:
                async with asyncio.timeout(tries.remaining_s()):
                    return await attempt()
            except TransientFault as fault:
                delay_s = tries.delay_after(fault)
            except StorageError as error:
                tries.check_known(error)
                raise
            except TimeoutError:
                delay_s = tries.delay_after(
                    TransientFault("no answer in time", ambiguous=was_sent())
                )
            await asyncio.sleep(delay_s)


class _Tries:
    """The tries of one operation so far."""

    def __init__(self, policy: RetryPolicy, operation: Operation) -> None:
        self._policy = policy
        self._operation = operation
        self._started_s = policy.clock()
        self._count = 0
        self._ambiguous = False

    def remaining_s(self) -> float:
        return max(0.0, self._started_s + self._policy.deadline_s - self._policy.clock())

    def delay_after(self, fault: TransientFault) -> float:
        """Count a failed try and say how long to wait before the next; raises at the deadline."""
        self._count += 1
        self._ambiguous |= fault.ambiguous
        delay_s = self._policy.delay_s(self._count)
        if delay_s >= self.remaining_s():
            raise self._given_up(fault) from fault
        operation = self._operation
        emit(
            StorageRetried(
                key=operation.key, attempt=self._count, delay_s=delay_s, reason=fault.reason
            )
        )
        return delay_s

    def check_known(self, error: StorageError) -> None:
        """Refuse to pass a failure on as final where an earlier try may have taken effect.

        A caller who took, say, "denied" for "not created" would commit a second time. Only the key
        being taken is an answer.
        """
        operation = self._operation
        if operation.exclusive and self._ambiguous and not isinstance(error, KeyExists):
            raise OutcomeUnknown(
                f"cannot tell whether {operation.name} {operation.key!r} at {operation.url}"
                f" succeeded: the answer to an earlier try was lost, and the last failed: {error}."
                " Repeat it with the same bytes, or read the key",
                url=operation.url,
                key=operation.key,
            ) from error

    def _given_up(self, fault: TransientFault) -> OutcomeUnknown | StorageUnavailable:
        operation = self._operation
        message = (
            f"cannot {operation.name} {operation.key!r} at {operation.url}: tried {self._count}"
            f" time(s) in {self._policy.deadline_s:g} s, lastly: {fault.reason}."
        )
        if operation.exclusive and self._ambiguous:
            return OutcomeUnknown(
                f"{message} A try may have taken effect: repeat it with the same bytes, or read"
                " the key",
                url=operation.url,
                key=operation.key,
            )
        return StorageUnavailable(
            f"{message} Check that the store is reachable; RetryPolicy.deadline_s allows longer"
            " outages",
            url=operation.url,
            key=operation.key,
            attempts=self._count,
        )
