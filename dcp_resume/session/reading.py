"""Carry out planned reads: fetch whole blocks, prove them, then copy the wanted bytes out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from dcp_resume.errors import KeyNotFound, Problem, ShortRead
from dcp_resume.events import StorageRetried, emit
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.byte_reads import BoxCopy, BytesCopy, ChunkPlace, Read, plan_reads
from dcp_resume.planning.overlaps import Wanted, find_overlaps
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.targets import Target
from dcp_resume.storage import ByteRange, ObjectStore, RangeRead

__all__ = ["ReadOutcome", "plan_boxes", "read_targets"]

MAX_GAP_BYTES = 256 * 1024
"""A gap up to this is read along: a request costs more than its bytes."""
NUM_READERS = 4
"""Each needs memory for one read beside the state: the store's ``read_bytes``, or a block."""


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
    """Shared state of the reader threads of one rank."""

    def __init__(
        self, store: ObjectStore, opened: OpenedCheckpoint, targets: Sequence[Target]
    ) -> None:
        self._store = store
        self._opened = opened
        self._targets = targets
        self._local = threading.local()
        self._lock = threading.Lock()
        self.outcome = ReadOutcome()

    def run(self, read: Read) -> None:
        """Fetch, prove and copy one range; does nothing once a fault was found."""
        if self.outcome.problems:
            return
        length = read.stop - read.start
        buffer = self._buffer(length)
        problem = self._fetch(read, buffer)
        if problem is not None and problem.kind == "digest":
            # What went wrong on the wire is right the second time.
            reason = f"wrong digest: {problem.message}"
            emit(StorageRetried(key=problem.where, attempt=1, delay_s=0.0, reason=reason))
            problem = self._fetch(read, buffer)
        if problem is not None:
            self._fault(problem)
            return
        with self._lock:
            self.outcome.num_bytes += length
            self.outcome.written_fqns.update(self._targets[c.target].fqn for c in read.copies)
        for copy in read.copies:
            if isinstance(copy, BytesCopy):
                self._copy_bytes(copy, read.start, buffer)
            else:
                self._copy_box(copy, read.start, buffer)

    def _fetch(self, read: Read, buffer: memoryview) -> Problem | None:
        key = self._opened.file_key(read.file)
        try:
            self._store.read_into(key, [RangeRead(ByteRange(read.start, read.stop), buffer)])
        except (KeyNotFound, ShortRead) as error:
            # Damage of this checkpoint. Any other storage error says nothing about it, and is
            # raised: an older checkpoint would not be easier to read.
            return Problem(key, "read", f"bytes {read.start} to {read.stop}: {error}")
        return self._prove(read, key, buffer)

    def _buffer(self, length: int) -> memoryview:
        """Thread-local memory: warm pages, small enough to stay in the cache."""
        memory: np.ndarray[tuple[int], np.dtype[np.uint8]] | None
        memory = getattr(self._local, "memory", None)
        if memory is None or len(memory) < length:
            memory = np.empty(max(length, self._store.read_bytes), np.uint8)
            self._local.memory = memory
        return memory[:length].data

    def _prove(self, read: Read, key: str, buffer: memoryview) -> Problem | None:
        bounds = self._opened.block_bounds(read.file)
        number = read.first_block
        while number < len(bounds) - 1 and bounds[number] < read.stop:
            start, stop = int(bounds[number]), int(bounds[number + 1])
            data = buffer[start - read.start : stop - read.start]
            found, expected = self._opened.block_digests(read.file, number, data)
            if found != expected:
                names = ", ".join(self._opened.fqns_in_block(read.file, number)) or "header"
                return Problem(
                    key,
                    "digest",
                    f"block {number} (bytes {start} to {stop}; {names}) has digest "
                    f"{found.hex()}, expected {expected.hex()}",
                )
            number += 1
        return None

    def _fault(self, problem: Problem) -> None:
        with self._lock:
            self.outcome.problems.append(problem)

    def _copy_bytes(self, copy: BytesCopy, start: int, buffer: memoryview) -> None:
        begin = copy.source_begin - start
        memory = self._targets[copy.target].memory
        memory[copy.target_begin : copy.target_begin + copy.length] = buffer[
            begin : begin + copy.length
        ]

    def _copy_box(self, copy: BoxCopy, start: int, buffer: memoryview) -> None:
        target = self._targets[copy.target]
        item = len(target.memory) // max(target.box.volume, 1)
        source = _as_array(buffer, copy.source_begin - start, copy.source_sizes, item)
        memory = _as_array(target.memory, 0, target.box.sizes, item)
        memory[_slices(copy.target_offsets, copy.sizes, item)] = source[
            _slices(copy.source_offsets, copy.sizes, item)
        ]


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
    reader = _Reader(store, opened, targets)
    reader.outcome.needed_bytes = sum(len(target.memory) for target in targets)
    if len(reads) <= 1:
        for read in reads:
            reader.run(read)
        return reader.outcome
    with ThreadPoolExecutor(min(NUM_READERS, len(reads)), "dcp-resume-read") as pool:
        try:
            for future in [pool.submit(reader.run, read) for read in reads]:
                future.result()
        except BaseException:
            # The store failed: each further read would only try again until its own deadline.
            pool.shutdown(cancel_futures=True)
            raise
    return reader.outcome
