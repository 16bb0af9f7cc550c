"""What may be asked of storage: keys and bytes, nothing else.

A store keeps immutable objects under keys relative to its root (``log/000000000001.json``).
There are no directories, no rename and no append in this vocabulary, because object stores have
none. ``tests/contracts/object_store.py`` holds every backend to each sentence below.

Keys are relative, ``/``-separated, non-empty, and made of ``[A-Za-z0-9._-]``; no segment is empty
or begins with a dot (that keeps out ``..``, temporary files, NFS's ``.nfs…`` and ``.snapshot``).
Every operation raises ``ConfigurationError`` for any other key, before it touches the store. No key
may be a directory of another (``log`` beside ``log/1``): what then happens differs by backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["ByteRange", "Finite", "ObjectInfo", "ObjectStore", "RangeRead", "check_size"]


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """Half-open range of bytes ``[start, stop)`` in one object; may be empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"byte range must satisfy 0 <= start <= stop, got {self}")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RangeRead:
    """One range to read, and the writable memory of the same length that it goes to."""

    byte_range: ByteRange
    into: memoryview

    def __post_init__(self) -> None:
        if len(self.byte_range) != self.into.nbytes or self.into.readonly:
            raise ValueError(
                f"a read of {len(self.byte_range)} bytes needs writable memory of that size, "
                f"got {self.into.nbytes} bytes, readonly={self.into.readonly}"
            )


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing says of one object."""

    key: str
    size: int
    """Bytes."""
    modified_s: float
    """Seconds since the epoch, by the store's clock."""


def check_size(found: int, announced: int | None) -> None:
    """Hold an iterable of buffers to the size that was announced for it.

    Raises:
        ValueError: It differs.
    """
    if announced is not None and found != announced:
        raise ValueError(f"expected {announced} bytes to write, the buffers gave {found}")


@runtime_checkable
class ObjectStore(Protocol):
    """A place that keeps bytes under keys.

    Any method may be called from any thread. Every method raises only ``StorageError`` and its
    subclasses: ``StorageDenied``, ``StorageFull``, or ``StorageUnavailable`` once transient faults
    outlived the retry deadline; others are named below.
    """

    @property
    def url(self) -> str:
        """The root, as a URL without credentials; for messages."""

    @property
    def read_bytes(self) -> int:
        """Bytes of a range that is read at a good rate: a request's cost is small beside theirs."""

    def create(self, key: str, data: bytes) -> None:
        """Create an object if and only if the key is absent; durable when it returns.

        Of any number of concurrent creates of one key exactly one returns; a failed create leaves
        nothing visible. No reader ever sees a part of ``data``.

        Raises:
            KeyExists: The key is taken, possibly by an earlier try of this very call whose answer
                was lost: read the key to tell.
            OutcomeUnknown: No answer came before the deadline.
        """

    def write(self, key: str, buffers: Iterable[memoryview], *, size: int | None = None) -> int:
        """Write one object from the concatenation of ``buffers``, replacing any under the key.

        Durable and whole when it returns; until then, and after any failure, readers see nothing
        new under the key; only after ``StorageUnavailable`` may the whole object appear after all
        (the answer was lost). The buffers (contiguous, format ``B``) of a sequence are read in
        place, and must not change until the call returns. Those of any other iterable are used up
        one by one, each before the next one is asked for, in any thread but one at a time: so one
        memory may serve them all, and ``size`` must say how many bytes will come. An exception that
        the iterable raises ends the write and comes out, as itself or as the cause.

        Returns:
            Bytes written.

        Raises:
            ValueError: An iterable gave another number of bytes than ``size``; nothing is visible.
        """

    def read(self, key: str, *, max_bytes: int) -> bytes:
        """Read a whole object of at most ``max_bytes``.

        Raises:
            KeyNotFound: Nothing lies under the key.
            ShortRead: The object is larger than ``max_bytes`` (``found_bytes`` is its size), or
                ended early.
        """

    def read_into(self, key: str, reads: Sequence[RangeRead]) -> None:
        """Read ranges of one object straight into the callers' memory, in parallel where it pays.

        Empty ranges read nothing. The order of completion is unspecified; on failure the contents
        of every ``into`` are undefined.

        Raises:
            KeyNotFound: Nothing lies under the key.
            ShortRead: A range reaches past the end of the object.
        """

    def size(self, key: str) -> int:
        """Size of an object in bytes, never from a cache.

        Raises:
            KeyNotFound: Nothing lies under the key.
        """

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """List the objects whose key starts with ``prefix``, in ascending order of key.

        Never from a cache; finished objects under valid keys only (no temporary files, no
        unfinished uploads, no foreign names).
        ``prefix`` may be empty, or end inside a segment. Keys up to and including ``start_after``
        are left out. An absent prefix lists nothing.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; an absent key is no error.

        Every key is tried, and the first failure is raised after the last try.
        """

    def prepare(self, prefix: str) -> None:
        """Make ``prefix`` ready to hold objects, durably.

        ``prefix`` names a directory, with or without its last slash. File systems create and fsync
        each directory up to one that existed; object stores do nothing. ``write`` and ``create``
        below a prefix that was not prepared are allowed too.
        """

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        """List what interrupted writes to keys under ``prefix`` left: files, open uploads.

        ``key`` is an opaque name for ``discard``; ``modified_s`` says when the write began or last
        made progress; ``size`` is 0 where the store does not tell.
        """

    def discard(self, unfinished: Iterable[ObjectInfo]) -> None:
        """Remove leftovers that ``unfinished`` listed; one that is gone is no error."""

    def close(self) -> None:
        """Release connections; further calls raise ``StorageError``."""


@runtime_checkable
class Finite(Protocol):
    """A store that knows how much it still takes; object stores do not."""

    def free_bytes(self) -> int:
        """Bytes that this process may still write; quotas of users are not seen.

        Raises:
            StorageError: The store failed.
        """
