"""The proof of a resume, on trainings of this process that its legs copy into place."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_resume.cli.main import main
from dcp_resume.errors import ConfigurationError, LegFailed
from dcp_resume.proof.resume import ProofPlan, Scratch, Verdict, prove_resume
from tests.support.forgetful_trainer import train

STOP, LAST = 3, 5
COPY = ("sh", "-c", 'mkdir -p "$1" && cp -r "$0"/. "$1"', "{prepared}/{leg}", "{run}", "{stop}")
FIRST = {"rng": "rng.torch[8]", "data": "data.next_row: 5 and 2", "schedule": "schedule._last_lr"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What to forget → the runs that a straight, a stopped and a resumed leg leave."""
    root = tmp_path_factory.mktemp("trained")
    train(str(root / "straight"), LAST, LAST, "nothing")
    train(str(root / "stopped"), STOP, LAST, "nothing")
    places = {}
    for forgotten in ("nothing", *FIRST, "everything"):
        places[forgotten] = place = root / forgotten
        place.mkdir()
        for leg in ("straight", "stopped"):
            (place / leg).symlink_to(root / leg)
        shutil.copytree(root / "stopped", place / "resumed")
        train(str(place / "resumed"), LAST, LAST, forgotten)
    return places


@pytest.fixture
def prove(tmp_path):
    def prove(prepared, stop=STOP, last=LAST, command=COPY):
        words = tuple(word.replace("{prepared}", str(prepared)) for word in command)
        return prove_resume(ProofPlan(words, stop, last), Scratch.at(str(tmp_path / "scratch")))

    return prove


def test_a_resume_that_brings_everything_back_is_exact(trained, prove):
    proof = prove(trained["nothing"])

    assert proof.verdict is Verdict.EXACT
    (found,) = proof.differences  # the straight leg saved steps 2, 4 and 5: nothing at the stop
    assert (found.step_a, found.step_b) == (LAST, LAST)
    assert (found.num_tensors, found.num_values) == (4, 45)
    assert set(found.passed_over) == {"trainer.wall_time_s", "trainer.lineage"}
    assert not proof.is_reproducible_to_the_stop


@pytest.mark.parametrize("forgotten", FIRST)
def test_what_a_resume_forgets_is_the_first_item_that_is_named(trained, prove, forgotten):
    proof = prove(trained[forgotten])

    assert proof.verdict is Verdict.NOT_EXACT
    lines = list(proof.differences[-1].lines())
    assert lines[0].startswith(FIRST[forgotten])
    assert {item.part for item in proof.differences[-1].tensors} == {"model", "optim"}


def test_a_training_that_ignores_its_checkpoint_proves_nothing(trained, prove):
    """Its result equals the straight one: it is the straight one."""
    with pytest.raises(LegFailed, match=r"began anew instead of going on from step 3") as caught:
        prove(trained["everything"])
    assert (caught.value.leg, caught.value.returncode) == ("resumed", 0)


def test_trainings_that_differ_before_any_resume_say_so(trained, prove, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "straight").symlink_to(trained["nothing"] / "straight")
    train(str(other / "stopped"), 4, LAST, "nothing", start=8)

    proof = prove(other, stop=4)

    assert proof.verdict is Verdict.NOT_REPRODUCIBLE
    assert [found.step_a for found in proof.differences] == [4]


def test_the_stop_is_compared_too_where_the_straight_leg_kept_it(trained, prove, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "straight").symlink_to(trained["nothing"] / "straight")
    train(str(whole / "stopped"), 4, LAST, "nothing")
    shutil.copytree(whole / "stopped", whole / "resumed")
    train(str(whole / "resumed"), LAST, LAST, "nothing")

    proof = prove(whole, stop=4)

    assert proof.verdict is Verdict.EXACT
    assert [found.step_a for found in proof.differences] == [4, 5]
    assert proof.is_reproducible_to_the_stop


def test_a_resume_that_counts_its_steps_anew_proves_nothing(trained, prove, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(trained["nothing"], again, symlinks=True)
    shutil.rmtree(again / "resumed")
    shutil.copytree(trained["nothing"] / "stopped", again / "resumed")
    train(str(again / "resumed"), LAST, LAST, "steps")

    with pytest.raises(LegFailed, match=r"saved step 2 anew after the resume from step 3"):
        prove(again)


@pytest.mark.parametrize(
    ("script", "returncode", "message"),
    [
        ("echo one; echo two >&2; exit 3", 3, r"ended with 3:(.|\n)*\| one\n  \| two\n"),
        ("kill -9 $$", -9, r"was ended by SIGKILL:(.|\n)*\(nothing\)"),
        ("true", 0, r"ended well, but left no checkpoint at"),
    ],
)
def test_a_leg_that_fails_is_shown_with_the_end_of_what_it_said(
    prove, tmp_path, script, returncode, message
):
    with pytest.raises(LegFailed, match=message) as caught:
        prove("unused", command=("sh", "-c", script, "{run}", "{stop}"))
    assert (caught.value.leg, caught.value.returncode) == ("straight", returncode)
    assert caught.value.output == str(tmp_path / "scratch" / "straight.out")
    shown = f"$ sh -c {shlex.quote(script)} {tmp_path}/scratch/straight 5\n"
    assert shown in str(caught.value)


def test_a_leg_that_does_not_stop_is_found(trained, prove):
    with pytest.raises(LegFailed, match="left step 3 as its newest checkpoint, not step 2"):
        prove(trained["nothing"], stop=2)


def test_a_program_that_is_not_there_is_named(prove):
    with pytest.raises(LegFailed, match=r"cannot be started \(.*no-such-program"):
        prove("unused", command=("no-such-program", "{run}", "{stop}"))


def test_plans_that_cannot_work_are_refused_before_anything_runs(trained, prove):
    with pytest.raises(ConfigurationError, match=r"\{stop\} is not in: train --to '\{run\}'"):
        ProofPlan(("train", "--to", "{run}"), 2, 4)
    for stop, last in ((0, 4), (4, 4), (5, 4)):
        with pytest.raises(ConfigurationError, match="below the last one"):
            ProofPlan(("train", "{run}", "{stop}"), stop, last)
    prove(trained["nothing"])
    with pytest.raises(ConfigurationError, match="holds a run already"):
        prove(trained["nothing"])


def test_placeholders_are_filled_and_other_braces_left_alone(tmp_path):
    plan = ProofPlan(
        ("t", '{"a": 1}', "{stop}/{last}", "{leg}", "{run}"), 2, 4, resume_words=("--from", "{run}")
    )
    scratch = Scratch.at(str(tmp_path))

    stopped, resumed = (plan.leg(name, "resumed", 2, scratch) for name in ("stopped", "resumed"))

    words = ("t", '{"a": 1}', "2/4", "stopped", f"{tmp_path}/resumed")
    assert stopped.words == words
    assert resumed.words == (*words[:3], "resumed", words[4], "--from", words[4])


def test_the_verb_says_it_and_removes_what_it_made_only_if_it_succeeds(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def call(forgotten, *words):
        command = [w.replace("{prepared}", str(trained[forgotten])) for w in COPY]
        code = main(["prove", "--stop-at", "3", "--last", "5", *words, "--", *command])
        return code, capsys.readouterr().out, list(tmp_path.iterdir())

    code, out, left = call("nothing")
    assert (code, left) == (0, [])
    assert "PROVEN: the training that was stopped at step 3 and resumed is at step 5" in out
    code, out, left = call("data", "--json")
    document = json.loads(out)
    assert (code, document["verdict"], len(left)) == (5, "not exact", 1)
    assert document["differences"][0]["values"][0]["fqn"] == "data.next_row"
    code, out, left = call("schedule", "--scratch", str(tmp_path / "mine"))
    assert code == 5
    assert "NOT PROVEN" in out
    assert "whether two trainings agree up to the stop is not known" in out
    assert f"dcp-resume diff {tmp_path}/mine/straight {tmp_path}/mine/resumed" in out
    assert (tmp_path / "mine" / "straight.out").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def is_running(pid: int) -> bool:
    """Whether a process exists that has not ended; one that nobody reaps has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_processes_of_the_leg(tmp_path, number):
    pipe = tmp_path / "pids"
    os.mkfifo(pipe)
    script = f"sleep 500 & echo $$ $! > {pipe}; wait"
    words = ["prove", "--stop-at", "1", "--last", "2", "--scratch", str(tmp_path / "s"), "--"]
    command = [sys.executable, "-m", "dcp_resume", *words, "sh", "-c", script, "{run}", "{stop}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        pids = [int(pid) for pid in pipe.read_text().split()]  # waits until both are there
        assert all(map(is_running, pids))
        process.send_signal(number)
        _, err = process.communicate()

    assert process.returncode == 130
    assert err.endswith("dcp-resume: interrupted\n")
    assert not any(map(is_running, pids))
