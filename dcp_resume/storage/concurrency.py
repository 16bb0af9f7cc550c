"""Bounds: of coroutines over a sequence of work, of bytes in flight."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

__all__ = ["ByteBudget", "for_each"]

T = TypeVar("T")


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], *, width: int) -> None:
    """Work on every item, at most ``width`` at a time; the next starts when any one ends.

    Raises:
        Exception: The first failure, after the items in work were cancelled and have ended: nothing
            goes on in the background that could touch memory or storage later.
    """
    source = iter(items)

    async def worker() -> None:
        for item in source:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(width):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__


class ByteBudget:
    """Bytes that may be in flight at once; who asks first is served first. For one event loop.

    Args:
        limit: Bytes; whoever wants more gets all of it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, amount: int) -> AsyncIterator[None]:
        """Wait until ``amount`` bytes are free, and have them for the block."""
        amount = min(amount, self._limit)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((amount, turn))
        self._serve()
        try:
            await turn
            yield
        finally:
            # A wait may be cancelled just after it was served.
            if turn.done() and not turn.cancelled():
                self._free += amount
            else:
                turn.cancel()
            self._serve()

    def _serve(self) -> None:
        while self._queue:
            amount, turn = self._queue[0]
            if amount > self._free and not turn.cancelled():
                return
            self._queue.popleft()
            if not turn.cancelled():
                self._free -= amount
                turn.set_result(None)
