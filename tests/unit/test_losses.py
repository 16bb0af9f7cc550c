"""Losses of two logs: what is read from them, and what counts as equal."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from dcp_resume.cli.main import main
from dcp_resume.errors import ConfigurationError
from dcp_resume.proof.loss_logs import parse_log
from dcp_resume.proof.losses import TOLERANCES, Tolerance, compare_logs, compare_losses

SEED_LINE = "[info] step   12/100 | train loss 5.123456 | lr 1.00e-04 | (94.31 ms | 5.4k tok/s)"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"step": 12, "loss": 5.123456789012345}', {12: 5.123456789012345}),
        ('{"loss": 3, "step": 7, "lr": 0.1}', {7: 3.0}),
        ('{"step": 1, "train_loss": 2.5, "val_loss": 9.0}', {1: 2.5}),
        ('{"step": 1, "loss": Infinity}', {1: math.inf}),
        (SEED_LINE, {12: 5.123456}),
        ("step    1/4  loss 5.537995     455 tokens/s", {1: 5.537995}),
        ("step 3 | val loss 1.5 | train loss 2.5", {3: 2.5}),
        ("step 3 val_loss=1.5 loss=2.5", {3: 2.5}),
        (" iteration       10/    1000 | lm loss: 1.08E+01 | loss scale: 1.0 |", {10: 10.8}),
        ("Step: 4, Loss: 0.25, grad 1.0", {4: 0.25}),
        ("step 5/9 | train loss inf | lr 0", {5: math.inf}),
        ("step 3 | val loss 1.5", {}),
        ("step 40: saved; the loss of the machine costs nothing", {}),
        ("train loss 5.5", {}),
        ('{"step": 12, "loss": 5.1', {}),
        ('{"step": "12", "loss": 5.1}', {}),
        ('{"step": 12, "event": "saved"}', {}),
        ("[1, 2]", {}),
        ("", {}),
    ],
)
def test_lines_that_tell_a_loss_and_lines_that_do_not(line, found):
    assert parse_log([line]).losses == found


@pytest.mark.parametrize(
    "line",
    ["step 5/9 | train loss nan | lr 0", '{"step": 5, "loss": NaN}', '{"step": 5, "loss": null}'],
)
def test_a_nan_is_read_and_not_passed_over(line):
    assert math.isnan(parse_log([line]).losses[5])


def test_the_last_value_of_a_repeated_step_counts_and_steps_are_sorted():
    log = parse_log(f"step {step} loss {loss}" for step, loss in [(2, 9), (3, 9), (2, 1), (1, 4)])

    assert list(log.losses.items()) == [(1, 4.0), (2, 1.0), (3, 9.0)]
    assert log.num_repeated == 1


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "is_equal"),
    [
        (5.0, 5.0, Tolerance(0), True),
        (5.0, math.nextafter(5.0, 6), Tolerance(0), False),
        (0.0, -0.0, Tolerance(0), False),
        (0.0, -0.0, Tolerance(1e-9), True),
        (1.0, 1.25, Tolerance(0.25), True),
        (1.0, 1.25, Tolerance(0.24), False),
        (1000.0, 1001.0, Tolerance(0.0, 1e-3), True),
        (1.0, 1.002, Tolerance(0.0, 1e-3), False),
        (math.nan, math.nan, Tolerance(1e9), False),
        (math.inf, math.inf, Tolerance(1e9), False),
        (5.0, math.nan, Tolerance(1e9), False),
        (5.123456, 5.123465, TOLERANCES["float32"], True),
        (5.123456, 5.123470, TOLERANCES["float32"], False),
        (5.12, 5.13, TOLERANCES["bfloat16"], True),
        (5.12, 5.14, TOLERANCES["bfloat16"], False),
    ],
)
def test_what_a_tolerance_allows(a, b, tolerance, is_equal):
    assert tolerance.allows(a, b) is is_equal
    assert tolerance.allows(b, a) is is_equal


@pytest.mark.parametrize("bound", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_cannot_be_is_refused(bound):
    with pytest.raises(ConfigurationError, match="tolerance"):
        Tolerance(bound)


def test_only_common_steps_decide_and_none_is_a_failure():
    whole, resumed, other = (
        parse_log(f"step {step} loss {step}" for step in steps)
        for steps in (range(1, 11), range(5, 13), range(20, 22))
    )

    found = compare_losses(whole, resumed, "float32", Tolerance(0))
    assert found.is_equal
    assert [step.step for step in found.steps] == [5, 6, 7, 8, 9, 10]
    assert found.only_in_a == (1, 2, 3, 4)
    assert found.only_in_b == (11, 12)
    assert not compare_losses(whole, other, "float32", Tolerance(0)).is_equal


def write(path, losses):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_directories_pair_logs_by_name_and_take_the_dtype_from_it(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.005)):
        write(tmp_path / name / "gpt2_bfloat16.jsonl", {1: 5.0 + shift, 2: 4.0})
        write(tmp_path / name / "llama3/whole.log", {1: 5.0, 2: 4.0})
        (tmp_path / name / "notes.txt").write_text("no loss in here\n")
        (tmp_path / name / "model.bin").write_text("step 1 loss 1\n")
    write(tmp_path / "b/more.log", {1: 1.0})

    found = compare_logs(tmp_path / "a", tmp_path / "b")

    assert found.is_equal
    assert [pair.dtype for pair in found.pairs] == ["bfloat16", "float32"]
    assert found.unpaired == ("more.log",)
    assert not compare_logs(tmp_path / "a", tmp_path / "b", "float32").is_equal
    assert not compare_logs(tmp_path / "a", tmp_path / "b", tolerance=Tolerance(0)).is_equal
    assert compare_logs(tmp_path / "a", tmp_path / "b", tolerance=Tolerance(0.01)).is_equal


def test_logs_that_cannot_be_compared_are_refused(tmp_path):
    log = write(tmp_path / "a/x.log", {1: 1.0})
    write(tmp_path / "b/y.log", {1: 1.0})
    with pytest.raises(ConfigurationError, match="two files or two directories"):
        compare_logs(log, tmp_path / "b")
    with pytest.raises(ConfigurationError, match="no log of the same name"):
        compare_logs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigurationError, match="cannot read"):
        compare_logs(log, tmp_path / "nothing.log")
    with pytest.raises(ConfigurationError, match="expected a dtype of float64, "):
        compare_logs(log, log, "int8")


def test_36_the_verb_shows_each_step_and_says_it_by_its_exit_code(tmp_path, capsys):
    whole = write(tmp_path / "whole.jsonl", {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.0})
    resumed = write(tmp_path / "resumed.jsonl", {3: 2.5, 4: math.nan})

    def call(*words):
        code = main(["compare-loss", str(whole), str(resumed), *words])
        return code, capsys.readouterr().out

    code, out = call()
    assert code == 5
    assert "NOT EQUAL: 1 of 2 common steps differ, the first is step 4" in out
    assert "only in A: 2 step(s), 1 to 2" in out
    assert out.splitlines()[3].split() == ["3", "2.5", "2.5", "0", "0", "equal"]
    code, out = call("--brief")
    assert code == 5
    assert "equal" not in out.replace("NOT EQUAL", "").splitlines()[3]
    code, out = call("--json")
    assert code == 5
    (log,) = json.loads(out)["logs"]
    assert log["steps"][0] == {
        "step": 3, "a": 2.5, "b": 2.5, "absolute": 0.0, "relative": 0.0, "is_equal": True
    }  # fmt: skip
    assert log["steps"][1]["b"] is None

    write(resumed, {3: 2.5, 4: 2.0})
    code, out = call("--tolerance", "0")
    assert code == 0
    assert "equal: 2 of 2 common steps to the last bit" in out
    write(resumed, {9: 2.5})
    code, out = call()
    assert code == 5
    assert "no common step; A tells 4 step(s), 1 to 4, B 1 step(s), 9 to 9" in out
    resumed.unlink()
    assert call()[0] == 2


def test_the_verb_loads_neither_torch_nor_numpy(tmp_path):
    log = write(tmp_path / "a.jsonl", {1: 1.0})
    code = (
        "import sys; from dcp_resume.cli.main import main\n"
        f"assert main(['compare-loss', {str(log)!r}, {str(log)!r}]) == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
