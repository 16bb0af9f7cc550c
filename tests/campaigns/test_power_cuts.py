"""The campaign of power cuts, small: `make campaign-power-cut` runs it at full size."""

from __future__ import annotations

import pytest

from tests.campaigns.power_cuts import run_power_cuts
from tests.support.ext4_disk import CannotMount


@pytest.mark.ranks
@pytest.mark.timeout(600)
def test_no_power_cut_loses_an_acknowledged_checkpoint():
    try:
        result = run_power_cuts(num_cuts=6, seed=7)
    except CannotMount as error:
        pytest.skip(f"NOT TESTED: a power cut needs an ext4 on a loop device: {error}")
    assert result.findings == []
    assert result.places.total() == 6
    assert result.left.total() == 6
    assert result.left["old"] + result.left["new"] > 0
    assert result.num_acknowledged > 0
