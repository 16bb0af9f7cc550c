"""The example trainer's flags reach the checkpoint."""

from __future__ import annotations

import json

import pytest

from tests.support.ranks import Failed
from tests.support.training import TINY, digests_after

pytestmark = pytest.mark.ranks


def documents(run, name):
    """Step → one document of its checkpoint."""
    found = {}
    for path in run.glob(f"step-*/*/{name}"):
        found[int(path.parent.parent.name.removeprefix("step-"))] = json.loads(path.read_text())
    return found


def parts_of(catalog):
    """Parts of the state that have bytes."""
    return {entry["part"] for entry in (*catalog["files"], *catalog["tensors"])}


def weights_of(digests):
    return {name: digest for name, digest in digests.items() if "/" not in name}


def test_without_optimizer_state_no_byte_of_it_is_saved_and_k_checkpoints_are_kept(ranks, tmp_path):
    """INFINITRAIN 2, 3, 7, 8, 10."""
    saving = f"{TINY} --num_iteration 5 --save {tmp_path}"
    flags = "--save_interval 2 --max_checkpoint_keep 0"
    (with_moments,) = ranks.run(digests_after, 1, f"{saving}/all {flags}")
    flags = "--save_interval 1 --max_checkpoint_keep 2 --save_optimizer_state false"
    (weights,) = ranks.run(digests_after, 1, f"{saving}/weights {flags}")
    assert weights == with_moments

    assert sorted(documents(tmp_path / "all", "manifest.json")) == [2, 4, 5]
    catalogs = documents(tmp_path / "weights", "catalog.json")
    assert sorted(catalogs) == [4, 5]
    all_parts = parts_of(documents(tmp_path / "all", "catalog.json")[5])
    for catalog in catalogs.values():
        assert parts_of(catalog) == all_parts - {"optim"} != all_parts
    manifest = documents(tmp_path / "weights", "manifest.json")[5]
    assert "optim" not in manifest["parts"]
    assert manifest["notes"]["virtual_pipeline_parallel"] == 1

    loading = f"{TINY} --num_iteration 5 --load {tmp_path}"
    (refused,) = ranks.outcomes(digests_after, 1, f"{loading}/weights")
    assert isinstance(refused, Failed)
    assert type(refused.error).__name__ == "LoadRefused"
    assert "optim" in str(refused.error)
    for run in ("weights", "all"):
        command = f"{loading}/{run} --load_optimizer_state false"
        (loaded,) = ranks.run(digests_after, 1, command)
        assert loaded == weights_of(with_moments)  # and no moments
