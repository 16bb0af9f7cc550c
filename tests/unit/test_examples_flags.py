"""Wrong flags of the trainer are all named at once, before anything starts."""

from __future__ import annotations

import shlex

import pytest
from flags import parse_flags

WRONG = {
    "--save runs/a": "--save needs --save_interval",
    "--save_interval 5": "--save_interval needs --save",
    "--load_step 7": "--load_step needs --load",
    "--load_optimizer_state false": "--load_optimizer_state needs --load",
    "--preempt_at 3": "--preempt_at needs --save",
    "--max_checkpoint_keep -1": "expected 0 or more",
    "--save_optimizer_state maybe": "expected true or false",
    "--storage_option x": "expected K=V",
    "--size 8B": "--size of gpt2 must be one of",
    "--sequence_length 128": "is over the model's 64",
    "--tensor_parallel 3": "does not divide the model's n_head",
    "--model llama3 --tensor_parallel 4": "does not divide the model's n_kv_head",
    "--pipeline_parallel 2 --virtual_pipeline_parallel 3": "more than the model's 4 layers",
    "--tensor_parallel 2": "does not divide the 1 rank(s)",
    "--sequence_parallel": "--sequence_parallel needs --tensor_parallel",
    "--virtual_pipeline_parallel 2": "--virtual_pipeline_parallel needs --pipeline_parallel",
    "--total_batch_size 1000": "must be a multiple of 512 tokens",
    "--dropout 1": "--dropout must be below 1",
    "--lora_save_path adapters": "--lora_save_path needs --lora_rank",
    "--lora_load_path adapters": "--lora_load_path needs --lora_rank",
    "--llmc_filepath nowhere.bin": "does not exist",
    "--llmc_filepath pyproject.toml --hf_weights pyproject.toml": "choose one",
    "--model llama3 --llmc_filepath pyproject.toml": "--llmc_filepath is for gpt2",
}


def refused(command, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags("", shlex.split(command))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", WRONG)
def test_04_a_wrong_combination_is_refused(command, capsys):
    assert WRONG[command] in refused(command, capsys)


def test_all_faults_are_named_together(capsys):
    said = refused("--save runs/a --lora_save_path x --sequence_parallel", capsys)

    for flag in ("--save", "--lora_save_path", "--sequence_parallel"):
        assert f"{flag} needs" in said


def test_a_micro_batch_for_each_stage_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    said = refused("--pipeline_parallel 2 --total_batch_size 512", capsys)

    assert "gives each rank 1 micro batch(es) a step" in said
