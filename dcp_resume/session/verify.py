"""Verify a whole checkpoint without loading it.

1. Open. Manifest, catalog and index are read and proved; if they fail, nothing else can be told.
2. List. Every data file is there at its size.
3. Read. Every block of every file is fetched and its digest compared; every header is parsed and
   compared with catalog and index. Files that are missing are passed over.
4. Prove tensors, if asked. What the save recorded of each tensor is computed anew from its stored
   chunks, which are read once more.

Memory is bounded by the number of readers times the size of a read, whatever the checkpoint's size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

import numpy as np

from dcp_resume.errors import InvalidCheckpoint, KeyNotFound, Problem, ShortRead
from dcp_resume.format.chunk_index import UNUSED
from dcp_resume.format.data_file import ChunkHeader, parse_header
from dcp_resume.manifest.signing import ANYONE, Trust
from dcp_resume.planning.box_rows import unpad_box
from dcp_resume.session.block_windows import BlockWindow, cut_file, wrong_blocks
from dcp_resume.session.located import Located
from dcp_resume.session.opening import OpenedCheckpoint, check_files, open_checkpoint
from dcp_resume.session.sampling import WHOLE, Sample
from dcp_resume.session.tensor_digests import Prove, can_have_digest
from dcp_resume.storage import ByteRange, ObjectStore, RangeRead

__all__ = ["UNRECORDED", "Verification", "verify_checkpoint", "verify_files"]

NUM_READERS = 4
UNRECORDED = "unrecorded"
"""Kind of the problem that tensors were to be proved, and the save recorded no digest."""

Progress = Callable[[int, int], None]
"""Called with bytes verified and bytes in all, from any thread, one call at a time."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found."""

    prefix: str
    seq: int
    """Log number of the commit; 0 for a directory without a log."""
    step: int | None
    """None where the manifest cannot be read."""
    num_files: int
    num_blocks: int
    """Blocks that were read and compared."""
    num_bytes: int
    """Bytes that were read and compared."""
    num_tensors: int
    """Tensors whose recorded digest was computed anew."""
    problems: tuple[Problem, ...]
    duration_s: float

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong in what was read."""
        return not self.problems


def verify_checkpoint(
    store: ObjectStore,
    located: Located,
    *,
    trust: Trust = ANYONE,
    num_readers: int = NUM_READERS,
    prove: Prove = Prove.BLOCKS,
    sample: Sample = WHOLE,
    progress: Progress = lambda done, total: None,
) -> Verification:
    """Verify documents, and every byte of every data file. Faults are returned, not raised.

    Args:
        store: Holds the checkpoint.
        located: Where it lies.
        trust: Whose documents are believed.
        num_readers: Threads.
        prove: Whether to prove whole tensors too, which reads them once more.
        sample: Which part of the data to read. Documents, sizes and headers are proved in any case.
        progress: Called with what is done.

    Raises:
        StorageError: The store failed, which says nothing about the checkpoint.
    """
    started = time.monotonic()
    try:
        opened = open_checkpoint(
            store, located.prefix, located.manifest, trust=trust, is_listed=False
        )
    except InvalidCheckpoint as error:
        problems = error.problems or (Problem(located.prefix, "document", str(error)),)
        duration_s = time.monotonic() - started
        return Verification(located.prefix, located.seq, None, 0, 0, 0, 0, problems, duration_s)
    check = _Check(store, opened, progress, sample)
    check.list_files()
    check.read_all(num_readers)
    if prove is Prove.TENSORS and not check.problems:  # of damaged blocks, digests say nothing more
        check.prove_tensors()
    return Verification(
        prefix=located.prefix,
        seq=located.seq,
        step=opened.manifest.step,
        num_files=len(opened.catalog.files),
        num_blocks=check.num_blocks,
        num_bytes=check.num_bytes,
        num_tensors=check.num_tensors,
        problems=tuple(sorted(check.problems)),
        duration_s=time.monotonic() - started,
    )


def verify_files(
    store: ObjectStore, opened: OpenedCheckpoint, keys: Collection[str]
) -> tuple[Problem, ...]:
    """Verify every byte of some data files of a checkpoint. Faults are returned, not raised.

    Args:
        store: Holds the checkpoint.
        opened: Its documents.
        keys: Of the files, from the root of the store; what is no data file is passed over.

    Raises:
        StorageError: The store failed, which says nothing about the files.
    """
    check = _Check(store, opened, lambda done, total: None, WHOLE)
    files = range(len(opened.catalog.files))
    check.pass_over(opened.file_key(file) for file in files if opened.file_key(file) not in keys)
    check.read_all(NUM_READERS)
    return tuple(sorted(check.problems))


class _Check:
    def __init__(
        self, store: ObjectStore, opened: OpenedCheckpoint, progress: Progress, sample: Sample
    ) -> None:
        self._store = store
        self._opened = opened
        self._progress = progress
        self._sample = sample
        self._local = threading.local()
        self._lock = threading.Lock()
        self._total = opened.manifest.counts.num_bytes
        self._passed_over: set[str] = set()
        self._unreadable: set[int] = set()
        self.problems: list[Problem] = []
        self.num_blocks = 0
        self.num_bytes = 0
        self.num_tensors = 0

    def list_files(self) -> None:
        try:
            check_files(self._store, self._opened)
        except InvalidCheckpoint as error:
            self.problems += error.problems
            self.pass_over(p.where for p in error.problems if p.kind == "missing")

    def pass_over(self, keys: Iterable[str]) -> None:
        self._passed_over.update(keys)

    def prove_tensors(self) -> None:
        from dcp_resume.session.stored_tensors import prove_stored_tensors  # loads torch

        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._progress(done, self._total)

        opened = self._opened
        self.num_tensors, self.problems = prove_stored_tensors(self._store, opened, advance)
        if not self.num_tensors and any(map(can_have_digest, opened.catalog.tensors)):
            message = "no tensor has a recorded digest; save with TensorDigests.RECORD"
            key = opened.prefix + opened.manifest.catalog.key
            self.problems.append(Problem(key, UNRECORDED, message))

    def read_all(self, num_readers: int) -> None:
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(num_readers, "dcp-resume-verify") as pool:
            try:
                for job in self._jobs():
                    if len(running) >= 2 * num_readers:
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            future.result()
                    running.add(pool.submit(job))
                for future in running:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _jobs(self) -> Iterator[Callable[[], None]]:
        files = [
            file
            for file in range(len(self._opened.catalog.files))
            if self._opened.file_key(file) not in self._passed_over
        ]
        read_bytes = self._store.read_bytes
        windows = [window for file in files for window in cut_file(self._opened, file, read_bytes)]
        chosen = [windows[number] for number in self._sample.choose(len(windows))]
        self._total = sum(window.stop - window.start for window in chosen)
        for file in files:
            yield partial(self._check_header, file)
        for window in chosen:
            yield partial(self._check_window, window)

    def _check_window(self, window: BlockWindow) -> None:
        data = self._read(window.file, window.start, window.stop)
        if data is None:
            return
        for problem in wrong_blocks(self._opened, window, data):
            self._report(problem)
        with self._lock:
            self.num_blocks += len(window.stops)
            self.num_bytes += len(data)
            self._progress(self.num_bytes, self._total)

    def _check_header(self, file: int) -> None:
        data = self._read(file, 0, self._opened.catalog.files[file].header_bytes)
        if data is None:
            return
        key = self._opened.file_key(file)
        try:
            found = parse_header(data, key)
        except InvalidCheckpoint as error:
            for problem in error.problems:
                self._report(problem)
            return
        expected = list(self._expected(file))
        if len(found) != len(expected) or not all(map(_is_chunk, found, expected)):
            message = "the header does not name the chunks that catalog and index say, in order"
            self._report(Problem(key, "header", message))

    def _expected(self, file: int) -> Iterator[ChunkHeader | None]:
        """Per chunk its line; None for one in an ancestor's file that we do not use."""
        index, tensors = self._opened.index, self._opened.catalog.tensors
        for chunk in range(*index.file_bounds(file)):
            if index.chunk_tensor[chunk] == UNUSED:
                yield None
                continue
            entry = tensors[int(index.chunk_tensor[chunk])]
            code = index.chunk_box[chunk]
            ndim = len(entry.global_shape)
            box = unpad_box(index.box_offsets[code], index.box_sizes[code], ndim)
            yield ChunkHeader(entry.fqn, entry.dtype, box.sizes, box.offsets)

    def _read(self, file: int, start: int, stop: int) -> memoryview | None:
        key = self._opened.file_key(file)
        memory = getattr(self._local, "memory", None)
        if memory is None or len(memory) < stop - start:
            memory = self._local.memory = np.empty(
                max(stop - start, self._store.read_bytes), np.uint8
            )
        view: memoryview = memory[: stop - start].data
        try:
            self._store.read_into(key, [RangeRead(ByteRange(start, stop), view)])
        except (KeyNotFound, ShortRead) as error:
            with self._lock:
                if file not in self._unreadable:  # one line a file, not one for each read
                    message = f"bytes {start} to {stop} cannot be read: {error}"
                    self.problems.append(Problem(key, "read", message))
                self._unreadable.add(file)
            return None
        return view

    def _report(self, problem: Problem) -> None:
        with self._lock:
            self.problems.append(problem)


def _is_chunk(found: ChunkHeader, expected: ChunkHeader | None) -> bool:
    """Whether a header's line is the chunk that the index places there."""
    if expected is None:
        return True
    name, _, number = found.key.rpartition("#")
    is_named = found.key == expected.key or (name == expected.key and number.isdecimal())
    same_box = (found.sizes, found.offsets) == (expected.sizes, expected.offsets)
    return is_named and found.dtype == expected.dtype and same_box
