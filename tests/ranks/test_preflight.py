"""Before training begins all ranks get one report: of the store, and of what each of them sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_resume import PreflightReport, Settings, preflight

pytestmark = pytest.mark.ranks

SETTINGS = Settings(deadline_s=40)


def ask_all(root: str) -> list[PreflightReport]:
    """On one root, on a root of each rank's own, and with a part of the model on each rank."""
    rank = dist.get_rank()
    part = {"model": {f"layers.{rank}.w": torch.zeros(256, 256)}}
    return [
        preflight(f"{root}/shared", SETTINGS),
        preflight(f"{root}/local-{rank}", SETTINGS),
        preflight(f"{root}/shared", SETTINGS, state=part),
        preflight(f"{root}/shared", SETTINGS, state={"model": {"w": torch.zeros(256, 256)}}),
    ]


def test_ranks_get_one_report_that_names_those_who_see_another_store(ranks, tmp_path):
    reports: list[Any] = ranks.run(ask_all, 3, str(tmp_path))
    assert all(own == reports[0] for own in reports)
    shared, local, parts, whole = (
        {check.name: check for check in report.checks} for report in reports[0]
    )
    assert shared["ranks"].found == "3 rank(s) see one store"
    assert reports[0][0].is_ready
    assert local["ranks"].verdict.value == "fail"
    assert local["ranks"].found.startswith("2 of 3 fail: rank 1: ")
    assert "rank 2: " in local["ranks"].found
    assert "about 0.8 MiB" in parts["space"].found
    assert "about 0.2 MiB" in whole["space"].found
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
