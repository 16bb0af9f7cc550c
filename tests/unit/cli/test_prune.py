"""The verbs prune, pin, unpin, tag and gc: output, JSON, exit codes, and a job that goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid

import pytest
import torch

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.errors import SaveError, StorageDenied, StorageError
from dcp_resume.manager.policies import KeepLast
from dcp_resume.manager.retention import prune
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.litter import find_litter, grace_limit, remove_litter
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.verify import verify_checkpoint
from dcp_resume.storage import open_store
from dcp_resume.storage.posix_store import PosixStore
from tests.support.built_run import BuiltRun


@pytest.fixture
def built(tmp_path):
    run = BuiltRun(PosixStore(tmp_path / "run"))
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 5.0)):
        run.save(step, loss=loss)
    return run


@pytest.fixture
def root(built, tmp_path):
    return tmp_path / "run"


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def steps(call_json, root):
    return [c["step"] for c in call_json("ls", root)[1]["checkpoints"]]


# --- prune ---


def test_without_yes_prune_shows_what_and_why_and_changes_nothing(root, call):
    before = files(root)
    code, out, err = call("prune", root, "--keep-last", 2, "--keep-best", "loss:min:1")
    lines = [line.split(maxsplit=5) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert lines[0] == ["step", "gen", "time", "size", "action", "because"]
    assert [line[0] for line in lines[1:4]] == ["10", "20", "30"]
    assert ["retire" in line.split() for line in out.splitlines()[1:5]] == [True, *[False] * 3]
    assert "best 1 loss:min = 1" in out.splitlines()[2]
    assert out.splitlines()[4].startswith("*")
    assert "newest, last 2" in out.splitlines()[4]
    assert out.splitlines()[-1].startswith("1 of 4 checkpoint(s), 4 B, would be retired")
    assert files(root) == before
    assert call("prune", root, "--keep-last", 2, "--keep-best", "loss:min:1", "--dry-run")[1] == out


def test_prune_with_yes(root, call, call_json):
    code, out, _ = call("prune", root, "--keep-last", 1, "--keep-every", 20, "--yes")
    assert (code, out.splitlines()[-1][:24]) == (0, "2 checkpoint(s) retired,")
    assert steps(call_json, root) == [20, 40]
    assert {path.split("/")[0] for path in files(root)} == {"log", "step-00000020", "step-00000040"}
    assert call("prune", root, "--keep-last", 1, "--keep-every", 20, "--yes")[1].endswith(
        "0 checkpoint(s) retired, 0 B deleted\n"
    )


def test_prune_as_json(root, call_json):
    _, shown = call_json("prune", root, "--keep-best", "loss:max", "--keep-younger", "36h")
    assert (shown["is_dry_run"], shown["policy"]) == (True, "younger than 36h, best 1 loss:max")
    assert [(c["step"], c["is_kept"], c["is_retired"]) for c in shown["checkpoints"]] == [
        (10, False, False),
        (20, False, False),
        (30, True, False),
        (40, True, False),
    ]
    code, done = call_json("prune", root, "--keep-younger", "36h", "--yes")
    assert code == 0
    assert [c["is_retired"] for c in done["checkpoints"]] == [True, True, False, False]
    assert all((c["freed_bytes"] > 0) == c["is_retired"] for c in done["checkpoints"])
    assert done["checkpoints"][3]["reason"] == "newest, younger than 36h"


def test_prune_finishes_what_an_earlier_one_left_and_leaves_litter_to_gc(built, root, call):
    built.retire(10)
    built.attempt(50)
    assert call("prune", root, "--keep-last", 9, "--yes")[0] == 0
    found = {path.split("/")[0] for path in files(root)}
    assert found == {"log", *(f"step-000000{step}" for step in (20, 30, 40, 50))}


def test_a_deletion_that_fails_is_said_and_the_next_prune_makes_up_for_it(
    root, call, call_json, monkeypatch
):
    def refuse(self, keys):
        raise StorageDenied("not yours", url=self.url, key=next(iter(keys)))

    monkeypatch.setattr(PosixStore, "delete", refuse)
    code, out, _ = call("prune", root, "--keep-last", 2, "--yes")
    assert code == 4
    assert out.count("not deleted whole: not yours") == 2
    code, found = call_json("prune", root, "--keep-last", 1, "--yes")
    assert code == 4
    assert [c["failure"] for c in found["checkpoints"]] == ["not yours", None]
    monkeypatch.undo()
    assert call("prune", root, "--keep-last", 2, "--yes")[0] == 0
    assert {path.split("/")[0] for path in files(root)} == {"log", "step-00000040"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--keep-last", "0"],
        ["--keep-last", "x"],
        ["--keep-best", "loss:least"],
        ["--keep-best", ":min"],
        ["--keep-best", "loss:min:0"],
        ["--keep-best", "loss:min:1:2"],
        ["--keep-younger", "7"],
        ["--keep-younger", "0d"],
        ["--keep-one-per", "soon"],
        ["--keep-last", "1", "--yes", "--dry-run"],
    ],
)
def test_wrong_options_change_nothing(root, call, words):
    before = files(root)
    code, out, err = call("prune", root, *words)
    assert (code, out) == (2, "")
    assert "keep" in err.lower() or "not allowed" in err
    assert files(root) == before


# --- pin, unpin, tag ---


def test_pin_keeps_until_unpin(root, call, call_json):
    code, out, _ = call("pin", root, "--step", 10, "--label", "paper")
    assert (code, out) == (0, "pin: step 10 (log record 2); log record 6\n")
    call("prune", root, "--keep-last", 1, "--yes")
    assert steps(call_json, root) == [10, 40]
    assert "current, pinned" in call("ls", root)[1]
    assert call("unpin", root, "--step", 10)[0] == 0
    call("prune", root, "--keep-last", 1, "--yes")
    assert steps(call_json, root) == [40]
    code, _, err = call("unpin", root, "--step", 40)
    assert (code, "not pinned" in err) == (2, True)
    assert call("pin", root, "--step", 10)[0] == 3


def test_unpin_finds_the_pinned_one_of_a_step_that_was_saved_twice(built, root, call, call_json):
    built.pin(40)
    built.open(10)
    built.save(40)
    assert call("unpin", root, "--step", 40)[0] == 0
    found = call_json("ls", root, "--all")[1]["checkpoints"]
    assert not any(checkpoint["is_pinned"] for checkpoint in found)


def test_tag_is_a_selector(root, call, call_json):
    code, found = call_json("tag", root, "good", "--step", "best")
    assert code == 0
    assert (found["kind"], found["name"], found["step"], found["seq"]) == ("tag", "good", 20, 3)
    assert call_json("pin", root, "--step", "good")[1]["step"] == 20
    assert call_json("ls", root)[1]["checkpoints"][1]["tags"] == ["good"]
    assert "current, pinned, good" in call("ls", root)[1]
    call("unpin", root, "--step", "good")
    call("prune", root, "--keep-tagged", "--yes")
    assert steps(call_json, root) == [20, 40]
    assert call("tag", root, "good", "--delete")[1] == "untag: good; log record 11\n"
    code, _, err = call("pin", root, "--step", "good")
    assert (code, "no usable checkpoint for 'good'" in err) == (3, True)
    assert call("tag", root, "good", "--delete")[0] == 3
    assert call("tag", root, "latest", "--step", 20)[0] == 2


# --- gc ---


def test_gc_shows_litter_and_removes_it_with_yes(built, root, call, call_json):
    built.retire(10)
    built.attempt(50)
    before = [path for path in files(root) if not path.startswith("step-00000010")]
    code, out, _ = call("gc", root)
    assert code == 0
    assert "attempt" not in out, "it is younger than the grace time"
    assert out.splitlines()[1].split()[:3] == ["retired", "step", "10"]
    assert out.splitlines()[-1].startswith("4 object(s) would be removed.")
    code, found = call_json("gc", root, "--older-than", "0s")
    assert [(item["kind"], item["num_objects"]) for item in found["litter"]] == [
        ("retired", 4),
        ("attempt", 1),
    ]
    assert (found["is_dry_run"], found["freed_bytes"]) == (True, 0)
    assert call("gc", root, "--yes")[0] == 0
    assert files(root) == before
    code, out, _ = call("gc", root, "--older-than", "0s", "--yes")
    assert out.splitlines()[-1] == "1 object(s) removed, 4 B"
    assert {path.split("/")[0] for path in files(root)} == {
        "log",
        *(f"step-000000{step}" for step in (20, 30, 40)),
    }


@pytest.mark.parametrize("verb", ["prune", "pin", "unpin", "tag", "gc"])
def test_no_run_and_help(tmp_path, call, verb):
    words = {"prune": ["--keep-last", "1", "--yes"], "tag": ["good"], "gc": ["--yes"]}
    stray = tmp_path / "a" / "step-00000001" / "b" / "shard"
    stray.parent.mkdir(parents=True)
    stray.touch()
    code, out, err = call(verb, tmp_path / "a", *words.get(verb, []))
    assert (code, out) == (3, "")
    assert "it has no log" in err
    assert files(tmp_path) == ["a/step-00000001/b/shard"]
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert "examples:" in out


def test_the_verbs_load_no_torch(root):
    code = (
        "import sys; from dcp_resume.cli.main import main\n"
        f"main(['prune', {str(root)!r}, '--keep-last', '1', '--yes'])\n"
        f"main(['pin', {str(root)!r}]); main(['gc', {str(root)!r}])\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.s3
def test_on_s3(s3_server, call, call_json, monkeypatch):
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    url = f"s3://{bucket}/run"
    store = open_store(url, storage_options=s3_server.storage_options)
    run = BuiltRun(store)
    run.save(10, 20, 30)
    run.attempt(40)
    store.close()
    assert call("pin", url, "--step", 10)[0] == 0
    assert call("prune", url, "--keep-last", 1, "--yes")[0] == 0
    assert steps(call_json, url) == [10, 30]
    assert call("gc", url, "--older-than", "0s", "--yes")[0] == 0
    entries = s3_server.client().list_objects_v2(Bucket=bucket)["Contents"]
    found = {entry["Key"].split("/")[1] for entry in entries}
    assert found == {"log", "step-00000010", "step-00000030"}


# --- beside a job ---


def test_a_job_saves_while_others_prune_and_collect_without_grace(tmp_path):
    """Saves may be refused, for there is no grace time; what is committed is whole, always."""
    url, is_over, faults = str(tmp_path / "run"), threading.Event(), []
    state = {"model": {f"w{number}": torch.full((1000,), 1.0) for number in range(8)}}

    def clean():
        store = open_store(url)
        log = RunLog(store)
        while not is_over.is_set():
            for pruned in prune(store, log, KeepLast(2)):
                faults.extend([pruned.failure] if pruned.failure else [])
            litter = find_litter(store, log, until_s=grace_limit(store, -1.0))
            remove_litter(store, log, litter)

    settings = Settings(mode=SaveMode.BLOCKING, max_checkpoint_keep=2)
    with CheckpointManager(url, settings) as checkpoints:
        checkpoints.save(0, state)
        cleaner = threading.Thread(target=clean)
        cleaner.start()
        committed = [0]
        try:
            for step in range(1, 25):
                try:
                    committed.append(checkpoints.save(step, state).result().step)
                except (SaveError, StorageError):
                    continue  # its attempt was taken for litter
        finally:
            is_over.set()
            cleaner.join()
        assert checkpoints.latest() == committed[-1]
    store = open_store(url)
    for located in find_checkpoints(store, "all"):
        assert verify_checkpoint(store, located).is_whole
    assert faults == []
