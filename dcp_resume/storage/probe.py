"""Does a store's exclusive create keep its word? Asked of every store before a run is opened."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from dcp_resume.errors import KeyExists, StorageUnavailable, UnsupportedStore
from dcp_resume.storage.object_store import ObjectStore

__all__ = ["check_exclusive_create", "race_for_keys"]

_PAIRS = 4
"""Keys that two threads race for. Pairs find a store that looks before it writes more often than
as many threads at one key do, and no store lets two wait for long (SeaweedFS: eight, for 3 s)."""


def check_exclusive_create(store: ObjectStore, prefix: str) -> None:
    """Create one key twice, then four more by two threads each, all at once; remove all.

    Args:
        store: The store to test.
        prefix: Where the keys are made: a directory, with or without its last slash; may be empty.

    Raises:
        UnsupportedStore: A key was created more than once: two jobs could both commit.
        StorageError: The store failed otherwise.
    """
    base = prefix.rstrip("/") + "/" if prefix else ""
    name = f"{base}probe-{secrets.token_hex(8)}"
    try:
        race_for_keys(store, name)
    finally:
        store.delete([_twice(name), *_raced(name)])


def race_for_keys(store: ObjectStore, name: str) -> None:
    """As ``check_exclusive_create``, under keys that begin with ``name`` and stay.

    Raises:
        UnsupportedStore: A key was created more than once: two jobs could both commit.
        StorageError: The store failed otherwise.
    """
    twice = _twice(name)
    winners = [_wins(store, twice, b"first"), _wins(store, twice, b"second")]
    if winners != [True, False]:
        raise _unsupported(store, twice, f"the second create succeeded: {winners}")
    for key, num_winners in _race(store, _raced(name)).items():
        if num_winners != 1:
            raise _unsupported(store, key, f"{num_winners} of 2 racing creates won")


def _twice(name: str) -> str:
    return f"{name}-twice"


def _raced(name: str) -> list[str]:
    return [f"{name}-race-{number}" for number in range(_PAIRS)]


def _wins(store: ObjectStore, key: str, data: bytes) -> bool:
    try:
        store.create(key, data)
    except KeyExists:
        # After a lost answer our own object is in the way: it is a win if the bytes are ours.
        return store.read(key, max_bytes=64) == data
    return True


def _race(store: ObjectStore, keys: Sequence[str]) -> dict[str, int]:
    """Let two threads race for each key, all keys at once, and count each key's winners."""
    gates = {key: Barrier(2) for key in keys}

    def contend(key: str, name: bytes) -> bool:
        gates[key].wait()
        return _wins(store, key, name)

    with ThreadPoolExecutor(2 * len(keys)) as pool:
        try:
            racers = {
                key: [pool.submit(contend, key, name) for name in (b"one", b"other")]
                for key in keys
            }
        except RuntimeError as error:
            for gate in gates.values():
                gate.abort()  # who waits there would do so for ever
            raise StorageUnavailable(
                f"cannot prove the exclusive create of {store.url}: this host does not "
                f"start the {2 * len(keys)} threads that race for it ({error}); raise its limit",
                url=store.url,
                key=keys[0],
                attempts=1,
            ) from error
        return {key: sum(racer.result() for racer in pair) for key, pair in racers.items()}


def _unsupported(store: ObjectStore, key: str, found: str) -> UnsupportedStore:
    return UnsupportedStore(
        f"the store {store.url} has no exclusive create: expected exactly one create of {key!r} to "
        f"succeed, but {found}. Two jobs could both commit the same checkpoint: use a store that "
        "honours If-None-Match, or a file system with hard links.",
        url=store.url,
        key=key,
    )
