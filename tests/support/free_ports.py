"""Ports for servers of tests that are killed and started again at the same address."""

from __future__ import annotations

import contextlib
import random
import socket

__all__ = ["free_ports"]

_LOWEST, _EPHEMERAL = 10_000, 32_768


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens at, below those that the kernel gives to outgoing connections.

    One of the latter may be somebody's while its server is down, who then cannot start again.
    """
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        # Drawn at random: processes that ask at the same time must not get the same ones.
        for port in random.SystemRandom().sample(range(_LOWEST, _EPHEMERAL), _EPHEMERAL - _LOWEST):
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind((address, port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"fewer than {count} ports are free between {_LOWEST} and {_EPHEMERAL}")
