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
from typing import TypeVar

import torch.distributed as dist

from dcp_resume.session.votes import VoteStore

__all__ = ["BoundedStore", "Requests"]

T = TypeVar("T")


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
