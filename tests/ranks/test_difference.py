"""Checkpoints of the same state are equal whatever ranks wrote them; an element that differs is
found at its global place."""

from __future__ import annotations

import itertools

import pytest

from dcp_resume import CheckpointManager, RngState, SaveMode, Settings
from dcp_resume.session.difference import DiffOptions, compare_checkpoints
from dcp_resume.session.side import open_side
from dcp_resume.storage import open_store
from tests.support.models import LAYOUTS

pytestmark = pytest.mark.ranks

SOURCES = ("single", "fsdp2_tp2", "pp2", "tp2")
CHANGED = "layers.2.up.weight"


def save_on(name: str, root: str) -> None:
    """Save step 2 as it is; one rank alone also step 3, with two elements of a tensor moved."""
    trainee = LAYOUTS[name].build()
    state = {**trainee.state, "rng": RngState()}
    settings = Settings(mode=SaveMode.BLOCKING, deadline_s=50)
    with CheckpointManager(root, settings) as checkpoints:
        checkpoints.save(2, state)
        if LAYOUTS[name].world_size == 1:
            weight = trainee.parts[0].get_parameter(CHANGED).data
            weight[4, 5] += 0.5
            weight[9, 0] -= 2.0
            checkpoints.save(3, state)


def test_what_other_ranks_wrote_compares_element_by_element(ranks, tmp_path):
    for name in SOURCES:
        ranks.run(save_on, LAYOUTS[name].world_size, name, str(tmp_path / name))
    stores = {name: open_store(str(tmp_path / name)) for name in SOURCES}

    options = DiffOptions(ignored=("rng.*",))
    for a, b in itertools.combinations(SOURCES, 2):
        found = compare_checkpoints(open_side(stores[a], 2), open_side(stores[b], 2), options)
        assert found.is_equal, list(found.lines())
        assert found.num_tensors == 112
        assert found.num_bytes > found.digest_bytes
        uncompared = [] if LAYOUTS[a].world_size == LAYOUTS[b].world_size else ["rng"]
        assert [problem.where for problem in found.uncompared] == uncompared
    moved = open_side(stores["single"], 3)
    for name in SOURCES:
        found = compare_checkpoints(open_side(stores[name], 2), moved, options)
        (item,) = found.tensors
        assert item.fqn == f"model.{CHANGED}"
        assert (item.first_index, item.num_different) == ((4, 5), 2)
        assert item.max_abs == pytest.approx(2.0, abs=1e-6)
        assert [problem.where for problem in found.facts] == ["manifest.trainer.step"]
