"""The command line on real runs: output, JSON, exit codes, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dcp_resume.cli import list_run, printing
from dcp_resume.errors import StorageDenied
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manifest.keys import log_key
from dcp_resume.manifest.models import DocumentRef, TrainerFacts
from dcp_resume.manifest.records import CommitRecord, OpenRecord
from dcp_resume.manifest.wire import encode
from dcp_resume.session.marks import pin, quarantine, retire
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from dcp_resume.storage.posix_store import PosixStore
from tests.support.saved_run import save_steps

# --- ls ---


def test_ls_shows_the_current_line(run, call):
    code, out, err = call("ls", run)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["step", "gen", "time", "size", "loss", "best", "lr", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["10", "20", "*"]
    assert lines[3].split()[1] == "30"
    assert "3.333 @30" in lines[3]
    assert "0.001  current" in lines[3]


def test_ls_all_names_what_no_longer_counts(run, call_json, call):
    save_steps(run, [25], resume=20)
    log = RunLog(open_store(str(run)))
    steps = {record.step: seq for seq, record in log.refresh().commits.items()}
    retire(log, steps[10])
    pin(log, steps[20])
    save_steps(run, [26, 27], resume=25)
    log.refresh()
    quarantine(log, log.history.find_step(27).seq)
    assert call("verify", run, "--step", 27)[0] == 0  # its files are kept, to be looked at
    assert call("verify", run, "--step", 10)[0] == 3
    code, found = call_json("ls", run, "--all")
    assert code == 0
    assert {c["step"]: c["state"] for c in found["checkpoints"]} == {
        10: "retired",
        20: "current",
        30: "rolled back",
        25: "current",
        26: "current",
        27: "quarantined",
    }
    assert [c["step"] for c in found["checkpoints"] if c["is_newest"]] == [26]
    assert [c["step"] for c in found["checkpoints"] if c["is_pinned"]] == [20]
    assert (found["newest_step"], found["generation"]) == (26, 3)
    _, short = call_json("ls", run)
    assert [c["step"] for c in short["checkpoints"]] == [20, 25, 26]
    assert "current, pinned" in call("ls", run)[1]


def test_ls_json_has_no_infinities(tmp_path, call_json):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.ones(2)}}).result()
    _, found = call_json("ls", tmp_path)
    assert found["checkpoints"][0]["trainer"]["best_loss"] is None


def write_log(root, count):
    common = {"run": "0b0c3b1e-0000-4000-8000-000000000000", "created": "2026-01-01T00:00:00Z"}
    opened = OpenRecord(**common, generation=1, resume_source=None, incarnation="x")
    (root / "log").mkdir(parents=True)
    (root / log_key(1)).write_bytes(encode(opened))
    for seq in range(2, count + 2):
        record = CommitRecord(
            **common,
            generation=1,
            step=seq,
            attempt=f"a{seq}",
            manifest=DocumentRef(key=f"step-{seq:08d}/a{seq}/manifest.json", size=1, digest="x"),
            parent=None,
            num_bytes=10**9,
            trainer=TrainerFacts(step=seq, metrics={"loss": 2.0}),
        )
        (root / log_key(seq)).write_bytes(encode(record))


def test_ls_of_a_thousand_loads_no_torch(tmp_path):
    write_log(tmp_path, 1000)
    program = (
        "import sys; from dcp_resume.cli.main import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'numpy', 'fsspec'} & set(sys.modules); sys.exit(code)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, "ls", tmp_path], capture_output=True, check=True
    )
    assert len(found.stdout.splitlines()) == 1001


# --- inspect ---


def test_inspect(run, call):
    code, out, _ = call("inspect", run, "--step", "20", "--tensors")
    assert code == 0
    assert out.splitlines()[0].split() == ["step", "20"]
    assert "samples      64, tokens 0" in out
    assert "best loss    5 at step 20" in out
    tree = [line.split() for line in out.partition("placements")[2].splitlines()]
    assert ["model", "2", "tensors", "144", "B"] in tree
    assert ["weight", "float32", "replicated", "4,", "8", "-", "128", "B"] in tree


def test_inspect_sums_up_what_lies_deeper_than_asked(run, call):
    out = call("inspect", run, "--depth", 1)[1]
    tree = [line.split() for line in out.partition("placements")[2].splitlines()[1:]]
    assert tree == [
        ["model", "2", "tensors", "144", "B"],
        ["optim", "6", "tensors", "296", "B"],
    ]
    assert call("inspect", run, "--depth", 0)[0] == 2


def test_inspect_json(run, call_json):
    code, found = call_json("inspect", run, "--step", "best", "--tensors")
    assert code == 0
    assert found["manifest"]["step"] == 30
    assert {t["fqn"] for t in found["tensors"]} >= {"model.weight", "optim.state.weight.exp_avg"}
    assert set(found["manifest"]["parts"]) == {"model", "optim", "trainer"}


# --- reshard ---


def test_reshard(run, tmp_path, call, call_json):
    layout = tmp_path / "layout.json"
    layout.write_text('{"rules": [{"match": "model.weight", "tp": 0}]}')
    target = tmp_path / "b"
    code, found = call_json("reshard", run, target, "--to", "tp=2", "--layout", layout)
    assert code == 0
    assert (found["step"], found["world_size"], found["mesh"]) == (30, 2, "tp=2")
    kept = {item["fqn"] for item in found["kept_replicated"]}
    assert "model.bias" in kept
    assert not {"model.weight", "optim.state.weight.exp_avg"} & kept
    assert call("verify", target)[0] == 0
    code, out, _ = call("reshard", run, target, "--to", "tp=4", "--step", 20)
    assert code == 0
    assert "kept replicated" in out
    assert [c["step"] for c in call_json("ls", target)[1]["checkpoints"]] == [30, 20]
    code, out, err = call("reshard", run, tmp_path / "c", "--to", "tp=2", "--strict")
    assert (code, out) == (1, "")
    assert "model.weight" in err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "expected an object"),
        ('{"rule": []}', "unknown field 'rule'"),
        ('{"rules": [{"tp": 0}]}', "'match'"),
        ('{"rules": [{"match": "*", "tp": -1}], "axes": 3}', "axes"),
        ('{"rules": [{"match": "*.weight", "tp": 7}]}', "dim 7"),
    ],
)
def test_wrong_layout_files(run, tmp_path, call, text, message):
    (tmp_path / "layout.json").write_text(text)
    code, _, err = call(
        "reshard", run, tmp_path / "b", "--to", "tp=2", "--layout", tmp_path / "layout.json"
    )
    assert code == 2
    assert message in err
    assert not (tmp_path / "b").exists()


# --- arguments and errors ---


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["ls"],
        ["inspect", "x", "--step", "NEWEST"],
        ["verify", "x", "--step", "-1"],
        ["reshard", "a", "b"],
        ["ls", "memory://x", "--storage-option", "novalue"],
        ["ls", "runs", "--storage-option", "key=value"],
        ["ls", "nosuchscheme://x"],
        ["reshard", "a", "b", "--to", "tp=two"],
        ["reshard", "a", "b", "--to", "tp=2", "--layout", "/nonexistent.json"],
        ["reshard", "a", "b", "--to", "tp=2", "--window-mib", "0"],
    ],
)
def test_wrong_arguments(call, words):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err


@pytest.mark.parametrize("verb", ["ls", "inspect", "verify"])
def test_no_run(tmp_path, call, verb):
    code, out, err = call(verb, tmp_path / "nothing")
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1


def test_no_such_step(run, call):
    code, _, err = call("inspect", run, "--step", 11)
    assert code == 3
    assert "[10, 20, 30]" in err


def test_a_store_that_fails(run, call, monkeypatch):
    def refuse(self, prefix, *, start_after=""):
        raise StorageDenied(f"cannot list {prefix}", url=self.url, key=prefix)

    monkeypatch.setattr(PosixStore, "list", refuse)
    for words in (["ls", run], ["verify", run], ["reshard", run, run, "--to", "tp=2"]):
        code, out, err = call(*words)
        assert (code, out, err) == (4, "", "dcp-resume: cannot list log/\n")


def test_debug_shows_the_traceback(tmp_path, call):
    assert "Traceback" in call("ls", tmp_path, "--debug")[2]


def test_interrupted(run, call, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(list_run, "open_run", interrupt)
    code, _, err = call("ls", run)
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "verb", [None, "ls", "inspect", "verify", "reshard", "quarantine", "unquarantine"]
)
def test_help_teaches(call, verb):
    code, out, _ = call(*[word for word in (verb, "--help") if word])
    assert code == 0
    assert "examples:" in out
    assert "exit codes:" in out


def test_an_operator_quarantines_and_lifts_it_again(run, call, call_json):
    code, out, _ = call("quarantine", run, 30, "--reason", "the loss went up")
    assert (code, out) == (0, "step 30 is quarantined; the run would resume from step 20\n")
    assert call("quarantine", run, 30)[0] == 3

    code, found = call_json("unquarantine", run, 30)
    assert code == 0
    assert (found["state"], found["newest_step"]) == ("current", 30)
    assert call("unquarantine", run, 30)[0] == 3


def test_the_step_of_a_quarantine_may_be_given_as_to_other_verbs(run, call):
    assert call("quarantine", run, "--step", 30)[0] == 0
    assert call("unquarantine", "--step", 30, run)[1].startswith("step 30 is current")
    for wrong in ([run], [run, 30, "--step", 20]):
        assert call("quarantine", *wrong)[0] == 2


def test_a_quarantine_lifted_after_the_run_went_on(run, call):
    call("quarantine", run, 30)
    save_steps(run, [25], resume="latest")

    _, out, _ = call("unquarantine", run, 30)

    assert out == "step 30 is rolled back; the run would resume from step 25\n"
    save_steps(run, [35], resume=30)
    assert call("ls", run)[1].splitlines()[-2].split()[0] == "30"


def test_as_a_module(run):
    module = [sys.executable, "-m", "dcp_resume", "ls", str(run)]
    found = subprocess.run(module, capture_output=True, text=True, check=True)
    assert len(found.stdout.splitlines()) == 4


def test_a_terminal_without_rich_gets_plain_text(run, call, monkeypatch):
    plain = call("ls", run)[1]
    monkeypatch.setattr(printing, "_is_terminal", lambda stream: True)
    with_rich = call("ls", run)[1]
    assert with_rich.split() == plain.split()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert call("ls", run)[1] == plain
