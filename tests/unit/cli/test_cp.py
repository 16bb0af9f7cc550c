"""``cp``: what arrives, what counts, what is not copied twice, and what is refused."""

from __future__ import annotations

import shutil
import uuid

import pytest
import torch

from dcp_resume import CheckpointManager, HmacKey, SaveMode, Settings, SignedBy, Signing
from dcp_resume.cli.main import main
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from dcp_resume.storage.posix_store import PosixStore
from tests.support.saved_run import flip, newest_file, save_steps


def outcomes(found):
    return [(c["step"], c["outcome"]) for c in found["checkpoints"]]


def steps(call_json, root, *words):
    return [c["step"] for c in call_json("ls", root, *words)[1]["checkpoints"]]


def files(root):
    found = root.glob("step-*/*/*")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_the_newest_checkpoint_arrives_byte_for_byte_and_counts(run, tmp_path, call_json, call):
    target = tmp_path / "b"
    code, found = call_json("cp", run, target)
    assert (code, outcomes(found)) == (0, [(30, "copied")])
    copied = files(target)
    assert copied
    assert copied.items() <= files(run).items()
    assert call("verify", target, "--step", "all")[0] == 0
    a, b = (call_json("ls", root)[1]["checkpoints"][-1] for root in (run, target))
    for same in ("step", "created", "num_bytes", "attempt", "manifest", "trainer", "state"):
        assert a[same] == b[same], same
    a, b = (RunLog(open_store(str(root))).refresh().newest().record for root in (run, target))
    assert a.times is not None
    assert a.times == b.times
    assert call_json("diff", run, target)[1]["is_equal"]


def test_a_job_goes_on_from_the_copy(run, tmp_path, call_json):
    call_json("cp", run, tmp_path / "b", "--all")
    save_steps(tmp_path / "b", [40], resume=30)
    assert steps(call_json, tmp_path / "b") == [10, 20, 30, 40]


def test_all_copies_the_line_in_its_order_with_pins_and_tags(run, tmp_path, call, call_json):
    call("pin", run, "--step", 10)
    call("tag", run, "good", "--step", 20)
    code, found = call_json("cp", run, tmp_path / "b", "--all")
    assert (code, outcomes(found)) == (0, [(10, "copied"), (20, "copied"), (30, "copied")])
    _, listed = call_json("ls", tmp_path / "b")
    assert listed["newest_step"] == 30
    assert [(c["is_pinned"], c["tags"]) for c in listed["checkpoints"]] == [
        (True, []),
        (False, ["good"]),
        (False, []),
    ]


def test_a_second_copy_brings_only_what_is_new(run, tmp_path, call, call_json):
    call_json("cp", run, tmp_path / "b", "--all")
    before = sorted((tmp_path / "b" / "log").iterdir())
    assert outcomes(call_json("cp", run, tmp_path / "b", "--all")[1])[-1] == (30, "present")
    assert sorted((tmp_path / "b" / "log").iterdir()) == before
    save_steps(run, [40], resume=30)
    call("tag", run, "good", "--step", 10)
    _, found = call_json("cp", run, tmp_path / "b", "--all")
    assert [o for _, o in outcomes(found)] == ["present", "present", "present", "copied"]
    assert call_json("ls", tmp_path / "b")[1]["checkpoints"][0]["tags"] == ["good"]


def test_files_of_a_copy_that_was_cut_off_are_kept_if_they_are_right(run, tmp_path, call_json):
    target = tmp_path / "b"
    shutil.copytree(newest_file(run, "manifest.json").parent.parent, target / "step-00000030")
    flip(newest_file(target, "*-model-*"), -1)
    code, found = call_json("cp", run, target)
    (one,) = found["checkpoints"]
    assert code == 0
    assert one["num_bytes"] == newest_file(run, "*-model-*").stat().st_size
    assert one["kept_bytes"] == sum(p.stat().st_size for p in run.glob("step-*30/*/*-optim-*"))
    assert files(target).items() <= files(run).items()


class CutOff(RuntimeError):
    """As a process that is killed: nothing of ours handles it."""


def test_a_copy_that_ends_before_its_commit_counts_for_nothing(
    run, tmp_path, call, call_json, monkeypatch
):
    def cut_off(self, key, data):
        raise CutOff(key)

    with monkeypatch.context() as patch:
        patch.setattr(PosixStore, "create", cut_off)
        with pytest.raises(CutOff):
            main(["cp", str(run), str(tmp_path / "b")])
    assert call("ls", tmp_path / "b")[0] == 3
    _, found = call_json("cp", run, tmp_path / "b")
    assert [c["num_bytes"] for c in found["checkpoints"]] == [0]
    assert call("verify", tmp_path / "b")[0] == 0


def test_a_directory_with_other_things_is_refused(run, tmp_path, call):
    other = tmp_path / "b" / "notes.txt"
    other.parent.mkdir()
    other.write_text("mine")
    code, _, err = call("cp", run, other.parent)
    assert code == 2
    assert "holds 'notes.txt'" in err
    assert list(other.parent.iterdir()) == [other]
    assert call("cp", run, other.parent / "run")[0] == 0
    (tmp_path / "empty").mkdir()
    assert call("cp", run, tmp_path / "empty")[0] == 0
    shutil.copy(other, tmp_path / "empty" / "notes.txt")  # beside what is a run by now
    assert call("cp", run, tmp_path / "empty", "--all")[0] == 1  # and not because of the notes
    assert call("cp", run, tmp_path / "empty")[0] == 0


def test_a_damaged_checkpoint_is_named_and_left_out(run, tmp_path, call, call_json):
    victim = next(iter(run.glob("step-00000020/*/*-model-*")))
    flip(victim, -1)
    code, found = call_json("cp", run, tmp_path / "b", "--all")
    assert (code, outcomes(found)) == (1, [(10, "copied"), (20, "damaged"), (30, "copied")])
    (problem,) = found["checkpoints"][1]["problems"]
    assert problem["where"].endswith(victim.name)
    assert "model.weight[0:4, 0:8]" in problem["message"]
    assert steps(call_json, tmp_path / "b") == [10, 30]
    assert "damaged" in call("cp", run, tmp_path / "c", "--step", 20)[1]
    assert call("ls", tmp_path / "c")[0] == 3


def test_what_the_target_retired_is_not_brought_back(run, tmp_path, call, call_json):
    call("cp", run, tmp_path / "b", "--all")
    call("prune", tmp_path / "b", "--keep-last", 2, "--yes")
    code, found = call_json("cp", run, tmp_path / "b", "--all")
    assert (code, outcomes(found)[0]) == (0, (10, "retired"))
    assert call("cp", run, tmp_path / "b", "--step", 10)[0] == 1
    assert steps(call_json, tmp_path / "b") == [20, 30]


def test_a_rollback_of_the_source_is_one_at_the_target(run, tmp_path, call_json):
    call_json("cp", run, tmp_path / "b", "--all")
    save_steps(run, [25], resume=20)
    assert call_json("cp", run, tmp_path / "b", "--all")[0] == 0
    assert steps(call_json, tmp_path / "b") == [10, 20, 25]


def test_no_copy_takes_the_targets_newest_place_from_a_younger_one(run, tmp_path, call):
    call("cp", run, tmp_path / "b")
    code, _, err = call("cp", run, tmp_path / "b", "--step", 10)
    assert code == 1
    assert "its newest checkpoint is step 30, which is younger" in err
    save_steps(tmp_path / "b", [40], resume=30)
    save_steps(run, [50], resume=30)
    code, _, err = call("cp", run, tmp_path / "b")
    assert code == 1
    assert "step 40, which the source does not have" in err
    assert "another root" in err


def test_another_run_at_the_target_is_not_mixed_with(run, tmp_path, call):
    save_steps(tmp_path / "b", [10])
    code, _, err = call("cp", run, tmp_path / "b")
    assert code == 1
    assert "belongs to run" in err


def test_quarantined_ones_are_refused_or_left_out(run, tmp_path, call, call_json):
    call("quarantine", run, 30)
    code, _, err = call("cp", run, tmp_path / "b", "--step", 30)
    assert code == 1
    assert "quarantined" in err
    assert outcomes(call_json("cp", run, tmp_path / "b", "--all")[1])[-1] == (20, "copied")


def test_what_litter_collection_gave_up_is_refused(run, tmp_path, call, call_json):
    target = tmp_path / "b"
    call("cp", run, target, "--step", 10)
    shutil.copytree(next(iter(run.glob("step-00000020"))), target / "step-00000020")
    call("gc", target, "--older-than", "0s", "--yes")
    code, _, err = call("cp", run, target, "--step", 20)
    assert code == 1
    assert "gave its attempt" in err


def test_a_directory_without_a_log_is_copied_into_a_run(run, tmp_path, call, call_json):
    alone = shutil.copytree(newest_file(run, "manifest.json").parent, tmp_path / "alone")
    assert call("cp", alone, tmp_path / "b")[0] == 0
    assert (
        RunLog(open_store(str(tmp_path / "b"))).refresh().run
        == RunLog(open_store(str(run))).refresh().run
    )
    assert call("verify", tmp_path / "b")[0] == 0


def test_a_signed_checkpoint_is_a_signed_one_where_it_arrives(tmp_path, call):
    key = HmacKey("team", bytes(range(32)))
    signing = Signing(key, SignedBy(key))
    with CheckpointManager(
        tmp_path / "a", Settings(mode=SaveMode.BLOCKING, signing=signing)
    ) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.ones(4)}})
    (tmp_path / "keys").write_text(f"hmac-sha256 team {bytes(range(32)).hex()}\n")
    keys = ["--keys", tmp_path / "keys"]
    assert call("cp", tmp_path / "a", tmp_path / "b", *keys)[0] == 0
    assert call("verify", tmp_path / "b", *keys)[0] == 0
    (tmp_path / "other").write_text(f"hmac-sha256 team {bytes(32).hex()}\n")
    code, _, err = call("cp", tmp_path / "a", tmp_path / "c", "--keys", tmp_path / "other")
    assert code == 1
    assert "sign" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.s3
def test_to_a_bucket_and_back(run, tmp_path, s3_server, bucket, call, call_json):
    options = s3_server.storage_options
    words = [
        word
        for name in ("endpoint_url", "key", "secret")
        for word in ("--storage-option", f"{name}={options[name]}")
    ]
    url = f"s3://{bucket}/{uuid.uuid4().hex}"
    assert call("cp", run, url, "--all", *words)[0] == 0
    assert call("verify", url, "--step", "all", *words)[0] == 0
    assert call("cp", url, tmp_path / "back", "--all", *words)[0] == 0
    assert files(tmp_path / "back") == files(run)
    assert call("ls", tmp_path / "back")[0] == 0
