"""Carry out planned reads: fetch whole blocks, prove them, then copy the wanted bytes out."""

from __future__ import annotations

import resource
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from dcp_resume.errors import KeyNotFound, Problem, ShortRead
from dcp_resume.events import StorageRetried, emit
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.byte_reads import BoxCopy, BytesCopy, ChunkPlace, Read, plan_reads
from dcp_resume.planning.overlaps import Wanted, find_overlaps
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.own_cores import own_cores
from dcp_resume.session.targets import Target
from dcp_resume.storage import ByteRange, ObjectStore, RangeRead, read_each

__all__ = ["ReadOutcome", "plan_boxes", "read_targets"]

MAX_GAP_BYTES = 256 * 1024
"""A gap up to this is read along: a request costs more than its bytes."""
NUM_READERS = 4
"""Once the store lets one wait; before that, no more than the rank has cores: where bytes are at
hand, further readers only take each other's cache and turns. Each has memory for one read: the
store's ``read_bytes``, or a block."""
RUN_BYTES = 8 * 2**20
"""Ranges that one reader takes at once, so that it opens their file once."""


@dataclass(slots=True)
class ReadOutcome:
    """What happened to the reads of one rank."""

    num_bytes: int = 0
    """Bytes fetched."""
    needed_bytes: int = 0
    written_fqns: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def add(self, other: ReadOutcome) -> None:
        """What happened to further reads."""
        self.num_bytes += other.num_bytes
        self.needed_bytes += other.needed_bytes
        self.written_fqns |= other.written_fqns
        self.problems += other.problems


def plan_targets(
    opened: OpenedCheckpoint, targets: Sequence[Target], read_bytes: int
) -> list[Read]:
    """The reads that fill the targets, of up to ``read_bytes`` or one block each."""
    return plan_boxes(opened, [(target.fqn, target.box) for target in targets], read_bytes)


def plan_boxes(
    opened: OpenedCheckpoint, boxes: Sequence[tuple[str, Box]], read_bytes: int
) -> list[Read]:
    """The reads that bring boxes of stored tensors; copies number them as they are given."""
    wanted = [
        Wanted(number, opened.tensor_ids[fqn], box) for number, (fqn, box) in enumerate(boxes)
    ]
    overlaps = find_overlaps(wanted, opened.index)
    index = opened.index
    chunks = np.asarray([overlap.chunk for overlap in overlaps], np.int64)
    columns = zip(
        overlaps,
        index.chunk_file[chunks].tolist(),
        opened.begins[chunks].tolist(),
        index.box_sizes[index.chunk_box[chunks]].tolist(),
        opened.itemsizes[index.chunk_tensor[chunks]].tolist(),
        strict=True,
    )
    places = [
        ChunkPlace(
            file=file,
            begin=begin,
            sizes=tuple(sizes[: len(overlap.box.sizes)]),
            itemsize=itemsize,
            target_sizes=boxes[overlap.target][1].sizes,
        )
        for overlap, file, begin, sizes, itemsize in columns
    ]
    bounds = {file: opened.block_bounds(file) for file in {place.file for place in places}}
    max_bytes = max(read_bytes, opened.manifest.digest.block_size)
    return plan_reads(overlaps, places, bounds, max_gap=MAX_GAP_BYTES, max_bytes=max_bytes)


class _Reader:
    """What the readers of one rank share: the runs that are left, and the outcome."""

    def __init__(
        self,
        store: ObjectStore,
        opened: OpenedCheckpoint,
        targets: Sequence[Target],
        reads: Sequence[Read],
    ) -> None:
        self._store = store
        self._opened = opened
        self._targets = targets
        self._runs = _runs(reads)
        self._buffer_bytes = max((read.stop - read.start for read in reads), default=0)
        files = {read.file for read in reads}
        self._bounds: dict[int, list[int]] = {f: opened.block_bounds(f).tolist() for f in files}
        self._lock = threading.Lock()
        self._is_stopped = False
        self.outcome = ReadOutcome()

    def read_all(self) -> None:
        """Carry out what is left, beside other readers."""
        for _ in self.read_runs():
            pass

    def read_runs(self) -> Generator[bool]:
        """Carry out run after run until none is left or a fault was found.

        Each reader has a buffer of its own: warm pages, small enough to stay in the cache.

        Yields:
            After each run, whether it had to wait for the store.
        """
        buffer = np.empty(self._buffer_bytes, np.uint8).data
        try:
            while (run := self._next_run()) is not None:
                yield self._carry_out(run, buffer)
        finally:
            # All is read; or the store failed: each further read of another reader would only try
            # again until its own deadline.
            self._is_stopped = True

    def _next_run(self) -> Sequence[Read] | None:
        with self._lock:
            is_over = self._is_stopped or bool(self.outcome.problems)
            return None if is_over else next(self._runs, None)

    def _carry_out(self, run: Sequence[Read], buffer: memoryview) -> bool:
        key = self._opened.file_key(run[0].file)
        progress = _Progress(run[0])
        try:
            read_each(self._store, key, self._requests(run, key, buffer, progress))
        except (KeyNotFound, ShortRead) as error:
            # Damage of this checkpoint. Any other storage error says nothing about it, and is
            # raised: an older checkpoint would not be easier to read.
            read = progress.read
            self._fault(Problem(key, "read", f"bytes {read.start} to {read.stop}: {error}"))
        return progress.has_waited

    def _requests(
        self, run: Sequence[Read], key: str, buffer: memoryview, progress: _Progress
    ) -> Iterator[RangeRead]:
        """Ask for each range; when it is filled, prove it and copy what is wanted out of it."""
        for read in run:
            if self.outcome.problems:
                return
            progress.read = read
            data = buffer[: read.stop - read.start]
            request = RangeRead(ByteRange(read.start, read.stop), data)
            switches = _voluntary_switches()
            yield request
            progress.has_waited = progress.has_waited or _voluntary_switches() > switches
            problem = self._prove(read, key, data)
            if problem is not None:
                # What went wrong on the wire is right the second time.
                reason = f"wrong digest: {problem.message}"
                emit(StorageRetried(key=key, attempt=1, delay_s=0.0, reason=reason))
                yield request
                problem = self._prove(read, key, data)
            if problem is not None:
                self._fault(problem)
                return
            self._place(read, data)

    def _prove(self, read: Read, key: str, data: memoryview) -> Problem | None:
        bounds = self._bounds[read.file]
        number, start = read.first_block, read.start
        while start < read.stop:
            stop = bounds[number + 1]
            block = data[start - read.start : stop - read.start]
            found, expected = self._opened.block_digests(read.file, number, block)
            if found != expected:
                names = ", ".join(self._opened.fqns_in_block(read.file, number)) or "header"
                return Problem(
                    key,
                    "digest",
                    f"block {number} (bytes {start} to {stop}; {names}) has digest "
                    f"{found.hex()}, expected {expected.hex()}",
                )
            number, start = number + 1, stop
        return None

    def _fault(self, problem: Problem) -> None:
        with self._lock:
            self.outcome.problems.append(problem)

    def _place(self, read: Read, data: memoryview) -> None:
        """Copy proved bytes to where they are wanted: the one way into a target's memory."""
        with self._lock:
            self.outcome.num_bytes += read.stop - read.start
            self.outcome.written_fqns.update(self._targets[c.target].fqn for c in read.copies)
        for copy in read.copies:
            if isinstance(copy, BytesCopy):
                self._copy_bytes(copy, read.start, data)
            else:
                self._copy_box(copy, read.start, data)

    def _copy_bytes(self, copy: BytesCopy, start: int, data: memoryview) -> None:
        begin = copy.source_begin - start
        memory = self._targets[copy.target].memory
        memory[copy.target_begin : copy.target_begin + copy.length] = data[
            begin : begin + copy.length
        ]

    def _copy_box(self, copy: BoxCopy, start: int, data: memoryview) -> None:
        target = self._targets[copy.target]
        item = len(target.memory) // max(target.box.volume, 1)
        source = _as_array(data, copy.source_begin - start, copy.source_sizes, item)
        memory = _as_array(target.memory, 0, target.box.sizes, item)
        memory[_slices(copy.target_offsets, copy.sizes, item)] = source[
            _slices(copy.source_offsets, copy.sizes, item)
        ]


@dataclass(slots=True)
class _Progress:
    """How far one run is."""

    read: Read
    """The range that is asked for."""
    has_waited: bool = False


def _runs(reads: Sequence[Read]) -> Iterator[Sequence[Read]]:
    """Cut reads into runs of one file, of up to ``RUN_BYTES`` or one read."""
    first, num_bytes = 0, 0
    for number, read in enumerate(reads):
        length = read.stop - read.start
        is_other = read.file != reads[first].file
        if number > first and (is_other or num_bytes + length > RUN_BYTES):
            yield reads[first:number]
            first, num_bytes = number, 0
        num_bytes += length
    if reads:
        yield reads[first:]


def _voluntary_switches() -> int:
    """How often this thread gave up its core to wait."""
    # Only Linux counts by thread; that of all threads is more, so that readers come too early.
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_nvcsw


def _as_array(
    memory: memoryview, begin: int, sizes: tuple[int, ...], item: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Bytes as an array of the given shape, whose last dim counts bytes."""
    shape = (*sizes[:-1], sizes[-1] * item)
    count = int(np.prod(shape))
    return np.frombuffer(memory, np.uint8, count, begin).reshape(shape)


def _slices(offsets: tuple[int, ...], sizes: tuple[int, ...], item: int) -> tuple[slice, ...]:
    scale = (1,) * (len(sizes) - 1) + (item,)
    return tuple(
        slice(offset * s, (offset + size) * s)
        for offset, size, s in zip(offsets, sizes, scale, strict=True)
    )


def read_targets(
    store: ObjectStore, opened: OpenedCheckpoint, targets: Sequence[Target]
) -> ReadOutcome:
    """Fill the targets. Faults are returned, not raised, so that all ranks can agree on them."""
    reads = plan_targets(opened, targets, store.read_bytes)
    reader = _Reader(store, opened, targets, reads)
    reader.outcome.needed_bytes = sum(len(target.memory) for target in targets)
    helpers: list[Future[None]] = []
    with (
        ThreadPoolExecutor(NUM_READERS - 1, "dcp-resume-read") as pool,
        closing(reader.read_runs()) as runs,
    ):
        wanted = min(NUM_READERS, own_cores()) if len(reads) > 1 else 1
        for has_waited in chain([False], runs):
            wanted = NUM_READERS if has_waited else wanted
            while len(helpers) + 1 < wanted:
                helpers.append(pool.submit(reader.read_all))
    for helper in helpers:
        helper.result()
    return reader.outcome
