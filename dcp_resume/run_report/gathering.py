"""What the page shows, read from the log and from one checkpoint's documents; no data file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate
from statistics import median

import numpy as np

from dcp_resume.errors import InvalidCheckpoint
from dcp_resume.format.chunk_index import UNUSED
from dcp_resume.manager.policies import Decision, RetentionPolicy, decide
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.models import RankTimes
from dcp_resume.manifest.signing import ANYONE, Trust
from dcp_resume.observe.intervals import advised_interval_s
from dcp_resume.run_report.lost_saves import LostSave
from dcp_resume.session.located import Located
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.storage import ObjectStore

__all__ = ["Advice", "CheckpointView", "Phase", "RunReport", "TensorRow", "gather", "phases_of"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of one save, over the ranks."""

    name: str
    seconds: tuple[float, ...]
    """By rank."""
    slowest: int
    """The rank that the others waited for."""


@dataclass(frozen=True, slots=True)
class TensorRow:
    """Where the bytes of a tensor, or of all the smaller ones, came from."""

    name: str
    about: str
    rank_bytes: tuple[int, ...]
    """By rank that wrote them."""


@dataclass(frozen=True, slots=True)
class CheckpointView:
    """The checkpoint that is shown closely."""

    step: int
    world_size: int
    meshes: tuple[str, ...]
    phases: tuple[Phase, ...]
    """Empty where the save was not timed."""
    rank_bytes: tuple[int, ...]
    """Of this save's own files, by rank."""
    tensors: tuple[TensorRow, ...]
    """The largest first, and last what stands for the others."""


@dataclass(frozen=True, slots=True)
class Advice:
    """How often to save."""

    cost_s: float
    """For which a save holds the trainer up; the median of those recorded."""
    commit_s: float
    """From the call to the commit; likewise."""
    mtbf_s: float
    is_measured: bool
    """Whether ``mtbf_s`` comes from the run's own interruptions."""

    @property
    def interval_s(self) -> float:
        """Seconds between saves."""
        return advised_interval_s(self.cost_s, self.mtbf_s, self.commit_s)


@dataclass(frozen=True, slots=True)
class RunReport:
    """All that the page shows."""

    url: str
    history: RunHistory
    checkpoint: CheckpointView | None
    decisions: tuple[Decision, ...]
    policy: str
    """Empty if none was asked for."""
    advice: Advice | None
    lost: tuple[LostSave, ...]
    """Saves that came to nothing."""
    missing: tuple[str, ...]
    """What cannot be shown, and why."""

    @property
    def commits(self) -> list[CommitEntry]:
        """Every commit that ever counted, in order of the log."""
        return [CommitEntry(*item) for item in sorted(self.history.commits.items())]

    def state_of(self, seq: int) -> str:
        """``current``, ``rolled back``, ``quarantined`` or ``retired``."""
        if seq in self.history.retired:
            return "retired"
        if seq in self.history.quarantined:
            return "quarantined"
        is_current = any(entry.seq == seq for entry in self.history.lineage())
        return "current" if is_current else "rolled back"

    def live_bytes(self) -> list[tuple[int, int]]:
        """After each commit and retirement its log number, and the bytes of live checkpoints."""
        changes = {seq: record.num_bytes for seq, record in self.commits}
        for target, seq in self.history.retired.items():
            changes[seq] = -self.history.commits[target].num_bytes
        return [
            *zip(sorted(changes), accumulate(changes[seq] for seq in sorted(changes)), strict=True)
        ]


def gather(
    store: ObjectStore,
    history: RunHistory,
    entry: CommitEntry | None,
    policy: RetentionPolicy | None,
    *,
    mtbf_s: float | None = None,
    lost: tuple[LostSave, ...] = (),
    max_tensors: int = 40,
    trust: Trust = ANYONE,
) -> RunReport:
    """Read what the page shows.

    Args:
        store: Of the run.
        history: Its log.
        entry: The checkpoint to look at closely; None where there is none.
        policy: Whose deletions to show; None for none.
        mtbf_s: Mean time between failures; None to take it from the run's interruptions.
        lost: Saves that came to nothing; see ``find_lost_saves``.
        max_tensors: Shown one by one; the others are added up.
        trust: Whose checkpoints are believed.

    Raises:
        ConfigurationError: ``mtbf_s`` is not above 0.
        StorageError: The store failed.
    """
    missing: list[str] = []
    view: CheckpointView | None = None
    if entry is None:
        missing.append("There is no checkpoint yet.")
    else:
        located = Located.of(entry)
        try:
            opened = open_checkpoint(store, located.prefix, located.manifest, trust=trust)
            view = _view(opened, max_tensors)
        except InvalidCheckpoint as error:
            missing.append(f"Step {entry.record.step} cannot be opened: {error}")
    if view is not None and not view.phases:
        missing.append(
            f"Step {view.step} has no times by rank: it was written by reshard, by plain DCP with "
            "votes of its own, or by an older version."
        )
    num_untimed = sum(record.times is None for record in history.commits.values())
    if num_untimed:
        missing.append(f"{num_untimed} of {len(history.commits)} saves have no recorded times.")
    advice = _advice(history, mtbf_s)
    if advice is None:
        missing.append(
            "No save interval is advised: no save was timed, or the run was never interrupted and "
            "no time between failures was given (--mtbf)."
        )
    decisions = tuple(decide(history, policy)) if policy is not None else ()
    if policy is None:
        missing.append("What retention will delete: no policy was given (--keep-…).")
    text = "" if policy is None else str(policy)
    return RunReport(store.url, history, view, decisions, text, advice, lost, tuple(missing))


def _view(opened: OpenedCheckpoint, max_tensors: int) -> CheckpointView:
    manifest, files = opened.manifest, opened.catalog.files
    world_size = manifest.topology.world_size
    own_bytes = np.zeros(max([world_size, *(file.rank + 1 for file in files)]), np.int64)
    for file in files:
        own_bytes[file.rank] += file.size if file.base == "self" else 0
    times = opened.catalog.rank_times
    return CheckpointView(
        step=manifest.step,
        world_size=world_size,
        meshes=tuple(
            ", ".join(f"{axis}={size}" for axis, size in zip(mesh.axes, mesh.shape, strict=True))
            for mesh in manifest.topology.meshes
        ),
        phases=phases_of(times) if times is not None else (),
        rank_bytes=tuple(own_bytes.tolist()),
        tensors=_tensors(opened, len(own_bytes), max_tensors),
    )


def phases_of(times: RankTimes) -> tuple[Phase, ...]:
    """What the ranks did between the times that they reached."""
    planned, staged, written = (
        np.asarray(column) for column in (times.planned_s, times.staged_s, times.written_s)
    )
    stage, write = (staged - planned).clip(0), (written - staged).clip(0)
    return (
        # Planning ends at once for all: who waited least came last, and the others waited for it.
        Phase("plan", tuple(planned.tolist()), int(planned.argmin())),
        Phase("stage", tuple(stage.tolist()), int(stage.argmax())),
        Phase("write", tuple(write.tolist()), int(write.argmax())),
    )


def _tensors(opened: OpenedCheckpoint, num_ranks: int, max_tensors: int) -> tuple[TensorRow, ...]:
    entries = opened.catalog.tensors
    index = opened.index
    is_used = index.chunk_tensor != UNUSED
    rank_of_file = np.asarray([file.rank for file in opened.catalog.files], np.int64)
    tensor = index.chunk_tensor[is_used].astype(np.int64)
    rank = rank_of_file[index.chunk_file[is_used]]
    num_bytes = index.chunk_bytes(opened.itemsizes)[is_used]
    totals = np.bincount(tensor, num_bytes, len(entries)).astype(np.int64)
    largest = [int(n) for n in np.argsort(-totals, kind="stable")[:max_tensors] if totals[n]]
    rows: list[TensorRow] = []
    is_shown = np.zeros(len(tensor), bool)
    for number in largest:
        own, entry = tensor == number, entries[number]
        is_shown |= own
        shares = np.bincount(rank[own], num_bytes[own], num_ranks).astype(np.int64)
        shape = " x ".join(map(str, entry.global_shape)) or "scalar"
        placed = f" {' '.join(entry.placements)}" if entry.placements else ""
        rows.append(TensorRow(entry.fqn, f"{entry.dtype} {shape}{placed}", tuple(shares.tolist())))
    others = int((totals > 0).sum()) - len(largest)
    if others > 0:
        rest = np.bincount(rank[~is_shown], num_bytes[~is_shown], num_ranks).astype(np.int64)
        rows.append(TensorRow(f"{others} smaller tensors", "", tuple(rest.tolist())))
    return tuple(rows)


def _advice(history: RunHistory, mtbf_s: float | None) -> Advice | None:
    times = [record.times for record in history.commits.values() if record.times is not None]
    measured = _measured_mtbf_s(history)
    known = mtbf_s if mtbf_s is not None else measured
    if not times or known is None:
        return None
    cost_s = median(one.blocked_s for one in times)
    commit_s = median(one.committed_s for one in times)
    return Advice(cost_s, commit_s, known, is_measured=mtbf_s is None)


def _measured_mtbf_s(history: RunHistory) -> float | None:
    """Seconds that the run lasted so far for each of its interruptions."""
    records = [*history.opens.values(), *history.commits.values()]
    seconds = sorted(filter(None, (_seconds(record.created) for record in records)))
    interruptions = len(history.opens) - 1
    if interruptions < 1 or seconds[-1:] == seconds[:1]:
        return None
    return (seconds[-1] - seconds[0]) / interruptions


def _seconds(created: str) -> float | None:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return None
