"""Saved on any layout, loaded on any other: whole tensors and moments are bit-equal."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import pytest

from dcp_resume import CheckpointManager, SaveMode, Settings
from tests.support.models import LAYOUTS, differences, whole_state

pytestmark = pytest.mark.ranks

NO_DIFFERENCES: dict[str, list[str]] = {source: [] for source in LAYOUTS}
ON_S3 = [name for name, layout in LAYOUTS.items() if layout.world_size <= 4]
"""Eight ranks on two cores wait for the S3 server most of the time."""


def _settings(options: Mapping[str, Any], mode: SaveMode = SaveMode.BLOCKING) -> Settings:
    return Settings(mode=mode, storage_options=options, deadline_s=50)


def save_on(name: str, root: str, options: Mapping[str, Any], mode: SaveMode) -> list[str]:
    """Save on one layout; returns how the source itself differs from what it must be."""
    trainee = LAYOUTS[name].build()
    wrong = differences(trainee, whole_state())
    with CheckpointManager(root, _settings(options, mode)) as checkpoints:
        checkpoints.save(2, trainee.state)
        trainee.step()  # staged or written by now: must not reach the checkpoint
    return wrong


def load_on(name: str, roots: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Load every source in turn on one layout; returns what differs, by source."""
    trainee, expected = LAYOUTS[name].build("another", num_steps=0), whole_state()
    found: dict[str, Any] = {}
    for source, root in roots.items():
        with CheckpointManager(root, _settings(options)) as checkpoints:
            result = checkpoints.load(trainee.state)
        found[source] = differences(trainee, expected)
        assert result.step == 2
        trainee.scramble()
    return found


@pytest.fixture(scope="module", params=SaveMode, ids=lambda mode: mode.value)
def local_roots(ranks, tmp_path_factory, request):
    roots = {name: str(tmp_path_factory.mktemp(name)) for name in LAYOUTS}
    for name, root in roots.items():
        wrong = ranks.run(save_on, LAYOUTS[name].world_size, name, root, {}, request.param)
        assert wrong == [[]] * len(wrong)
    return roots


@pytest.mark.parametrize("target", LAYOUTS)
def test_local(ranks, local_roots, target):
    found = ranks.run(load_on, LAYOUTS[target].world_size, target, local_roots, {})

    assert found == [NO_DIFFERENCES] * len(found)


@pytest.fixture(scope="module")
def s3_roots(ranks, s3_server):
    bucket = f"matrix-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    roots = {name: f"s3://{bucket}/{name.replace('_', '-')}" for name in ON_S3}
    for name, root in roots.items():
        world_size, options = LAYOUTS[name].world_size, s3_server.storage_options
        # In the one mode that copies; what either mode hands to a store is compared on disk. Each
        # new run costs about 3 s here: SeaweedFS lets racing creates of a key wait by the second.
        wrong = ranks.run(save_on, world_size, name, root, options, SaveMode.BACKGROUND)
        assert wrong == [[]] * len(wrong)
    return roots


@pytest.mark.s3
@pytest.mark.parametrize("target", ON_S3)
def test_s3(ranks, s3_server, s3_roots, target):
    options = s3_server.storage_options

    found = ranks.run(load_on, LAYOUTS[target].world_size, target, s3_roots, options)

    assert found == [{name: [] for name in ON_S3}] * len(found)
