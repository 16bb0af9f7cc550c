"""Which virtual stages are taken for layers that were numbered within a rank, and which are not."""

from __future__ import annotations

import pytest

from dcp_resume.manager.arrangement import arrangement_differences
from dcp_resume.manifest.models import Topology
from dcp_resume.session.compare import LoadReport

LAYERS = range(8)
ONE_STAGE_A_RANK = Topology(world_size=2, stages=((0, 1, 2, 3), (4, 5, 6, 7)))


def refused(saved, stages, num_virtual):
    """Whether the report of all ranks refuses; ``stages`` are the layers of each rank."""
    reports = [
        LoadReport(1, tuple(arrangement_differences(saved, LAYERS, (), layers, num_virtual)))
        for layers in stages
    ]
    return [item.where for item in LoadReport.united(reports).items if item.kind == "stages"]


@pytest.mark.parametrize(
    ("stages", "num_virtual", "is_refused"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), 2, True),
        (((0, 1, 4, 5), (2, 3, 6, 7)), 2, False),  # interleaved
        (((0, 1, 6, 7), (2, 3, 4, 5)), 2, False),  # shaped like a V: the last rank's are neighbours
        (((0, 2, 4, 6), (1, 3, 5, 7)), 4, False),
        (((0, 1, 2, 3), (4, 5, 6, 7)), 1, False),
        ((LAYERS,), 2, False),  # two parts of a whole model on one rank
        ((LAYERS, LAYERS), 2, False),
        (((), ()), 2, False),  # no layers at all
    ],
)
def test_only_neighbours_on_every_rank_are_refused(stages, num_virtual, is_refused):
    assert bool(refused(ONE_STAGE_A_RANK, stages, num_virtual)) is is_refused


@pytest.mark.parametrize("stages", [((0, 1, 4, 5), (2, 3, 6, 7)), ((0, 1, 6, 7), (2, 3, 4, 5))])
def test_a_checkpoint_is_judged_likewise(stages):
    right = Topology(world_size=2, stages=stages, virtual_stages=2)
    wrong = Topology(world_size=2, stages=ONE_STAGE_A_RANK.stages, virtual_stages=2)
    for now in ((LAYERS,), ONE_STAGE_A_RANK.stages):
        assert not refused(right, now, 1)
        assert refused(wrong, now, 1)
    assert not refused(wrong, wrong.stages, 2)  # the job that saved it goes on with its own names
