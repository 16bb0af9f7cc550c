"""Hosts of a real torchrun elastic job are cut off and lost; ``campaign-hosts`` does more of it."""

from __future__ import annotations

import pytest

from tests.support.hosts import Hosts, why_no_hosts

pytestmark = pytest.mark.torchrun


def test_a_coordinator_that_was_cut_off_is_fenced_and_the_others_go_on(tmp_path):
    """With its host the store of all votes is gone, and nobody tells the others so."""
    if why := why_no_hosts():
        pytest.skip(f"SHOWN NOWHERE ELSE, but this machine cannot have hosts: {why}")
    from tests.campaigns.hosts import COMMIT, Trials  # loads torch

    seen: list[str] = []
    with Hosts(3, tmp_path) as hosts:
        trials = Trials(
            hosts,
            tmp_path,
            str(tmp_path / "run"),
            deadline_s=10,
            tell=lambda what, took_s: seen.append(f"{what} ({took_s:.1f} s)"),
        )
        trials.start()
        trials.cut(1, COMMIT, zombie="Fenced")
        for host in hosts.numbers:
            hosts.power_off(host)
        trials.audit()
    print("\n".join(seen))
