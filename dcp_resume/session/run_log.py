"""The log of a run: read every record, append only after the last one read.

Appending is one exclusive create at the next number. Whoever finds the number taken reads that
record, folds it, checks again, and tries the next number: so nobody ever appends behind a record
that it has not seen. This module moves records; ``commit.py`` knows the rules for each kind.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from dcp_resume.errors import (
    InvalidDocument,
    KeyExists,
    KeyNotFound,
    OutcomeUnknown,
    Problem,
    RunMismatch,
    ShortRead,
    StorageError,
)
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import LOG_PREFIX, log_key, parse_log_key
from dcp_resume.manifest.records import CommitRecord, LogRecord, OpenRecord
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.manifest.wire import MAX_RECORD_BYTES, decode_record, encode
from dcp_resume.storage.object_store import ObjectStore

__all__ = ["Appended", "RunLog"]

_PARALLEL_READS = 16
_BATCH = 512
_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class Appended:
    """A record of ours that is in the log."""

    seq: int
    record: LogRecord
    history: RunHistory
    """The log up to and including the record: what a sweep after a ``retire`` marks from."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A record that was sent, and whose fate may not be known yet."""

    seq: int
    record: LogRecord
    data: bytes


class RunLog:
    """One process's view of a run's log.

    Safe for threads: appends and refreshes take turns, ``history`` never waits.

    Args:
        store: Root of the run.
        run: UUID that the log must belong to; None to accept whichever run is found.
        signing: How records are signed, and whose are believed.
        heard: Called with number and record of each that is read or appended, in order.
        deadline_s: How long an append repeats a create whose answer was lost.
        clock: Monotonic seconds, for the deadline.
        sleep: Waits between repetitions.
        now: Time for ``created``.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        run: str | None = None,
        signing: Signing = UNSIGNED,
        heard: Callable[[int, LogRecord], object] = lambda seq, record: None,
        deadline_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._expected_run = run
        self._new_run = run or str(uuid.uuid4())
        self.signing = signing
        """How everything in the run is signed, and whose documents are believed."""
        self._heard = heard
        self._deadline_s = deadline_s
        self._clock = clock
        self._sleep = sleep
        self._now = now
        self._lock = threading.RLock()
        self._history = RunHistory()
        self._pending: _Pending | None = None

    @property
    def url(self) -> str:
        """Root of the run, for messages."""
        return self._store.url

    @property
    def run(self) -> str:
        """UUID of the run; of a log without records, the one its first record is to have."""
        return self._history.run or self._new_run

    @property
    def history(self) -> RunHistory:
        """Every record read so far."""
        return self._history

    @property
    def last_seq(self) -> int:
        """Number of the last record read; 0 before the first."""
        return self._history.last_seq

    @property
    def pending(self) -> LogRecord | None:
        """The record whose outcome is still unknown; ``settle`` finds it out."""
        return self._pending.record if self._pending else None

    def timestamp(self) -> str:
        """The time now, as records spell it: RFC 3339, UTC."""
        return self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def refresh(self) -> RunHistory:
        """Read every record after the last one read.

        Raises:
            InvalidDocument: A record is malformed, missing or contradicts the log.
            UnsupportedFormat: A newer version wrote a record.
            Untrusted: A record is not signed by whom the policy trusts.
            RunMismatch: The log belongs to another run.
            StorageError: The store failed.
        """
        with self._lock:
            start_after = log_key(self.last_seq) if self.last_seq else ""
            listing = self._store.list(LOG_PREFIX, start_after=start_after)
            numbers = [parse_log_key(info.key) or 0 for info in listing]
            last = max(numbers, default=0)
            while self.last_seq < last:
                # In batches, because a hostile key may claim any number.
                batch = range(self.last_seq + 1, min(last, self.last_seq + _BATCH) + 1)
                self._fold(zip(batch, self._read_batch(batch), strict=True))
            self._read_unlisted()
            return self._history

    def append(
        self,
        build: Callable[[RunHistory], LogRecord],
        check: Callable[[RunHistory], None],
    ) -> Appended:
        """Append one record after the last one read.

        Args:
            build: Makes the record; called anew for each number that is tried.
            check: Raises if the history forbids the record; called before each ``build``, with
                every record up to the number that is tried.

        Raises:
            OutcomeUnknown: The fate of the record, or of an earlier one (then ``pending`` is that
                one), could not be learned in time. Nothing else is appended until it is.
            InvalidDocument: A record met on the way is malformed.
            UnsupportedFormat: A newer version wrote a record.
            Untrusted: A record met on the way, or our own, is not signed by whom the policy trusts.
            RunMismatch: The log belongs to another run.
            StorageError: The store failed, and the record is certainly not in the log.
        """
        with self._lock:
            self.settle()
            while True:
                check(self._history)
                seq, record = self.last_seq + 1, build(self._history)
                data = encode(record, partial(self.signing.sign, log_key(seq)))
                self.signing.trust.check(data, log_key(seq), "our own record")
                found = self._put(_Pending(seq, record, data))
                if _is_same(found, record):
                    return Appended(seq, found, self._history)

    def settle(self) -> None:
        """Find out what became of the record in ``pending``, and read the one at its number.

        Raises:
            OutcomeUnknown: Still unknown at the deadline.
            InvalidDocument: The record at its number is malformed.
            UnsupportedFormat: A newer version wrote the record at its number.
            RunMismatch: The log belongs to another run.
        """
        with self._lock:
            if self._pending is not None:
                self._put(self._pending)

    def _put(self, pending: _Pending) -> LogRecord:
        """Create the record, and fold and return the one that lies at its number, ours or not."""
        data = self._create(pending)
        # From here on the number is known to be taken, so our record's fate is decided.
        self._pending = None
        record = pending.record
        if data != pending.data:
            record = self._decode(pending.seq, data)
        self._fold([(pending.seq, record)])
        return record

    def _create(self, pending: _Pending) -> bytes:
        """Bytes under the record's number, after a create that was answered at last.

        A read that finds nothing proves nothing: a create that timed out may still land. Only the
        same create with the same bytes, answered by "created" or "exists", tells.
        """
        is_unknown = self._pending is not None
        self._pending = pending
        deadline = self._clock() + self._deadline_s
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                return self._try_create(pending)
            except StorageError as error:
                is_unknown |= isinstance(error, (OutcomeUnknown, KeyExists))
                if not is_unknown:
                    self._pending = None
                    raise
                cause = error
            if self._clock() + delay_s >= deadline:
                raise _unknown(self._store.url, pending.seq, cause) from cause
            self._sleep(delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)

    def _try_create(self, pending: _Pending) -> bytes:
        key = log_key(pending.seq)
        try:
            self._store.create(key, pending.data)
        except KeyExists as exists:
            try:
                return self._read(pending.seq)
            except StorageError as error:
                # The record there may be ours: until it is read, the outcome is unknown.
                raise exists from error
        return pending.data

    def _read_batch(self, numbers: range) -> Iterable[LogRecord]:
        def record(seq: int) -> LogRecord:
            try:
                return self._decode(seq, self._read(seq))
            except KeyNotFound as error:
                raise _gap(seq) from error

        if len(numbers) <= _PARALLEL_READS // 2:
            return [record(seq) for seq in numbers]
        # One request after another, a log of 1,000 records would take half a minute from afar.
        with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="run-log") as pool:
            return list(pool.map(record, numbers))

    def _read_unlisted(self) -> None:
        """Read on until nothing is found: a listing may lag behind what can be read."""
        while True:
            seq = self.last_seq + 1
            try:
                data = self._read(seq)
            except KeyNotFound:
                return
            self._fold([(seq, self._decode(seq, data))])

    def _decode(self, seq: int, data: bytes) -> LogRecord:
        key = log_key(seq)
        self.signing.trust.check(data, key, key)
        return decode_record(data, key)

    def _read(self, seq: int) -> bytes:
        key = log_key(seq)
        try:
            return self._store.read(key, max_bytes=MAX_RECORD_BYTES)
        except ShortRead as error:
            problem = Problem(key, "too_large", f"expected at most {MAX_RECORD_BYTES} bytes")
            raise InvalidDocument(
                f"cannot read log record {seq} of {self.url}: {error}",
                problems=(problem,),
            ) from error

    def _fold(self, records: Iterable[tuple[int, LogRecord]]) -> None:
        records = list(records)
        history = self._history.extend(records)
        expected = self._expected_run
        if expected is not None and history.run not in (None, expected):
            raise RunMismatch(
                f"the log of {self.url} belongs to run {history.run}, expected {expected}. Choose "
                "the root of the right run, or an empty one.",
                expected=expected,
                found=str(history.run),
            )
        self._history = history
        if self._pending is not None and self._pending.seq <= history.last_seq:
            self._pending = None
        for seq, record in records:
            self._heard(seq, record)


def _is_same(found: LogRecord, ours: LogRecord) -> bool:
    """Whether a record found at our number is ours, after a lost answer or a repeated build."""
    if isinstance(ours, CommitRecord):
        return isinstance(found, CommitRecord) and found.attempt == ours.attempt
    if isinstance(ours, OpenRecord):
        return isinstance(found, OpenRecord) and found.incarnation == ours.incarnation
    return found == ours


def _unknown(url: str, seq: int, cause: StorageError) -> OutcomeUnknown:
    key = log_key(seq)
    return OutcomeUnknown(
        f"cannot tell whether our log record {key} of {url} was created: every answer was lost, "
        f"the last with: {cause}. Keep all files, and settle it before anything else is appended.",
        url=url,
        key=key,
    )


def _gap(seq: int) -> InvalidDocument:
    problem = Problem(log_key(seq), "gap", "missing, although the listing shows a later record")
    return InvalidDocument(
        f"the run's log has a hole: {problem}. Records are never deleted: restore the file from a "
        "copy, or look for a store that does not show its own writes.",
        problems=(problem,),
    )
