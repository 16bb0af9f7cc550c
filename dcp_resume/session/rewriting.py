"""Write a stored checkpoint anew, in files of another layout, as a new attempt of its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dcp_resume.errors import CorruptData
from dcp_resume.format.digests import DigestAlgorithm
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.models import Manifest
from dcp_resume.manifest.signing import ANYONE, UNSIGNED, Signing, Trust
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.problems import summarise
from dcp_resume.session.commit import Committed, choose_newest
from dcp_resume.session.documents import Facts, tensor_digests
from dcp_resume.session.offline import OfflineAttempt
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.streaming import StoredFiller
from dcp_resume.session.tensor_digests import TensorDigests, differing, recorded_digest
from dcp_resume.session.windows import check_window
from dcp_resume.session.writing import RankReport
from dcp_resume.storage import ObjectStore

__all__ = ["RewriteOptions", "Rewritten", "rewrite"]


@dataclass(frozen=True, slots=True)
class RewriteOptions:
    """How to rewrite.

    Raises:
        ConfigurationError: The window is too small.
    """

    window_bytes: int = 64 * 1024 * 1024
    """Bytes in transit; readers, and an upload to S3, need some more beside them."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with bytes written and bytes in all."""
    trust: Trust = ANYONE
    """Whose checkpoint is read."""
    signing: Signing = UNSIGNED
    """How the new one is signed, and whose log records at the target are believed."""
    append_deadline_s: float = 120.0
    """How long a record of the target's log whose answer was lost is created again."""

    def __post_init__(self) -> None:
        check_window(self.window_bytes)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A checkpoint that was made of another's bytes."""

    committed: Committed
    prefix: str
    read_bytes: int
    """Fetched from the source."""


def rewrite(
    source: ObjectStore,
    opened: OpenedCheckpoint,
    plan: GlobalPlan,
    facts: Facts,
    target: ObjectStore,
    log: RunLog,
    options: RewriteOptions,
) -> Rewritten:
    """Stream a checkpoint into new files, and commit them.

    Args:
        source: Store of the opened checkpoint.
        opened: Where the bytes come from.
        plan: What to write.
        facts: For the new manifest.
        target: Root of the run that the new checkpoint belongs to.
        log: Of that run.
        options: Window, progress and signing.

    Raises:
        CorruptData: The source is damaged; nothing was committed.
        CommitRefused: The target's log forbids the commit.
        CommitUnknown: The commit's outcome could not be learned in time.
        Fenced: Another process opened the target run meanwhile.
        StorageError: A store failed; nothing was committed.
    """
    is_recorded = any(recorded_digest(entry) is not None for entry in plan.tensors)
    digests = TensorDigests.RECORD if is_recorded else TensorDigests.OMIT
    written = OfflineAttempt(target, plan, opened.manifest.step, digests)
    filler = StoredFiller(source, opened)
    with written.taken_back_on_failure():
        report = written.write_files(
            filler.fill,
            window_bytes=options.window_bytes,
            progress=options.progress,
            algorithm=DigestAlgorithm(options.signing.digest_algorithm),
        )
        if is_recorded:
            _check_tensors(plan, report)
    committed = written.commit(log, report, facts, _chooser(opened.manifest))
    return Rewritten(committed, written.prefix, filler.read_bytes)


def _check_tensors(plan: GlobalPlan, report: RankReport) -> None:
    """Prove that every element is at its place in what was written."""
    found = tensor_digests(plan, report.position_sums)
    problems = tuple(differing(zip(plan.tensors, found, strict=True)))
    if problems:
        raise CorruptData(
            f"tensors are not those that were saved, though their blocks are; nothing was "
            f"committed:\n{summarise(problems)}\ntake another step",
            problems=problems,
        )


def _chooser(manifest: Manifest) -> Callable[[RunHistory], int | None]:
    """Within one run the new checkpoint descends from its source; elsewhere from the newest."""

    def choose(history: RunHistory) -> int | None:
        own = history.find_attempt(manifest.attempt)
        if own is not None and history.run == manifest.run and history.is_usable(own.seq):
            return own.seq
        return choose_newest(history)

    return choose
