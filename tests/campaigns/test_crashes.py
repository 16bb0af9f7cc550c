"""The campaign, small: `make campaign` runs it at full size."""

from __future__ import annotations

import pytest

from tests.campaigns.crashes import run_campaign
from tests.campaigns.judging import Start


def seen(start: Start) -> str:
    return f"{start.killed_at}: {start.findings}"


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_no_kill_loses_a_checkpoint_or_leaves_a_hang():
    campaign = run_campaign(num_kills=10, seed=20, storage="local", deadline_s=3.0)
    assert campaign.findings == []
    assert len(campaign.starts) == 10
    assert any(start.durable for start in campaign.starts)
    assert any(start.resumed for start in campaign.starts), list(map(seen, campaign.starts))
