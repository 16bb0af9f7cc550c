"""The example trainer: a resumed run equals the uninterrupted one, bit for bit.

A loss has 17 digits, which give every bit of it back; equal losses over many steps of a
deterministic trainer need equal weights, moments, random numbers and data.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import train_rank

pytestmark = pytest.mark.ranks

TINY = ["--sequence_length", "16", "--batch_size", "2", "--total_batch_size", "64"]
TINY += ["--warmup", "5", "--dropout", "0.1"]


def run_trainer(flags: list[str]) -> int:
    """Train in this rank; the step it ended at."""
    return int(train_rank(shlex.join([*TINY, *flags])).progress.step)


def losses_of(path: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines())}


def train_and_resume(
    ranks: Any, root: Path, count: int, flags: list[str], steps: tuple[int, int, int]
) -> tuple[dict[int, float], dict[int, float]]:
    """Losses of the whole run, and of one that goes on from its checkpoint in the middle."""
    last, interval, start = steps
    common = [*flags, "--num_iteration", str(last)]
    whole, resumed = root / "whole.jsonl", root / "resumed.jsonl"
    save = ["--save", str(root / "run"), "--save_interval", str(interval)]
    save += ["--max_checkpoint_keep", "10"]
    assert set(ranks.run(run_trainer, count, [*common, *save, "--losses", str(whole)])) == {last}
    load = ["--load", str(root / "run"), "--load_step", str(start), "--losses", str(resumed)]
    assert set(ranks.run(run_trainer, count, [*common, *load])) == {last}
    return losses_of(whole), losses_of(resumed)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["gpt2", "llama3"])
def test_05_29_30_resume_from_step_40_of_100_is_bit_equal(ranks, tmp_path, model, dtype, optimizer):
    """INFINITRAIN 5, 28, 29, 30: with dropout, so that random numbers count too."""
    flags = ["--model", model, "--dtype", dtype, "--optimizer", optimizer]
    whole, resumed = train_and_resume(ranks, tmp_path, 1, flags, (100, 20, 40))
    assert list(resumed) == list(range(41, 101))
    assert resumed == {step: whole[step] for step in resumed}
    assert whole[100] < whole[1]
    kept = {path.parent.parent.name for path in tmp_path.glob("run/step-*/*/manifest.json")}
    assert kept == {f"step-{step:08d}" for step in (20, 40, 60, 80, 100)}


@pytest.mark.parametrize("model", ["gpt2", "llama3"])
def test_31_resume_on_8_ranks_with_virtual_stages_is_bit_equal(ranks, tmp_path, model):
    """INFINITRAIN 31: DP 2, TP 2 with sequence parallelism, PP 2 with two virtual stages."""
    flags = ["--model", model, "--tensor_parallel", "2", "--sequence_parallel"]
    flags += ["--pipeline_parallel", "2", "--virtual_pipeline_parallel", "2"]
    flags += ["--total_batch_size", "128"]
    whole, resumed = train_and_resume(ranks, tmp_path, 8, flags, (50, 10, 30))
    assert list(resumed) == list(range(31, 51))
    assert resumed == {step: whole[step] for step in resumed}


OTHER = {
    "one rank": (1, []),
    "PP 2, one stage a rank": (2, ["--pipeline_parallel", "2"]),
    "TP 2, FSDP 2": (4, ["--tensor_parallel", "2", "--data_parallel", "fsdp"]),
}


def test_43_a_run_goes_on_under_another_topology(ranks, tmp_path):
    """INFINITRAIN 43, 45: vPP 2 to 1, PP 2 to 1, TP 2 to 1, 8 ranks to 1, 2 and 4.

    The state is the same; sums over heads, ranks and stages are taken in another order. Each of the
    few thousand additions behind a float32 loss near 5 rounds by at most 2**-24 of it, mostly
    cancelling: 1e-5 bounds the first loss, and no wrong layer, moment or sample stays below it.
    """
    run, whole = str(tmp_path / "run"), tmp_path / "whole.jsonl"
    common = ["--model", "llama3", "--dropout", "0", "--num_iteration", "12"]
    flags = ["--tensor_parallel", "2", "--sequence_parallel", "--pipeline_parallel", "2"]
    flags += ["--virtual_pipeline_parallel", "2", "--total_batch_size", "128"]
    flags += ["--save", run, "--save_interval", "10", "--losses", str(whole)]
    ranks.run(run_trainer, 8, [*common, *flags])
    expected = losses_of(whole)
    for number, (count, other) in enumerate(OTHER.values()):
        path = tmp_path / f"{number}.jsonl"
        load = ["--load", run, "--load_step", "10", "--losses", str(path)]
        ranks.run(run_trainer, count, [*common, "--total_batch_size", "128", *other, *load])
        found = losses_of(path)
        assert list(found) == [11, 12]
        assert found[11] == pytest.approx(expected[11], abs=1e-5)
        assert found[12] == pytest.approx(expected[12], abs=1e-5)
