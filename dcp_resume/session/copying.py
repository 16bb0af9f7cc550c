"""Copy checkpoints from one run's root to another, byte for byte, and prove them on the way.

1. Choose. Checkpoints go oldest first; those that the target's log has are not copied again.
2. Copy. Data files, each block proved before it is handed on; then index, catalog and manifest.
   What an earlier try left under the same key is kept if every block of it is right.
3. Commit. The target run is opened once, at the first checkpoint that is whole there, and each
   checkpoint counts from its commit record on. Pins and tags follow.

The copy has the run's UUID and the attempt's name, so that it is known again. Until step 3 nobody
who works on the target is disturbed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial

import numpy as np

from dcp_resume.errors import (
    CommitRefused,
    ConfigurationError,
    CorruptData,
    InvalidCheckpoint,
    KeyNotFound,
    MissingAncestors,
    Problem,
    ShortRead,
)
from dcp_resume.format.digests import DigestAlgorithm, digest_hex
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import (
    MANIFEST_NAME,
    PROBE_PREFIX,
    attempt_prefix,
    new_attempt_id,
    parse_attempt_prefix,
)
from dcp_resume.manifest.models import DocumentRef
from dcp_resume.manifest.records import SaveTimes
from dcp_resume.manifest.wire import MAX_MANIFEST_BYTES
from dcp_resume.problems import summarise
from dcp_resume.session.block_windows import BlockWindow, cut_file, wrong_blocks
from dcp_resume.session.commit import Opened, commit, open_run
from dcp_resume.session.located import Located
from dcp_resume.session.marks import pin, tag
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import ByteRange, ObjectStore, RangeRead, check_exclusive_create

__all__ = ["CopiedCheckpoint", "CopyOutcome", "RunCopy"]

NUM_COPIERS = 4
"""Files at a time; each needs memory for one read of the source, or a block."""

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all of one checkpoint, one call at a time."""


class CopyOutcome(Enum):
    """What became of one checkpoint."""

    COPIED = "copied"
    PRESENT = "present"
    """The target's log had it."""
    RETIRED = "retired"
    """The target had it once, and retired it: it is not brought back."""
    DAMAGED = "damaged"
    """The source's bytes are not those that were saved; not committed."""


@dataclass(frozen=True, slots=True)
class CopiedCheckpoint:
    """What became of one checkpoint."""

    step: int | None
    """None where the source's manifest cannot be read."""
    prefix: str
    outcome: CopyOutcome
    seq: int = 0
    """Log number of its commit in the target; 0 where it has none."""
    num_bytes: int = 0
    """Bytes of data files that were written."""
    kept_bytes: int = 0
    """Bytes of data files that an earlier try had written, and that were proved."""
    problems: tuple[Problem, ...] = ()


class RunCopy:
    """A copy of checkpoints of one run into another root.

    Args:
        source: Store to read.
        origin: The source's log; without records where the source is a checkpoint's directory.
        target: Store to write.
        log: The target's log.
    """

    def __init__(
        self, source: ObjectStore, origin: RunLog, target: ObjectStore, log: RunLog
    ) -> None:
        self._source = source
        self._origin = origin
        self._target = target
        self._log = log
        self._opened: Opened | None = None

    def check_target(self) -> None:
        """Refuse a root that has other things and no log: most often the wrong directory.

        Raises:
            ConfigurationError: It holds a key that no run has.
            StorageError: The target's store failed.
        """
        if self._log.history.last_seq:
            return
        for info in self._target.list(""):
            if not (parse_attempt_prefix(info.key) or info.key.startswith(PROBE_PREFIX)):
                raise ConfigurationError(
                    f"cannot copy to {self._log.url}: it is no run, and holds {info.key!r}; "
                    "expected a run, what a copy that was cut off left, or nothing. Name a "
                    "directory of the copy's own, such as one below it",
                    option="target",
                )

    def copy(self, located: Located, progress: Progress) -> CopiedCheckpoint:
        """Copy one checkpoint; of several the oldest first.

        Raises:
            CommitRefused: It is quarantined; or it would come behind a younger checkpoint of the
                target, or behind what a job wrote there; or its attempt was given up there.
            MissingAncestors: It refers to files of other checkpoints.
            UnsupportedStore: The target lacks exclusive create.
            CommitUnknown: The commit's outcome could not be learned in time.
            Fenced: Another process opened the target run meanwhile.
            StorageError: A store failed; this checkpoint was not committed.
        """
        if located.seq in self._origin.history.quarantined:
            quarantined = self._origin.history.commits[located.seq].step
            raise CommitRefused(
                f"cannot copy step {quarantined} of {self._origin.url}: it is quarantined, and the "
                "copy would count. Prove it and lift its quarantine, or copy another step",
                step=quarantined,
            )
        try:
            opened = open_checkpoint(
                self._source, located.prefix, located.manifest, trust=self._origin.signing.trust
            )
        except MissingAncestors:
            raise
        except InvalidCheckpoint as error:
            problems = error.problems or (Problem(located.prefix, "document", str(error)),)
            commits = self._origin.history.commits
            step = commits[located.seq].step if located.seq else None
            return CopiedCheckpoint(
                step, located.prefix, CopyOutcome.DAMAGED, problems=tuple(problems)
            )
        manifest = opened.manifest
        prefix = attempt_prefix(manifest.step, manifest.attempt)
        earlier = self._log.history.find_attempt(manifest.attempt)
        if earlier is not None:
            is_retired = earlier.seq in self._log.history.retired
            outcome = CopyOutcome.RETIRED if is_retired else CopyOutcome.PRESENT
            if not is_retired:
                self._copy_marks(located, earlier.seq)
            return CopiedCheckpoint(manifest.step, prefix, outcome, earlier.seq)
        self._refuse(opened)
        self._place_behind(located)
        files = _FilesCopy(self._source, opened, self._target, prefix, progress)
        try:
            files.copy_all()
        except CorruptData as error:
            return CopiedCheckpoint(
                manifest.step, prefix, CopyOutcome.DAMAGED, problems=error.problems
            )
        reference = self._copy_documents(located, opened, prefix)
        seq = self._commit(opened, reference, located)
        self._copy_marks(located, seq)
        return CopiedCheckpoint(
            manifest.step, prefix, CopyOutcome.COPIED, seq, files.num_bytes, files.kept_bytes
        )

    def _refuse(self, opened: OpenedCheckpoint) -> None:
        manifest = opened.manifest
        bases = sorted({file.base for file in opened.catalog.files} - {"self"})
        if bases:
            raise MissingAncestors(
                f"step {manifest.step} refers to files of {', '.join(bases)}, and would not be "
                "whole elsewhere. Copy a checkpoint that holds all of its files",
                problems=tuple(Problem(base, "missing", "is not copied along") for base in bases),
            )
        if manifest.attempt in self._log.history.dropped:
            raise CommitRefused(
                f"cannot copy step {manifest.step} to {self._log.url}: litter collection gave its "
                f"attempt {manifest.attempt} up there, and its files may be gone. Copy to another "
                "root",
                step=manifest.step,
            )

    def _place_behind(self, located: Located) -> int | None:
        """The target's commit that the copy comes behind, as it does in the source."""
        history, origin = self._log.history, self._origin.history
        newest = history.newest()
        if newest is None or (self._opened and newest.record.generation == history.generation):
            return newest.seq if newest else None
        elders = [e.record.attempt for e in origin.lineage() if e.seq < located.seq]
        known = {record.attempt for record in origin.commits.values()}
        attempt = newest.record.attempt
        if attempt not in elders and (attempt not in known or _is_on_line(origin, attempt)):
            why = "which is younger" if attempt in known else "which the source does not have"
            raise CommitRefused(
                f"cannot copy to {self._log.url}: its newest checkpoint is step "
                f"{newest.record.step}, {why}, and jobs there would no longer resume from it. "
                "Copy to another root",
                step=newest.record.step,
            )
        found = (history.find_attempt(elder) for elder in elders)
        usable = (entry.seq for entry in found if entry and history.is_usable(entry.seq))
        return next(usable, None)

    def _copy_documents(
        self, located: Located, opened: OpenedCheckpoint, prefix: str
    ) -> DocumentRef:
        manifest = opened.manifest
        key = located.manifest.key if located.manifest else located.prefix + MANIFEST_NAME
        data = self._source.read(key, max_bytes=MAX_MANIFEST_BYTES)
        algorithm = DigestAlgorithm(manifest.digest.algorithm)
        reference = DocumentRef(
            key=prefix + MANIFEST_NAME, size=len(data), digest=digest_hex(data, algorithm)
        )
        for document in (manifest.chunk_index, manifest.catalog):
            content = self._source.read(opened.prefix + document.key, max_bytes=document.size)
            self._target.write(prefix + document.key, [memoryview(content)])
        self._target.write(reference.key, [memoryview(data)])
        # What counts from now on is what lies there, proved as any reader proves it.
        open_checkpoint(self._target, prefix, reference, trust=self._log.signing.trust)
        return reference

    def _commit(self, opened: OpenedCheckpoint, reference: DocumentRef, located: Located) -> int:
        if self._opened is None:
            check_exclusive_create(self._target, f"probe/{new_attempt_id()}/")
            self._opened = open_run(
                self._log,
                incarnation=new_attempt_id(),
                choose=lambda _: self._place_behind(located),
            )
        manifest, history = opened.manifest, self._log.refresh()
        newest = history.newest()
        committed = commit(
            self._log,
            generation=self._opened.generation,
            step=manifest.step,
            attempt=manifest.attempt,
            manifest=reference,
            parent=newest.seq if newest else None,
            references=(),
            planned_at=history.last_seq,
            num_bytes=manifest.counts.num_bytes,
            trainer=manifest.trainer,
            created=manifest.created,
            times=self._times(located),
        )
        return committed.seq

    def _times(self, located: Located) -> SaveTimes | None:
        record = self._origin.history.commits.get(located.seq)
        return record.times if record is not None else None

    def _copy_marks(self, located: Located, seq: int) -> None:
        """Pins and tags of the source; none of the target's is taken away but a tag that moves."""
        origin, history = self._origin.history, self._log.history
        if located.seq in origin.pinned and seq not in history.pinned:
            pin(self._log, seq, label=f"pinned in {self._source.url}")
        for name in origin.tags_of(located.seq):
            if history.tags.get(name) != seq:
                tag(self._log, seq, name)


def _is_on_line(history: RunHistory, attempt: str) -> bool:
    return any(entry.record.attempt == attempt for entry in history.lineage())


class _FilesCopy:
    """The data files of one checkpoint on their way."""

    def __init__(
        self,
        source: ObjectStore,
        opened: OpenedCheckpoint,
        target: ObjectStore,
        prefix: str,
        progress: Progress,
    ) -> None:
        self._source = source
        self._opened = opened
        self._target = target
        self._prefix = prefix
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0
        self._is_ended = False
        self.num_bytes = 0
        self.kept_bytes = 0

    def copy_all(self) -> None:
        """Copy every file that the target does not have.

        Raises:
            CorruptData: Blocks of the source are wrong; what was copied before stays.
            StorageError: A store failed.
        """
        found = {info.key: info.size for info in self._target.list(self._prefix)}
        self._target.prepare(self._prefix)
        files = range(len(self._opened.catalog.files))
        with ThreadPoolExecutor(NUM_COPIERS, "dcp-resume-copy") as pool:
            try:
                for future in [pool.submit(self._copy, file, found) for file in files]:
                    future.result()
            except BaseException:
                self._is_ended = True
                pool.shutdown(cancel_futures=True)
                raise

    def _copy(self, file: int, found: dict[str, int]) -> None:
        entry = self._opened.catalog.files[file]
        key = self._prefix + entry.key
        if found.get(key) == entry.size and self._is_right(file, key):
            self.kept_bytes += entry.size
            return
        failure: list[CorruptData] = []
        try:
            self._target.write(key, self._windows(file, failure), size=entry.size)
        except Exception:
            if failure:  # on its way through the target's store it may have been renamed
                raise failure[0] from None
            raise
        with self._lock:
            self.num_bytes += entry.size

    def _is_right(self, file: int, key: str) -> bool:
        """Whether what lies in the target is the file, block by block."""
        return not any(problems for _, _, problems in self._read(self._target, key, file))

    def _windows(self, file: int, failure: list[CorruptData]) -> Iterator[memoryview]:
        key = self._opened.file_key(file)
        for window, data, problems in self._read(self._source, key, file):
            if problems:
                failure.append(_corrupt(self._opened.prefix, problems))
                raise failure[0]
            yield data
            self._advance(window.stop - window.start)

    def _read(
        self, store: ObjectStore, key: str, file: int
    ) -> Iterator[tuple[BlockWindow, memoryview, Sequence[Problem]]]:
        """The windows of a file with their bytes, and the blocks that are wrong at the second look.

        All windows use the same memory, in turn.
        """
        windows = list(cut_file(self._opened, file, store.read_bytes))
        largest = max((window.stop - window.start for window in windows), default=0)
        memory = np.empty(largest, np.uint8).data
        for window in windows:
            data = memory[: window.stop - window.start]
            look = partial(self._look, store, key, window, data)
            yield window, data, look() and look()

    def _look(
        self, store: ObjectStore, key: str, window: BlockWindow, data: memoryview
    ) -> list[Problem]:
        if self._is_ended:
            return [Problem(key, "read", "the copy has ended")]
        try:
            store.read_into(key, [RangeRead(ByteRange(window.start, window.stop), data)])
        except (KeyNotFound, ShortRead) as error:
            return [Problem(key, "read", f"bytes {window.start} to {window.stop}: {error}")]
        return list(wrong_blocks(self._opened, window, data))

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            self._progress(self._done, self._opened.manifest.counts.num_bytes)


def _corrupt(prefix: str, problems: Sequence[Problem]) -> CorruptData:
    return CorruptData(
        f"the source {prefix} is damaged; it was not copied:\n{summarise(problems)}",
        problems=tuple(problems),
    )
