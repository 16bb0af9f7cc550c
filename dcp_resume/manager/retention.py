"""Which checkpoints go when a new one has come: a pure choice, and its execution."""

from __future__ import annotations

from dcp_resume.errors import DcpResumeError
from dcp_resume.events import CheckpointRetired, RetentionFailed, emit
from dcp_resume.manifest.history import RunHistory
from dcp_resume.session.attempt import Run
from dcp_resume.session.commit import retire
from dcp_resume.session.sweep import sweep

__all__ = ["choose_surplus", "retire_surplus"]


def choose_surplus(history: RunHistory, max_checkpoint_keep: int) -> list[int]:
    """Log numbers of the commits to retire, oldest first.

    What the run needs stays, and counts: the newest, the live resume source, pinned ones, and what
    others refer to. Checkpoints marked as damaged neither count nor go.

    Args:
        history: The log so far.
        max_checkpoint_keep: Checkpoints that remain; 0 keeps all.
    """
    if max_checkpoint_keep == 0:
        return []
    whole = [seq for seq in sorted(history.commits) if history.is_usable(seq)]
    needed = history.protected() | history.referenced()
    surplus = len(whole) - max_checkpoint_keep
    return [seq for seq in whole if seq not in needed][: max(surplus, 0)]


def retire_surplus(run: Run, max_checkpoint_keep: int) -> None:
    """Retire and sweep what is too much; the coordinator's, after a commit.

    A failure does not undo the commit, and is no failure of the save: it is an event, and the next
    commit tries again.
    """
    history = run.log.history
    for target in choose_surplus(history, max_checkpoint_keep):
        record = history.commits[target]
        try:
            retire(
                run.log,
                target,
                reason=f"max_checkpoint_keep={max_checkpoint_keep}",
                generation=run.opened.generation,
            )
            num_bytes = sweep(run.store, record)
        except DcpResumeError as error:
            emit(RetentionFailed(step=record.step, reason=str(error)))
            return
        emit(CheckpointRetired(step=record.step, num_bytes=num_bytes))
