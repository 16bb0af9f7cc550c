"""The campaign of incarnations, small: `make campaign-incarnations` runs it at full size."""

from __future__ import annotations

import pytest

from tests.campaigns.incarnations import run_incarnations


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_of_two_incarnations_one_wins():
    result = run_incarnations(num_rounds=6, seed=2, storage="local", deadline_s=4.0)
    assert result.findings == []
    assert result.kinds.total() == 6
    assert result.errors["Fenced"] > 0
    assert result.num_commits > 0
    assert result.num_reads > 0
