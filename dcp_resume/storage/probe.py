"""Does a store's exclusive create keep its word? Asked of every store before a run is opened."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from dcp_resume.errors import KeyExists, UnsupportedStore
from dcp_resume.storage.object_store import ObjectStore

__all__ = ["check_exclusive_create", "race_for_keys"]

_RACERS = 8


def check_exclusive_create(store: ObjectStore, prefix: str) -> None:
    """Create one key twice, then another by eight threads at once; remove both.

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
        store.delete([f"{name}-twice", f"{name}-race"])


def race_for_keys(store: ObjectStore, name: str) -> None:
    """As ``check_exclusive_create``, under ``<name>-twice`` and ``<name>-race``, which stay.

    Raises:
        UnsupportedStore: A key was created more than once: two jobs could both commit.
        StorageError: The store failed otherwise.
    """
    twice, race = f"{name}-twice", f"{name}-race"
    winners = [_wins(store, twice, b"first"), _wins(store, twice, b"second")]
    if winners != [True, False]:
        raise _unsupported(store, twice, f"the second create succeeded: {winners}")
    num_winners = _race(store, race)
    if num_winners != 1:
        raise _unsupported(store, race, f"{num_winners} of {_RACERS} racing creates won")


def _wins(store: ObjectStore, key: str, data: bytes) -> bool:
    try:
        store.create(key, data)
    except KeyExists:
        # After a lost answer our own object is in the way: it is a win if the bytes are ours.
        return store.read(key, max_bytes=64) == data
    return True


def _race(store: ObjectStore, key: str) -> int:
    gate = Barrier(_RACERS)

    def contend(number: int) -> bool:
        gate.wait()
        return _wins(store, key, b"racer %d" % number)

    with ThreadPoolExecutor(_RACERS) as pool:
        return sum(pool.map(contend, range(_RACERS)))


def _unsupported(store: ObjectStore, key: str, found: str) -> UnsupportedStore:
    return UnsupportedStore(
        f"the store {store.url} has no exclusive create: expected exactly one create of {key!r} to "
        f"succeed, but {found}. Two jobs could both commit the same checkpoint: use a store that "
        "honours If-None-Match, or a file system with hard links.",
        url=store.url,
        key=key,
    )
