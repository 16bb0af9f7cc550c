"""The campaign, small: `make campaign-incremental` runs it at full size."""

from __future__ import annotations

import pytest

from tests.campaigns.incremental import run_incremental


@pytest.mark.timeout(300)
def test_no_prune_takes_what_a_checkpoint_refers_to():
    campaign = run_incremental(num_rounds=2, seed=3)
    assert campaign.findings == []
    assert campaign.counts["commits"] > 4
    assert campaign.counts["referenced_bytes"] > 0
    assert campaign.counts["retired"] > 0
