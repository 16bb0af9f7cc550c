"""The same on two ranks of gloo, where each draws and reads for itself."""

from __future__ import annotations

import pytest

from tests.adapters import rank_jobs, test_accelerate, test_hf_trainer, test_lightning
from tests.support.ranks import RanksFailed

pytestmark = [pytest.mark.ranks, pytest.mark.adapters]


@pytest.mark.parametrize(
    ("runs", "assert_equal", "resumed_step"),
    [
        (rank_jobs.lightning_runs, test_lightning.assert_equal, 4),
        (rank_jobs.fsdp_runs, test_lightning.assert_equal, 6),
        (rank_jobs.hf_runs, test_hf_trainer.assert_equal, 6),
        (rank_jobs.accelerate_runs, test_accelerate.assert_equal, 6),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    ranks, tmp_path, runs, assert_equal, resumed_step
):
    found = ranks.run(runs, 2, str(tmp_path))
    assert found[0][0].losses != found[1][0].losses
    for straight, stopped, resumed in found:
        assert stopped.losses == straight.losses[: len(stopped.losses)]
        assert resumed.resumed_step == resumed_step
        assert_equal(resumed, straight)


def test_another_number_of_ranks_goes_on_between_two_epochs_and_nowhere_else(ranks, tmp_path):
    between, within = str(tmp_path / "between"), str(tmp_path / "within")
    ranks.run(rank_jobs.accelerate_stopped, 2, between, 5, 6)  # an epoch has five steps
    ranks.run(rank_jobs.accelerate_stopped, 2, within, 3, 4)

    [resumed] = ranks.run(rank_jobs.accelerate_resumed, 1, between)
    assert (resumed.resumed_step, len(resumed.losses)) == (5, 2 * 10)

    with pytest.raises(RanksFailed, match="num_ranks: saved with 2, now 1"):
        ranks.run(rank_jobs.accelerate_resumed, 1, within)
