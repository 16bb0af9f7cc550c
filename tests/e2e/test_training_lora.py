"""LoRA: the base stays as it was, a resume is bit-equal, adapters are saved and loaded alone."""

from __future__ import annotations

import pytest
import torch

from tests.support.training import TINY, losses_of, train_rank, whole

pytestmark = pytest.mark.ranks

SPLIT = "--tensor_parallel 2 --sequence_parallel"
LORA = f"{TINY} --lora_rank 4 --learning_rate 0.01 --warmup 0"


def trained(command):
    """Name → whole tensor after the training, and how many of them the optimizer has."""
    trainer = train_rank(command)
    tensors = {
        name: whole(parameter)
        for stage in trainer.model.stages
        for name, parameter in stage.named_parameters()
    }
    return tensors, len(trainer.optimizers[0].param_groups[0]["params"])


def lora_is_resumed(directory, layout):
    start, _ = trained(f"{LORA} {layout} --num_iteration 1 --learning_rate 0")
    command = f"{LORA} {layout} --num_iteration 8"
    saving = f"--save {directory}/a --save_interval 4 --lora_save_path {directory}/adapters"
    end, num_trained = trained(f"{command} {saving} --losses {directory}/whole.jsonl")
    resumed, _ = trained(
        f"{command} --load {directory}/a --load_step 4 --losses {directory}/again.jsonl"
    )
    loaded, _ = trained(
        f"{LORA} {layout} --num_iteration 1 --learning_rate 0 --lora_load_path {directory}/adapters"
    )
    adapters = {name for name in end if name.endswith((".lora_A", ".lora_B"))}
    assert num_trained == len(adapters) > 0
    for name, tensor in end.items():
        assert torch.equal(resumed[name], tensor), name
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(start[name], tensor) is (name not in adapters), name


@pytest.mark.parametrize(("world_size", "layout"), [(1, ""), (2, SPLIT)], ids=["one", "tp2"])
def test_33_a_lora_run_resumes_bit_for_bit(ranks, tmp_path, world_size, layout):
    ranks.run(lora_is_resumed, world_size, str(tmp_path), layout)

    end, again = losses_of(tmp_path / "whole.jsonl"), losses_of(tmp_path / "again.jsonl")
    assert again == {step: loss for step, loss in end.items() if step > 4}
    assert len(end) == 8


def test_frozen_weights_stay_frozen_where_torch_makes_them_anew(ranks, tmp_path):
    """SequenceParallel replaces the parameters of norms by ones that want gradients."""
    losses = []
    for world_size, layout in ((1, ""), (2, SPLIT)):
        log = tmp_path / f"{world_size}.jsonl"
        ranks.run(trained, world_size, f"{LORA} {layout} --num_iteration 3 --losses {log}")
        losses.append(losses_of(log))

    assert losses[1] == pytest.approx(losses[0], abs=1e-5)  # rounding; a trained norm: 8e-4
