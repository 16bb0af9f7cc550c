"""What time it is for a store: the only clock by which the age of its objects can be told."""

from __future__ import annotations

import secrets

from dcp_resume.errors import KeyNotFound
from dcp_resume.storage.object_store import ObjectStore

__all__ = ["read_clock"]


def read_clock(store: ObjectStore, prefix: str) -> float:
    """Seconds since the epoch by the store's clock: the time of an object written for it.

    Args:
        store: The store to ask.
        prefix: Where the object is made, and removed again; ends in a slash.

    Raises:
        KeyNotFound: The store does not list what was just written.
        StorageError: The store failed otherwise.
    """
    key = f"{prefix}clock-{secrets.token_hex(8)}"
    store.write(key, [memoryview(b"now")])
    try:
        for info in store.list(key):
            return info.modified_s
    finally:
        store.delete([key])
    raise KeyNotFound(
        f"{store.url} does not list {key!r}, which was just written: the age of its objects "
        "cannot be told. Use a store whose listings show every write.",
        url=store.url,
        key=key,
    )
