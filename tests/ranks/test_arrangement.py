"""Another arrangement of ranks is named in the report of a load, and resharded."""

from __future__ import annotations

import pytest

from dcp_resume import CheckpointManager, Severity
from tests.ranks.test_agreement import BLOCKING
from tests.support.models import LAYOUTS

pytestmark = pytest.mark.ranks


def save_on(root: str, layout: str) -> None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(2, LAYOUTS[layout].build().state)


def arrangement_on(root: str, layout: str) -> dict[str, str]:
    """Load; what the report says of the arrangement."""
    trainee = LAYOUTS[layout].build("another", num_steps=0)
    with CheckpointManager(root, BLOCKING) as checkpoints:
        items = checkpoints.load(trainee.state).report.items
    assert {item.severity for item in items} <= {Severity.OK}
    return {item.where.removeprefix("topology."): item.message for item in items}


def test_20_another_size_of_each_axis_is_named_with_both(ranks, tmp_path):
    """Data, sharded data, tensor and pipeline; each resharded, so none is refused.

    Sequence parallelism cuts activations only: a checkpoint is the same with and without it.
    """
    ranks.run(save_on, 8, str(tmp_path / "mixed"), "hsdp2_2_tp2")
    ranks.run(save_on, 2, str(tmp_path / "stages"), "pp2")

    [found] = ranks.run(arrangement_on, 1, str(tmp_path / "mixed"), "single")
    assert found == {
        "world_size": "saved on 8 rank(s), loaded on 1: resharded",
        "replicate": "saved over 2 ranks, now over one: resharded",
        "shard": "saved over 2 ranks, now over one: resharded",
        "tp": "saved over 2 ranks, now over one: resharded",
    }
    for found in ranks.run(arrangement_on, 4, str(tmp_path / "stages"), "tp4"):
        assert found == {
            "world_size": "saved on 2 rank(s), loaded on 4: resharded",
            "stages": "saved as 2 pipeline stage(s), now cut otherwise: resharded",
            "tp": "saved over one, now over 4 ranks: resharded",
        }
    assert ranks.run(arrangement_on, 2, str(tmp_path / "stages"), "pp2") == [{}] * 2
