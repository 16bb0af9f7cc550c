"""Each rank tells when it got how far; the checkpoint keeps it, and the report reads it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager
from dcp_resume.events import Event, FileWritten, SaveAdvanced, TrainerBlocked, subscribe
from dcp_resume.manifest.history import CommitEntry
from dcp_resume.run_report.gathering import gather
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store

pytestmark = pytest.mark.ranks


def save_and_listen(root: str) -> list[object]:
    seen: list[Event] = []
    unsubscribe = subscribe(seen.append)
    state = {"model": {"w": torch.ones(1 << 20), "v": torch.zeros(1 << 20)}}
    with CheckpointManager(root) as checkpoints:
        checkpoints.save(5, state).result()
    unsubscribe()
    rank = dist.get_rank()
    assert {event.rank for event in seen if isinstance(event, SaveAdvanced)} == {rank}
    (blocked,) = (event for event in seen if isinstance(event, TrainerBlocked))
    advanced = [event for event in seen if isinstance(event, SaveAdvanced)]
    staged_s = next(event.elapsed_s for event in advanced if event.milestone == "staged")
    return [
        [event.milestone for event in advanced],
        [event.elapsed_s for event in advanced] == sorted(event.elapsed_s for event in advanced),
        blocked.rank == rank and blocked.duration_s >= staged_s,
        sum(event.num_bytes for event in seen if isinstance(event, FileWritten)),
    ]


def test_ranks_tell_and_the_checkpoint_keeps_when_they_got_how_far(ranks, tmp_path):
    told = ranks.run(save_and_listen, 2, str(tmp_path))
    everywhere = ["planned", "staged", "written", "committed"]
    assert told[0][0] == [*everywhere[:3], "durable", "committed"]
    assert told[1][0] == everywhere
    assert all(is_ordered and is_blocked for _, is_ordered, is_blocked, _ in told)

    store = open_store(str(tmp_path))
    history = RunLog(store).refresh()
    ((seq, record),) = history.commits.items()
    times = record.times
    assert 0 < times.staged_s <= times.written_s <= times.durable_s <= times.committed_s
    assert times.blocked_s == times.staged_s
    view = gather(store, history, CommitEntry(seq, record), None).checkpoint
    assert [phase.name for phase in view.phases] == ["plan", "stage", "write"]
    assert all(len(phase.seconds) == 2 for phase in view.phases)
    assert list(view.rank_bytes) == [num_bytes for *_, num_bytes in told]
    assert sum(sum(row.rank_bytes) for row in view.tensors) == 8 << 20
