"""The pool of ranks itself: a fault, a death or a hang of a rank is told with its number."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import Died, Failed, RanksFailed, Returned

pytestmark = pytest.mark.ranks


def total(number: int) -> tuple[int, int]:
    tensor = torch.tensor([number])
    dist.all_reduce(tensor)
    return dist.get_rank(), int(tensor)


def misbehave(how: str) -> int:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one")
        if how == "unpicklable":
            return threading.Lock()  # type: ignore[return-value]
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            threading.Event().wait()
    return dist.get_rank()


def test_results_come_by_rank_and_world_sizes_may_change(ranks):
    assert ranks.run(total, 2, 10) == [(0, 20), (1, 20)]
    assert ranks.run(total, 4, 1) == [(rank, 4) for rank in range(4)]
    assert ranks.run(total, 1, 7) == [(0, 7)]


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("raise", Failed, "rank one"),
        ("unpicklable", Failed, "cannot be pickled"),
        ("die", Died, "-9"),
        ("hang", Died, "in misbehave"),
    ],
)
def test_faults_name_the_rank(ranks, how, kind, text):
    with pytest.raises(RanksFailed, match=r"rank\(s\) \[1\] of 3 failed") as caught:
        ranks.run(misbehave, 3, how, timeout_s=2)

    outcomes = caught.value.outcomes
    assert [type(outcome) for outcome in outcomes] == [Returned, kind, Returned]
    assert text in str(outcomes[1]) or text in str(getattr(outcomes[1], "error", ""))
    assert ranks.run(total, 3, 1) == [(rank, 3) for rank in range(3)]
