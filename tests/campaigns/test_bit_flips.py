"""One wrong bit anywhere is found; ``make campaign-bit-flips`` asks ten thousand times."""

from __future__ import annotations

import shutil

import pytest

from dcp_resume import open_store
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.verify import verify_checkpoint
from tests.support.damage import flip

from .bit_flips import flip_bits, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("flips") / "run"
    make_run(root)
    return root


def test_flipped_bits_are_named_and_never_loaded(run):
    outcomes = list(flip_bits(run, flips=300, seed=7))
    assert [outcome for outcome in outcomes if not outcome.is_found] == []
    kinds = {outcome.flip.kind for outcome in outcomes}
    assert kinds == {"log record", "manifest.json", "catalog.json", "chunk-index", "data file"}


def test_a_manifest_that_was_copied_without_its_log_proves_itself(run, tmp_path):
    (attempt,) = (run / "step-00000002").iterdir()
    copy = shutil.copytree(attempt, tmp_path / "copy")
    store = open_store(str(copy))
    (located,) = find_checkpoints(store, "latest")
    assert verify_checkpoint(store, located).is_whole
    manifest = copy / "manifest.json"
    for position in (0, manifest.stat().st_size // 2, -1):
        flip(manifest, position)
        found = verify_checkpoint(store, located)
        assert [p.where.partition(":")[0] for p in found.problems] == ["manifest.json"], position
        flip(manifest, position)
