"""Whether a run could be saved here: asked before training begins, and nothing stays behind.

1. Probe (coordinator). The root is listed, the log read; keys are created, raced for, written, read
   back; the store's clock and its free space are looked at.
2. See (every rank). Each rank reads what the coordinator wrote, and writes an object of its own.
3. Clean (coordinator). One listing must show every rank's object; then all are deleted.

What one check finds wrong keeps only those from running that need what it found missing.
"""

from __future__ import annotations

import json
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import version
from typing import Any

from dcp_resume.errors import (
    DcpResumeError,
    InvalidDocument,
    PreflightFailed,
    Problem,
    StorageError,
    UnsupportedStore,
)
from dcp_resume.manifest.keys import LOG_PREFIX, new_attempt_id
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.problems import summarise
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.votes import Votes
from dcp_resume.storage import (
    ByteRange,
    Finite,
    ObjectStore,
    RangeRead,
    race_for_keys,
)

__all__ = ["Check", "Need", "PreflightReport", "Verdict", "run_preflight"]

MAX_SKEW_S = 60.0
_SAMPLE_BYTES = 1 << 20
_PACKAGES = ("dcp-resume", "torch", "numpy", "pydantic", "fsspec", "s3fs", "xxhash")


class Verdict(Enum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"
    """Saves work; something else will not be as expected."""
    FAIL = "fail"
    """No save would work."""
    NOT_TRIED = "not tried"
    """An earlier check failed that this one needs."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question, and what was found."""

    name: str
    """``reach``, ``log``, ``create``, ``read back``, ``clock``, ``space``, ``ranks``, ``versions``
    or ``delete``."""
    verdict: Verdict
    found: str
    remedy: str = ""
    """What to do; empty where nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Need:
    """Space that the run will ask for."""

    checkpoint_bytes: int = 0
    """Of one checkpoint; 0 if nobody knows."""
    num_kept: int = 0
    """Checkpoints that retention keeps; 0 for all of them."""
    names_digest: str = ""
    """Of what the bytes are of: ranks with the same one hold parts of the same tensors."""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """What was found, the same on every rank."""

    url: str
    checks: tuple[Check, ...]

    @property
    def is_ready(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return all(check.verdict is not Verdict.FAIL for check in self.checks)

    def require(self) -> PreflightReport:
        """The report itself, if a run can begin.

        Raises:
            PreflightFailed: A check failed; ``problems`` has each of them with its remedy.
        """
        failed = [check for check in self.checks if check.verdict is Verdict.FAIL]
        if not failed:
            return self
        problems = tuple(Problem(c.name, "preflight", f"{c.found}. {c.remedy}") for c in failed)
        raise PreflightFailed(
            f"{self.url} cannot take checkpoints yet; {len(failed)} check(s) failed:\n"
            f"{summarise(problems)}",
            problems=problems,
        )

    def to_bytes(self) -> bytes:
        """Serialise for another rank."""
        rows = [{**asdict(check), "verdict": check.verdict.value} for check in self.checks]
        return json.dumps({"url": self.url, "checks": rows}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PreflightReport:
        """Read what ``to_bytes`` wrote."""
        document = json.loads(data)
        rows = [{**row, "verdict": Verdict(row["verdict"])} for row in document["checks"]]
        return cls(document["url"], tuple(Check(**row) for row in rows))


def run_preflight(
    store: ObjectStore,
    votes: Votes,
    need: Need,
    signing: Signing = UNSIGNED,
) -> PreflightReport:
    """Ask every question; what goes wrong on storage is in the report, not raised.

    Args:
        store: Root of the run.
        votes: Two rounds are held.
        need: Of this rank's tensors, whole; those of ranks with other names are added up.
        signing: Of the run.

    Raises:
        RankErrors: A rank failed otherwise than by its storage.
        RankSilent: A rank did not answer by the deadline.
    """
    probe = _Probe(store, signing)
    try:
        token = votes.round(
            "probe",
            lambda: json.dumps(asdict(need)).encode(),
            lambda ballots: [probe.begin(ballots)] * len(ballots),
        )
        data = votes.round(
            "see",
            lambda: _look(store, votes.rank, token.decode()),
            lambda ballots: [probe.end(ballots)] * len(ballots),
        )
    finally:
        if votes.rank == 0:
            probe.clean_up()
    return PreflightReport.from_bytes(data)


def _look(store: ObjectStore, rank: int, token: str) -> bytes:
    """What one rank sees, and whether it can write."""
    sight = {"versions": _versions(), "is_asked": bool(token), "fault": ""}
    if token:
        try:
            store.read(token, max_bytes=len(token))
            store.create(_own_key(token, rank), token.encode())
        except StorageError as error:
            sight["fault"] = str(error)
    return json.dumps(sight).encode()


def _own_key(token: str, rank: int) -> str:
    return f"{token.rpartition('/')[0]}/rank-{rank:05d}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


class _Probe:
    """The coordinator's part."""

    def __init__(self, store: ObjectStore, signing: Signing) -> None:
        self._store = store
        self._signing = signing
        self._prefix = f"probe/{new_attempt_id()}/"
        self._token = f"{self._prefix}token"
        self._began_s = self._ended_s = 0.0
        self._checks: list[Check] = []
        self._is_dirty = False

    def begin(self, ballots: Sequence[bytes]) -> bytes:
        """Step 1; returns the key that every rank shall see, or nothing."""
        needs = {ballot: Need(**json.loads(ballot)) for ballot in ballots}
        is_reached = self._try("reach", self._reach, _REACH)
        self._try("log", self._read_log, _LOG, is_possible=is_reached)
        is_taken = self._try("create", self._create, _CREATE, is_possible=is_reached)
        self._try("read back", self._read_back, _READ_BACK, is_possible=is_taken)
        self._try("clock", self._compare_clocks, _CLOCK, is_possible=is_taken)
        self._try("space", lambda: self._measure(list(needs.values())), _SPACE)
        return self._token.encode() if is_taken else b""

    def end(self, ballots: Sequence[bytes]) -> bytes:
        """Step 3; returns the report."""
        sights = [json.loads(ballot) for ballot in ballots]
        is_taken = all(sight["is_asked"] for sight in sights)
        self._try("ranks", lambda: self._compare_sights(sights), _RANKS, is_possible=is_taken)
        self._checks.append(_compare_versions([sight["versions"] for sight in sights]))
        self._try("delete", self._delete, _DELETE, is_possible=self._is_dirty)
        return PreflightReport(self._store.url, tuple(self._checks)).to_bytes()

    def clean_up(self) -> None:
        """Delete what is left where ``end`` was never reached, or could not."""
        if self._is_dirty:
            with suppress(StorageError):  # in the report, or another error is on its way
                self._store.delete([info.key for info in self._store.list(self._prefix)])

    def _try(
        self, name: str, ask: Callable[[], str | Check], remedy: str, *, is_possible: bool = True
    ) -> bool:
        if not is_possible:
            check = Check(name, Verdict.NOT_TRIED, "an earlier check failed")
        else:
            try:
                answer = ask()
            except DcpResumeError as error:
                answer = Check(name, Verdict.FAIL, str(error), remedy)
            check = Check(name, Verdict.OK, answer) if isinstance(answer, str) else answer
        self._checks.append(check)
        return check.verdict in (Verdict.OK, Verdict.WARN)

    def _reach(self) -> str:
        first = next(iter(self._store.list(LOG_PREFIX)), None)
        return "the root is empty" if first is None else "the root has a log"

    def _read_log(self) -> str:
        history = RunLog(self._store, signing=self._signing).refresh()
        newest = history.newest()
        if newest is None:
            return "a new run"
        count, step = len(list(history.lineage())), newest.record.step
        return f"{count} checkpoint(s), the newest of step {step}, generation {history.generation}"

    def _create(self) -> str:
        self._is_dirty = True
        self._began_s = time.time()
        self._store.prepare(self._prefix)
        self._store.create(self._token, self._token.encode())
        self._ended_s = time.time()
        race_for_keys(self._store, f"{self._prefix}key")
        return "of two creates of one key, one after the other or racing, one succeeded"

    def _read_back(self) -> str:
        key, sample = f"{self._prefix}sample", secrets.token_bytes(_SAMPLE_BYTES)
        started = time.monotonic()
        self._store.write(key, [memoryview(sample)])
        written = time.monotonic()
        found = bytearray(_SAMPLE_BYTES)
        middle = _SAMPLE_BYTES // 2
        for start, stop in ((middle, _SAMPLE_BYTES), (0, middle)):
            into = memoryview(found)[start:stop]
            self._store.read_into(key, [RangeRead(ByteRange(start, stop), into)])
        if found != sample:
            raise InvalidDocument(
                f"{key!r} at {self._store.url} came back with other bytes than were written",
                problems=(Problem(key, "digest", "other bytes than were written"),),
            )
        read = time.monotonic()
        return f"1 MiB written in {written - started:.2f} s, read in {read - written:.2f} s"

    def _compare_clocks(self) -> Check | str:
        (info,) = self._store.list(self._token)
        if info.modified_s <= 0:
            return "the store tells no times"
        late, early = info.modified_s - self._ended_s, self._began_s - info.modified_s
        # Stores that tell whole seconds are up to one second early.
        skew_s = max(late, early - 1.0, 0.0)
        if skew_s <= MAX_SKEW_S:
            return f"the store's clock differs by {skew_s:.1f} s"
        found = f"the store's clock is {skew_s:.0f} s {'ahead' if late > early else 'behind'}"
        return Check("clock", Verdict.WARN, found, _CLOCK)

    def _measure(self, needs: Sequence[Need]) -> Check | str:
        size = sum(need.checkpoint_bytes for need in needs)
        asked = f"; a checkpoint takes about {_size_text(size)}" if size else ""
        if not isinstance(self._store, Finite):
            return f"the store tells no limit{asked}"
        free = self._store.free_bytes()
        found = f"{_size_text(free)} free{asked}"
        wanted = needs[0].num_kept + 1  # the oldest is retired after the newest is committed
        if size >= free:
            return Check("space", Verdict.FAIL, found, _SPACE)
        if size * wanted > free:
            message = f"{found}, of which retention needs {wanted} at a time"
            return Check("space", Verdict.WARN, message, _SPACE)
        return found

    def _compare_sights(self, sights: Sequence[Mapping[str, Any]]) -> Check | str:
        listed = {info.key for info in self._store.list(self._prefix)}
        faults = {rank: sight["fault"] for rank, sight in enumerate(sights) if sight["fault"]}
        for rank in range(len(sights)):
            if _own_key(self._token, rank) not in listed:
                faults.setdefault(rank, "rank 0 does not see what it wrote")
        if not faults:
            return f"{len(sights)} rank(s) see one store"
        lines = "; ".join(f"rank {rank}: {fault}" for rank, fault in sorted(faults.items())[:8])
        return Check("ranks", Verdict.FAIL, f"{len(faults)} of {len(sights)} fail: {lines}", _RANKS)

    def _delete(self) -> str:
        keys = [info.key for info in self._store.list(self._prefix)]
        self._store.delete(keys)
        left = [info.key for info in self._store.list(self._prefix)]
        if left:
            raise UnsupportedStore(
                f"{left} at {self._store.url} are still listed after they were deleted",
                url=self._store.url,
                key=left[0],
            )
        self._is_dirty = False
        return f"{len(keys)} probe objects are gone"


def _compare_versions(found: Sequence[Mapping[str, str]]) -> Check:
    names = ", ".join(f"{name} {number}" for name, number in found[0].items())
    odd = [rank for rank, own in enumerate(found) if own != found[0]]
    if not odd:
        return Check("versions", Verdict.OK, names)
    message = f"rank 0 has {names}; rank(s) {', '.join(map(str, odd[:8]))} differ"
    return Check("versions", Verdict.WARN, message, "Give every rank the same environment.")


def _size_text(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:,.1f} GiB"


_REACH = "Check the URL, the endpoint, the credentials, and the right to list."
_LOG = "Give the run another root, or restore its log from a copy."
_CREATE = (
    "Grant the rights to write and to read; use a store that honours If-None-Match, or a file "
    "system with hard links."
)
_READ_BACK = "Do not use this store before it is understood why."
_CLOCK = "Synchronise this host's clock; ages of files are judged by the store's."
_SPACE = "Free space, raise the quota, or keep fewer checkpoints (max_checkpoint_keep)."
_RANKS = "Use a file system that every host mounts, or s3://, and give every host its rights."
_DELETE = "Grant the right to delete below probe/, and remove what is left there."
