"""An attempt that one process writes without holding its bytes: they are streamed from elsewhere.

Until ``commit`` the target run is only added to; ``commit`` takes it over, as every new incarnation
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from dcp_resume.errors import CommitUnknown, DcpResumeError, StorageError
from dcp_resume.format.digests import DigestAlgorithm, choose_block_size
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import (
    CATALOG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    attempt_prefix,
    new_attempt_id,
)
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.session.attempt import Attempt
from dcp_resume.session.commit import Committed
from dcp_resume.session.documents import AttemptIdentity, Facts
from dcp_resume.session.ownership import own_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.streaming import FileStreamer
from dcp_resume.session.targets import Target
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.session.writing import RankReport
from dcp_resume.storage import ObjectStore

__all__ = ["OfflineAttempt"]


class OfflineAttempt:
    """The files of one attempt.

    Args:
        target: Root of the run.
        plan: What to write.
        step: Of the checkpoint.
        tensor_digests: Whether to record them.
    """

    def __init__(
        self,
        target: ObjectStore,
        plan: GlobalPlan,
        step: int,
        tensor_digests: TensorDigests,
    ) -> None:
        self._target = target
        self._plan = plan
        self._step = step
        self._attempt = new_attempt_id()
        self.prefix = attempt_prefix(step, self._attempt)
        self.num_bytes = plan.layout.num_bytes
        """Bytes of all tensors."""
        self._block_size = choose_block_size(self.num_bytes)
        self._tensor_digests = tensor_digests

    @contextmanager
    def taken_back_on_failure(self) -> Iterator[None]:
        """Whatever goes wrong before the commit leaves no files; Ctrl-C too."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def write_files(
        self,
        fill: Callable[[Sequence[Target]], None],
        *,
        window_bytes: int,
        progress: Callable[[int, int], None],
        algorithm: DigestAlgorithm,
    ) -> RankReport:
        """Stream every data file.

        Args:
            fill: Reads what each target wants.
            window_bytes: Bytes in transit.
            progress: Called with bytes written and bytes in all.
            algorithm: Of the digests.

        Raises:
            DcpResumeError: ``fill`` failed.
            StorageError: The target failed.
        """
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, self.num_bytes)

        window_bytes = max(1, min(window_bytes, self.num_bytes))
        streamer = FileStreamer(fill, window_bytes=window_bytes, progress=advance)
        self._target.prepare(self.prefix)
        layout, tensors = self._plan.layout, self._plan.tensors
        return RankReport.joined(
            [
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
        )

    def commit(
        self,
        log: RunLog,
        report: RankReport,
        facts: Facts,
        choose: Callable[[RunHistory], int | None],
    ) -> Committed:
        """Take the run over, write the documents, append the commit.

        Args:
            log: Of the run at the target.
            report: What was written.
            facts: For the manifest.
            choose: Picks what the new checkpoint descends from.

        Raises:
            CommitRefused: The log forbids the commit; the files were taken back.
            CommitUnknown: The outcome could not be learned in time; the files are kept.
            Fenced: Another process opened the run meanwhile.
            StorageError: The store failed.
        """
        try:
            return self._commit(log, report, facts, choose)
        except CommitUnknown:
            raise
        except DcpResumeError:
            self.remove()
            raise

    def _commit(
        self,
        log: RunLog,
        report: RankReport,
        facts: Facts,
        choose: Callable[[RunHistory], int | None],
    ) -> Committed:
        run = own_run(self._target, log, LonelyVotes(), choose, is_probed=True)
        history = run.log.refresh()
        newest = history.newest()
        identity = AttemptIdentity(
            run=str(history.run),
            step=self._step,
            attempt=self._attempt,
            generation=run.opened.generation,
            parent=newest.seq if newest else None,
            resume_source=run.opened.resume_source,
        )
        attempt = Attempt(run, identity, self._plan, history.last_seq, self._block_size)
        return attempt.commit([report], facts)

    def remove(self) -> None:
        """Take back an attempt that certainly did not commit; what fails stays as litter."""
        names = (*self._plan.layout.names, INDEX_NAME, CATALOG_NAME, MANIFEST_NAME)
        with suppress(StorageError):
            self._target.delete([self.prefix + name for name in names])
