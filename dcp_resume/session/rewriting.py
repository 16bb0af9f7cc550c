"""Write a stored checkpoint anew, in files of another layout, as a new attempt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from dcp_resume.errors import CorruptData, StorageError
from dcp_resume.format.digests import DigestAlgorithm, choose_block_size
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import (
    CATALOG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    attempt_prefix,
    new_attempt_id,
)
from dcp_resume.manifest.models import Manifest
from dcp_resume.manifest.signing import Signing
from dcp_resume.planning.layouts import TargetLayout
from dcp_resume.problems import summarise
from dcp_resume.session.attempt import Attempt
from dcp_resume.session.commit import Committed, choose_newest
from dcp_resume.session.documents import AttemptIdentity, Facts, tensor_digests
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.ownership import own_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.streaming import FileStreamer
from dcp_resume.session.tensor_digests import TensorDigests, differing, recorded_digest
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.session.writing import RankReport
from dcp_resume.storage import ObjectStore

__all__ = ["Rewrite"]


class Rewrite:
    """One attempt whose bytes come from a stored checkpoint: its files, then its commit.

    Args:
        source: Manifest of that checkpoint.
        target: Root of the run that the attempt belongs to.
        layout: What to write.
    """

    def __init__(self, source: Manifest, target: ObjectStore, layout: TargetLayout) -> None:
        self._source = source
        self._target = target
        self._layout = layout
        self._attempt = new_attempt_id()
        self.prefix = attempt_prefix(source.step, self._attempt)
        chunks, tensors = layout.plan.layout.chunks, layout.plan.tensors
        itemsize = np.asarray([ITEMSIZES[entry.dtype] for entry in tensors] or [1], np.int64)
        self._num_bytes = int((chunks.sizes.prod(axis=1) * itemsize[chunks.tensor]).sum())
        self._block_size = choose_block_size(self._num_bytes)
        is_recorded = any(recorded_digest(entry) is not None for entry in tensors)
        self._tensor_digests = TensorDigests.RECORD if is_recorded else TensorDigests.OMIT

    def write_files(
        self,
        source: ObjectStore,
        opened: OpenedCheckpoint,
        *,
        window_bytes: int,
        progress: Callable[[int, int], None],
        signing: Signing,
    ) -> tuple[RankReport, int]:
        """Stream every file; also the bytes fetched.

        Args:
            source: Store of the opened checkpoint.
            opened: Where the bytes come from.
            window_bytes: Bytes in transit.
            progress: Called with bytes written and bytes in all.
            signing: Of the new checkpoint.

        Raises:
            CorruptData: The source is damaged.
            StorageError: A store failed.
        """
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, self._num_bytes)

        window = max(1, min(window_bytes, self._num_bytes))
        streamer = FileStreamer(source, opened, window_bytes=window, progress=advance)
        self._target.prepare(self.prefix)
        layout, tensors = self._layout.plan.layout, self._layout.plan.tensors
        algorithm = DigestAlgorithm(signing.digest_algorithm)
        reports = [
            streamer.write(
                layout,
                tensors,
                file,
                self._target,
                self.prefix + name,
                self._block_size,
                algorithm,
                self._tensor_digests,
            )
            for file, name in enumerate(layout.names)
        ]
        report = RankReport.joined(reports)
        self._check_tensors(report)
        return report, streamer.read_bytes

    def _check_tensors(self, report: RankReport) -> None:
        """Prove that every element is at its place in what was written."""
        if self._tensor_digests is TensorDigests.OMIT:
            return
        plan = self._layout.plan
        found = tensor_digests(plan, report.position_sums)
        problems = tuple(differing(zip(plan.tensors, found, strict=True)))
        if problems:
            raise CorruptData(
                f"tensors are not those that were saved, though their blocks are; nothing was "
                f"committed:\n{summarise(problems)}\ntake another step",
                problems=problems,
            )

    def commit(self, log: RunLog, report: RankReport, facts: Facts) -> Committed:
        """Take the run over, and append the commit.

        Raises:
            CommitRefused: The target's log forbids the commit.
            CommitUnknown: The commit's outcome could not be learned in time.
            Fenced: Another process opened the target run meanwhile.
            StorageError: The store failed; nothing was committed.
        """
        run = own_run(self._target, log, LonelyVotes(), _chooser(self._source), is_probed=True)
        history, source = run.log.refresh(), self._source
        newest = history.newest()
        identity = AttemptIdentity(
            run=str(history.run),
            step=source.step,
            attempt=self._attempt,
            generation=run.opened.generation,
            parent=newest.seq if newest else None,
            resume_source=run.opened.resume_source,
        )
        attempt = Attempt(run, identity, self._layout.plan, history.last_seq, self._block_size)
        return attempt.commit([report], facts)

    def remove(self) -> None:
        """Take back an attempt that certainly did not commit; what fails stays as litter."""
        names = (*self._layout.plan.layout.names, INDEX_NAME, CATALOG_NAME, MANIFEST_NAME)
        with suppress(StorageError):
            self._target.delete([self.prefix + name for name in names])


def _chooser(manifest: Manifest) -> Callable[[RunHistory], int | None]:
    """Within one run the new checkpoint descends from its source; elsewhere from the newest."""

    def choose(history: RunHistory) -> int | None:
        own = history.find_attempt(manifest.attempt)
        if own is not None and history.run == manifest.run and history.is_usable(own.seq):
            return own.seq
        return choose_newest(history)

    return choose
