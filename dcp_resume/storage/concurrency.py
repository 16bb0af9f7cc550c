"""A bounded number of coroutines over a sequence of work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

__all__ = ["for_each"]

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
