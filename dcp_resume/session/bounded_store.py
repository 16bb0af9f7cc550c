"""A store whose every request ends.

torch's ``TCPStore`` waits for an answer without a limit, whatever ``set_timeout`` says. A host
whose link goes down sends neither answer nor reset, and its peers would wait until TCP gives up: a
quarter of an hour.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Protocol, Self, TypeVar

import torch.distributed as dist

from dcp_resume.session.votes import VoteStore

__all__ = ["ANSWER_S", "BoundedStore", "Requests", "Waiters"]

T = TypeVar("T")

ANSWER_S = 5.0
"""Within which the store answers what is asked at the end of a session's deadline, or after it."""


class Requests:
    """Carries out requests in a thread of its own, which may be left behind.

    One that its caller gave up holds the store's client until an answer comes; those behind it
    wait, each as long as its own caller does, and are then dropped.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: a process must be able to end while the host of its store is cut off.
        thread = threading.Thread(
            target=_serve, args=(self._queue,), name="dcp_resume-store", daemon=True
        )
        thread.start()
        weakref.finalize(self, self._queue.put, None)

    def ask(self, request: Callable[[], T], limit_s: float) -> T:
        """Carry one out.

        Raises:
            DistNetworkError: No answer within ``limit_s``.
            Exception: What the request raised.
        """
        answer: Future[T] = Future()

        def carry_out() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(request())
            except BaseException as error:
                answer.set_exception(error)

        self._queue.put(carry_out)
        try:
            return answer.result(limit_s)
        except TimeoutError as error:
            answer.cancel()
            raise dist.DistNetworkError(f"no answer within {limit_s:.1f} s") from error


def _serve(requests: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (carry_out := requests.get()) is not None:
        carry_out()
        # While this waits for the next, the last must not keep its owner alive, and so this thread.
        del carry_out


class BoundedStore:
    """One session's or vote's view of a store: a request fails after ``limit_s()`` seconds."""

    def __init__(self, store: VoteStore, requests: Requests, limit_s: Callable[[], float]) -> None:
        self._store = store
        self._requests = requests
        self._limit_s = limit_s

    def set(self, key: str, value: bytes) -> None:
        """Set a key."""
        self._requests.ask(lambda: self._store.set(key, value), self._limit_s())

    def get(self, key: str) -> bytes:
        """Value of a key that is known to exist."""
        return self._requests.ask(lambda: self._store.get(key), self._limit_s())

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        return self._requests.ask(lambda: self._store.check(keys), self._limit_s())

    def delete_key(self, key: str) -> bool:
        """Delete a key."""
        return self._requests.ask(lambda: self._store.delete_key(key), self._limit_s())


class WaitableStore(Protocol):
    """What is asked of a ``torch.distributed`` store in order to wait."""

    def clone(self) -> Self:
        """The same store through a client of its own."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Return once all keys exist, or raise ``DistStoreError``."""


class Waiters:
    """Blocking waits for keys, each through a clone of the store that no other request uses.

    A wait holds its client's lock. It costs no message until it ends, where polls cost many and
    are late by half a pause. Clones are kept for later waits, but for those that never answered.

    Args:
        store: Of which clones are made.
        answer_s: Within which it answers once a wait is over.
    """

    def __init__(self, store: WaitableStore, answer_s: float = ANSWER_S) -> None:
        self._store = store
        self._answer_s = answer_s
        self._idle: list[tuple[WaitableStore, Requests]] = []

    def wait(self, keys: list[str], timeout_s: float) -> bool:
        """Wait until all keys exist; returns whether they do, ``timeout_s`` later at most.

        Raises:
            DistNetworkError: The store is gone, or did not say in time that the time is over.
        """
        limit_s = timeout_s + self._answer_s
        try:
            store, requests = self._idle.pop()
        except IndexError:
            requests = Requests()
            store = requests.ask(self._store.clone, limit_s)  # which connects, and may hang too
        timeout = timedelta(seconds=max(timeout_s, 0.001))  # none at all would be for ever
        try:
            requests.ask(lambda: store.wait(keys, timeout), limit_s)
            are_there = True
        except dist.DistStoreError:
            are_there = False
        self._idle.append((store, requests))
        return are_there
