"""Write data files that nobody holds in memory: their bytes are read from elsewhere.

A file goes by in windows. Each window is filled by its source, digested, and handed to the store,
which takes it before the next one is asked for, so that one buffer serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dcp_resume.errors import CorruptData
from dcp_resume.format.data_file import ChunkHeader, header_bytes
from dcp_resume.format.digests import DigestAlgorithm, block_bounds
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.streamed_digests import StreamedDigests
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.box_rows import unpad_box
from dcp_resume.planning.files import FileLayout
from dcp_resume.planning.padding import logical_shape
from dcp_resume.problems import summarise
from dcp_resume.session.box_digests import digest_row_major
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.reading import read_targets
from dcp_resume.session.targets import Target
from dcp_resume.session.tensor_digests import TensorDigests, can_have_digest
from dcp_resume.session.windows import StoredBox, cut_windows
from dcp_resume.session.writing import RankReport, file_report
from dcp_resume.storage import ObjectStore

__all__ = ["FileStreamer", "StoredFiller"]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk of a file that is to be written."""

    line: ChunkHeader
    stored: StoredBox
    entry: TensorEntry

    def digest(self, target: Target) -> PositionDigest:
        """What a piece of it, once read, adds to the tensor's digest."""
        if not can_have_digest(self.entry):
            return PositionDigest()
        itemsize, shape = self.stored.itemsize, logical_shape(self.entry)
        return digest_row_major(target.memory, itemsize, target.box, shape)


class StoredFiller:
    """Fills targets by verified reads of an opened checkpoint.

    Args:
        source: Store of the opened checkpoint.
        opened: Where the bytes come from.
    """

    def __init__(self, source: ObjectStore, opened: OpenedCheckpoint) -> None:
        self._source = source
        self._opened = opened
        self.read_bytes = 0
        """Bytes fetched so far."""

    def fill(self, targets: Sequence[Target]) -> None:
        """Fill the targets.

        Raises:
            CorruptData: A block of the source failed.
            StorageError: The store failed.
        """
        outcome = read_targets(self._source, self._opened, targets)
        self.read_bytes += outcome.num_bytes
        if outcome.problems:
            raise CorruptData(
                f"the source {self._opened.prefix} is damaged; nothing was committed:\n"
                f"{summarise(outcome.problems)}\ntake another step",
                problems=tuple(outcome.problems),
            )


class FileStreamer:
    """Streams the files of a layout into a store.

    Args:
        fill: Reads what each target wants.
        window_bytes: Memory for the bytes in transit, beside that of the readers.
        progress: Called with the bytes of each window that was handed on.
    """

    def __init__(
        self,
        fill: Callable[[Sequence[Target]], None],
        *,
        window_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        self._fill = fill
        self._progress = progress
        self._memory = np.empty(window_bytes, np.uint8).data
        self._failure: BaseException | None = None

    def write(
        self,
        layout: FileLayout,
        tensors: Sequence[TensorEntry],
        file: int,
        target: ObjectStore,
        key: str,
        block_size: int,
        algorithm: DigestAlgorithm,
        tensor_digests: TensorDigests,
    ) -> RankReport:
        """Write one file.

        Args:
            layout: Names the chunks.
            tensors: Of the layout's catalog.
            file: Which file of the layout.
            target: Store to write to.
            key: Key of the file.
            block_size: Bytes of a digest block.
            algorithm: Of the new checkpoint's digests.
            tensor_digests: Whether to report what each chunk adds to its tensor's digest.

        Raises:
            DcpResumeError: ``fill`` failed; the file was not written.
            StorageError: Either store failed.
        """
        chunks = _chunks(layout, tensors, file)
        header = header_bytes([chunk.line for chunk in chunks])
        lengths = [chunk.line.num_bytes for chunk in chunks]
        bounds = block_bounds(len(header), np.asarray(lengths, np.int64), block_size)
        digests = StreamedDigests(bounds, algorithm)
        sums = [PositionDigest()] * len(chunks) if tensor_digests is TensorDigests.RECORD else []
        buffers = self._buffers(header, chunks, digests, sums)
        self._failure = None
        try:
            size = target.write(key, buffers, size=int(bounds[-1]))
        except Exception:
            # A fault of the source, on its way through the target's store, may have been renamed.
            if self._failure is not None:
                raise self._failure from None
            raise
        return file_report(size, len(header), digests.finish(), sums)

    def _buffers(
        self,
        header: bytes,
        chunks: Sequence[_Chunk],
        digests: StreamedDigests,
        sums: list[PositionDigest],
    ) -> Iterator[memoryview]:
        try:
            digests.update(memoryview(header))
            yield memoryview(header)
            for window in cut_windows((chunk.stored for chunk in chunks), self._memory):
                self._fill(window.targets)
                if sums:
                    for number, target in zip(window.numbers, window.targets, strict=True):
                        sums[number] += chunks[number].digest(target)
                data = self._memory[: window.num_bytes]
                digests.update(data)
                yield data
                self._progress(window.num_bytes)
        except Exception as error:
            self._failure = error
            raise


def _chunks(layout: FileLayout, tensors: Sequence[TensorEntry], file: int) -> list[_Chunk]:
    first, last = np.searchsorted(layout.file, [file, file + 1]).tolist()
    own = layout.chunks.take(slice(first, last))
    chunks: list[_Chunk] = []
    for row, tensor, offsets, sizes in zip(
        range(first, last), own.tensor.tolist(), own.offsets, own.sizes, strict=True
    ):
        entry = tensors[tensor]
        box = unpad_box(offsets, sizes, len(entry.global_shape))
        line = ChunkHeader(layout.key_of(row), entry.dtype, box.sizes, box.offsets)
        stored = StoredBox(entry.fqn, box, ITEMSIZES[entry.dtype])
        chunks.append(_Chunk(line, stored, entry))
    return chunks
