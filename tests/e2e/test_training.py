"""The example trainer: a resumed run equals the uninterrupted one, bit for bit.

A loss has 17 digits, which give every bit of it back; equal losses over many steps of a
deterministic trainer need equal weights, moments, random numbers and data.
"""

from __future__ import annotations

import pytest

from tests.support.training import TINY, digests_after, losses_of

pytestmark = pytest.mark.ranks


def train(ranks, count, command):
    """Name → digest of each parameter and moment at the end, of which all that hold it agree."""
    merged = {}
    for digests in ranks.run(digests_after, count, f"{TINY} {command}", timeout_s=120.0):
        for name, digest in digests.items():
            assert merged.setdefault(name, digest) == digest, name
    return merged


def check_resume_is_bit_equal(ranks, root, count, flags, last, interval, start):
    """Losses and state of the whole run, and of one that goes on from ``start``."""
    common = f"{flags} --dropout 0.1 --num_iteration {last}"
    save = f"--save {root}/run --save_interval {interval} --max_checkpoint_keep 10"
    state = train(ranks, count, f"{common} {save} --losses {root}/whole.jsonl")
    load = f"--load {root}/run --load_step {start}"
    assert train(ranks, count, f"{common} {load} --losses {root}/resumed.jsonl") == state
    whole, resumed = losses_of(root / "whole.jsonl"), losses_of(root / "resumed.jsonl")
    assert list(whole) == list(range(1, last + 1))
    assert resumed == {step: loss for step, loss in whole.items() if step > start}
    assert whole[last] < whole[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["gpt2", "llama3"])
def test_05_29_30_resume_from_step_40_of_100_is_bit_equal(ranks, tmp_path, model, dtype, optimizer):
    """INFINITRAIN 5, 28, 29, 30: with dropout, so that random numbers count too."""
    flags = f"--model {model} --dtype {dtype} --optimizer {optimizer}"
    check_resume_is_bit_equal(ranks, tmp_path, 1, flags, last=100, interval=20, start=40)
    kept = {path.parent.parent.name for path in tmp_path.glob("run/step-*/*/manifest.json")}
    assert kept == {f"step-{step:08d}" for step in (20, 40, 60, 80, 100)}


EIGHT_RANKS = "--tensor_parallel 2 --sequence_parallel --total_batch_size 128 "
EIGHT_RANKS += "--pipeline_parallel 2 --virtual_pipeline_parallel 2"


@pytest.mark.parametrize("model", ["gpt2", "llama3"])
def test_31_resume_on_8_ranks_with_virtual_stages_is_bit_equal(ranks, tmp_path, model):
    """INFINITRAIN 31: DP 2, TP 2 with sequence parallelism, PP 2 with two virtual stages."""
    flags = f"--model {model} {EIGHT_RANKS}"
    check_resume_is_bit_equal(ranks, tmp_path, 8, flags, last=50, interval=10, start=30)


OTHERS = {
    "one": (1, "--total_batch_size 128"),
    "stages": (2, "--total_batch_size 128 --pipeline_parallel 2"),
    "shards": (4, "--total_batch_size 128 --tensor_parallel 2 --data_parallel fsdp"),
}
ENDS = ("lm_head.weight", "transformer.wte.weight")


def with_one_end(state):
    """The state with both ends of GPT-2's tied weight under one name, if they are equal."""
    merged = {}
    for name, digest in state.items():
        assert merged.setdefault(name.replace(*ENDS), digest) == digest, name
    return merged


@pytest.mark.parametrize("model", ["gpt2", "llama3"])
def test_43_a_run_goes_on_under_another_topology_and_back(ranks, tmp_path, model):
    """INFINITRAIN 43, 45: vPP 2 to 1 to 2, PP 2 to 1 to 2, TP 2 to 1 to 2, 8 ranks to 1 to 8.

    What is loaded is the same to the last bit, moments too. The losses after it are not: sums over
    heads, ranks and stages are taken in another order, and that only. Each of the few thousand
    additions behind a float32 loss near 5 rounds by at most 2**-24 of it, mostly cancelling: 1e-5
    bounds the loss, and no wrong layer, moment or sample stays below it.

    GPT-2's embedding is also its output head. Where the two ends lie on different stages, each has
    a copy, and both copies stay equal, with their moments.
    """
    model = f"--model {model}"
    saved = f"{model} --save {tmp_path}/a --save_interval 10 --num_iteration 10"
    at_10 = train(ranks, 8, f"{saved} {EIGHT_RANKS}")
    start = f"{model} --load {tmp_path}/a"
    train(ranks, 8, f"{start} {EIGHT_RANKS} --num_iteration 13 --losses {tmp_path}/a.jsonl")
    expected = losses_of(tmp_path / "a.jsonl")
    for name, (count, flags) in OTHERS.items():
        loaded = train(ranks, count, f"{start} {flags} --num_iteration 10")
        assert with_one_end(loaded) == with_one_end(at_10)
        there = f"--save {tmp_path}/{name} --save_interval 12 --losses {tmp_path}/there.{name}"
        at_12 = train(ranks, count, f"{start} {flags} --num_iteration 12 {there}")
        back = f"{model} --load {tmp_path}/{name} {EIGHT_RANKS}"
        assert with_one_end(train(ranks, 8, f"{back} --num_iteration 12")) == with_one_end(at_12)
        train(ranks, 8, f"{back} --num_iteration 13 --losses {tmp_path}/back.{name}")
        found = losses_of(tmp_path / f"there.{name}") | losses_of(tmp_path / f"back.{name}")
        assert found == pytest.approx(expected, abs=1e-5)
        if name == "stages" and "gpt2" in model:
            assert {*ENDS} <= loaded.keys() & at_12.keys() & at_10.keys()
