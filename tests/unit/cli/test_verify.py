"""``verify``, and what the other verbs say, of damaged and of copied checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest

from dcp_resume.manifest.keys import log_key
from tests.support.saved_run import flip, newest_file


def test_verify_of_a_whole_run(run, call, call_json):
    code, out, _ = call("verify", run)
    assert code == 0
    assert out.startswith("step 30 (step-00000030/")
    code, found = call_json("verify", run, "--step", "all")
    assert (code, found["is_whole"]) == (0, True)
    assert [c["step"] for c in found["checkpoints"]] == [10, 20, 30]
    sizes = sum(path.stat().st_size for path in run.glob("step-*/*/*.safetensors"))
    assert sum(c["num_bytes"] for c in found["checkpoints"]) == sizes


def problems_of(call_json, run):
    code, found = call_json("verify", run)
    assert code == 1
    assert found["is_whole"] is False
    return [
        (p["where"].rpartition("/")[2], p["kind"], p["message"])
        for p in found["checkpoints"][0]["problems"]
    ]


def test_verify_names_file_block_and_tensor(run, call_json, call):
    victim = newest_file(run, "*-model-*.safetensors")
    flip(victim, -1)
    ((name, kind, message),) = problems_of(call_json, run)
    assert (name, kind) == (victim.name, "digest")
    assert "block 1 (" in message
    assert "model.weight" in message
    assert call("verify", run, "--step", 20)[0] == 0
    code, out, _ = call("verify", run, "--step", "all")
    assert (code, out.count("DAMAGED"), out.count("whole")) == (1, 1, 2)


def test_verify_lists_every_problem(run, call_json):
    model, optim = newest_file(run, "*-model-*"), newest_file(run, "*-optim-*")
    trailing = newest_file(run, "*-trainer-*") if list(run.glob("*/*/*-trainer-*")) else None
    assert trailing is None  # all of it is in the manifest
    flip(model, 20)
    optim.unlink()
    found = problems_of(call_json, run)
    assert [(name, kind) for name, kind, _ in found if name == optim.name] == [
        (optim.name, "missing")
    ]
    assert {kind for name, kind, _ in found if name.startswith(model.name)} >= {"digest"}


def test_verify_of_a_truncated_file(run, call_json):
    victim = newest_file(run, "*-optim-*")
    victim.write_bytes(victim.read_bytes()[:-7])
    kinds = {kind for _, kind, _ in problems_of(call_json, run)}
    assert kinds == {"size", "read"}


@pytest.mark.parametrize(
    ("name", "position"), [("manifest.json", 30), ("catalog.json", 30), ("chunk-index", -5)]
)
def test_verify_of_a_damaged_document(run, call_json, name, position):
    flip(newest_file(run, name), position)
    ((where, kind, _),) = problems_of(call_json, run)
    assert (where, kind) == (name, "digest")


@pytest.mark.parametrize("name", ["manifest.json", "catalog.json", "chunk-index"])
def test_verify_of_a_missing_document(run, call_json, name):
    newest_file(run, name).unlink()
    ((where, kind, _),) = problems_of(call_json, run)
    assert (where, kind) == (name, "missing")


def test_a_newer_format_is_refused_by_name(run, tmp_path, call, call_json):
    copy = shutil.copytree(newest_file(run, "manifest.json").parent, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["format"]["major"] = 2
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert problems_of(call_json, copy)[0][1] == "major"
    code, out, err = call("inspect", copy, "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "UnsupportedFormat"
    assert "newer format" in err
    assert "Traceback" not in err


def test_a_damaged_log_record(run, call):
    flip(run / log_key(2), 0)
    code, _, err = call("ls", run)
    assert code == 1
    assert err.startswith("dcp-resume: ")
    assert log_key(2) in err


def test_a_copied_directory_needs_no_log(run, tmp_path, call, call_json):
    copy = shutil.copytree(newest_file(run, "manifest.json").parent, tmp_path / "copy")
    assert call("inspect", copy)[0] == 0
    assert call("inspect", copy, "--step", 30)[0] == 0
    assert call("inspect", copy, "--step", 20)[0] == 3
    assert call_json("verify", copy)[1]["is_whole"] is True
    assert call("reshard", copy, tmp_path / "out", "--to", "dp=1")[0] == 0
    flip(copy / "catalog.json", 40)
    code, _, err = call("inspect", copy)
    assert code == 1
    assert "catalog.json" in err


def sampled(call_json, run, sample, *more):
    code, found = call_json("verify", run, "--sample", sample, *more)
    (one,) = found["checkpoints"]
    return code, one["num_blocks"], one["num_bytes"]


def test_parts_of_a_checkpoint_are_together_the_whole(run, call_json):
    _, found = call_json("verify", run)
    (whole,) = found["checkpoints"]
    parts = [sampled(call_json, run, f"{number}/2") for number in (1, 2)]
    assert all(num_bytes < whole["num_bytes"] for _, _, num_bytes in parts)
    assert sum(num_blocks for _, num_blocks, _ in parts) == whole["num_blocks"]
    assert sum(num_bytes for _, _, num_bytes in parts) == whole["num_bytes"]
    flip(newest_file(run, "*-model-*"), -1)
    assert sorted(sampled(call_json, run, f"{number}/2")[0] for number in (1, 2)) == [0, 1]


def test_a_share_is_drawn_again_by_its_seed(run, call, call_json):
    flip(newest_file(run, "*-model-*"), -1)
    codes = [sampled(call_json, run, "50%", "--seed", seed)[0] for seed in range(12)]
    assert {*codes} == {0, 1}
    assert codes == [sampled(call_json, run, "50%", "--seed", seed)[0] for seed in range(12)]
    assert sampled(call_json, run, "100%")[0] == 1
    _, out, _ = call("verify", run, "--sample", "50%", "--seed", codes.index(0))
    assert f"nothing wrong in the sample, 50% (seed {codes.index(0)})" in out


@pytest.mark.parametrize(
    "words",
    [
        ["--sample", "0%"],
        ["--sample", "101%"],
        ["--sample", "3/2"],
        ["--sample", "half"],
        ["--seed", "1"],
        ["--sample", "50%", "--tensors"],
    ],
)
def test_a_sample_that_cannot_be_is_refused(run, call, words):
    assert call("verify", run, *words)[0] == 2
