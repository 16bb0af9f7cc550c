"""What the mechanism that this library started from offered, one numbered line a test.

The numbers are those of the list of its capabilities. Those that need ranks, flags or whole
trainings are in ``tests/ranks`` and ``tests/e2e`` under the same numbers.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dcp_resume import CheckpointManager, SaveMode, Settings, Strictness, TrainerState, errors
from dcp_resume.cli.main import main
from dcp_resume.data import ResumableLoader, ResumableSampler, Tail
from dcp_resume.manager.parameter_names import named_parameters
from dcp_resume.session.load import LoadOptions

ROOT = Path(__file__).parents[2]
BLOCKING = Settings(mode=SaveMode.BLOCKING)


class Net(nn.Module):
    def __init__(self, width=4, dtype=torch.float32):
        super().__init__()
        self.a = nn.Linear(3, width, dtype=dtype)
        self.norm = nn.BatchNorm1d(width, dtype=dtype)


def saved(root, state, step=40):
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(step, state)


def loaded(root, state, options=None):
    with CheckpointManager(root, BLOCKING) as checkpoints:
        return checkpoints.load(state, options=options)


def job(width=4):
    model = Net(width)
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm(model.a(torch.ones(2, 3))).square().sum().backward()
    optimizer.step()
    trainer = TrainerState()
    trainer.advance(step=40, samples=80)
    return {"model": model, "optim": optimizer, "trainer": trainer}


def test_11_the_directory_holds_the_zero_padded_count_of_completed_steps(tmp_path):
    saved(tmp_path, job())
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000040"]


def test_12_model_optimizer_and_trainer_state_are_separable(tmp_path):
    saved(tmp_path, job())
    [path] = tmp_path.glob("step-*/*/manifest.json")
    assert json.loads(path.read_text())["parts"].keys() == {"model", "optim", "trainer"}
    for part in ("model", "trainer"):
        other = job()
        kept = {k: v for k, v in other.items() if k != "optim" or part == "optim"}
        assert loaded(tmp_path, kept, LoadOptions(parts=(part,))).step == 40


def test_14_trainer_state_parses_with_a_standard_json_parser(tmp_path):
    saved(tmp_path, job())
    [path] = tmp_path.glob("step-*/*/manifest.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not standard JSON")

    manifest = json.loads(path.read_text(), parse_constant=refuse)
    assert manifest["trainer"]["consumed_samples"] == 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_parameters_and_buffers_round_trip_bit_for_bit(tmp_path, dtype):
    model = Net(dtype=dtype)
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.randn(4))
    saved(tmp_path, {"model": model})
    other = Net(dtype=dtype)
    loaded(tmp_path, {"model": other})
    for name, tensor in model.state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name


def test_17_missing_names_shapes_and_dtypes_are_reported_together_and_nothing_changes(tmp_path):
    saved(tmp_path, {"model": {"a": torch.ones(2), "b": torch.ones(3), "d": torch.ones(1)}})
    target = {
        "a": torch.zeros(4),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "c": torch.zeros(1),
        "d": torch.zeros(1),
    }
    with pytest.raises(errors.LoadRefused) as caught:
        loaded(tmp_path, {"model": target})
    kinds = {problem.where: problem.kind for problem in caught.value.problems}
    assert kinds == {"model.a": "shape", "model.b": "dtype", "model.c": "missing"}
    assert not any(tensor.any() for tensor in target.values())


def test_18_unexpected_names_are_warned_about_by_name(tmp_path):
    saved(tmp_path, {"model": {"a": torch.ones(2), "extra": torch.ones(3)}})
    target = {"model": {"a": torch.zeros(2)}}
    report = loaded(tmp_path, target, LoadOptions(strictness=Strictness.WARN)).report
    assert [(item.kind, item.where) for item in report.items] == [("unexpected", "model.extra")]
    assert target["model"]["a"].all()


def test_22_duplicate_names_are_refused_at_save(tmp_path):
    with pytest.raises(errors.DuplicateFqn, match=r"model\.a\.b"):
        saved(tmp_path, {"model": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}})


def test_23_a_shared_parameter_has_one_name(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    assert [name for name, _ in named_parameters(model)] == ["a.weight"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model["b"](model["a"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    state = {"model": model, "optim": optimizer}
    saved(tmp_path, state)
    again = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    again["b"].weight = again["a"].weight
    fresh = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9)
    loaded(tmp_path, {"model": again, "optim": fresh})
    assert again["b"].weight is again["a"].weight
    assert torch.equal(again["a"].weight, model["a"].weight)
    moments = [state["momentum_buffer"] for state in fresh.state.values()]
    assert [m.tolist() for m in moments] == [
        s["momentum_buffer"].tolist() for s in optimizer.state.values()
    ]


def loader(batch, tail=Tail.CARRY):
    sampler = ResumableSampler(48, global_batch=batch, micro_batch=batch, tail=tail)
    return ResumableLoader(torch.arange(48), sampler)


def test_25_the_data_go_on_where_they_would_have_without_interruption(tmp_path):
    data = loader(4)
    batches = iter(data)
    for _ in range(5):
        next(batches)
    saved(tmp_path, {"data": data})
    again = loader(4)
    loaded(tmp_path, {"data": again})
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]


def test_25_a_position_that_is_no_place_in_the_data_is_an_error_never_clamped(tmp_path):
    state = loader(4).state_dict()
    saved(tmp_path, {"data": {**state, "consumed_samples": -4}})
    with pytest.raises(errors.LoadRefused, match=r"-4"):
        loaded(tmp_path, {"data": loader(4)})


@pytest.mark.parametrize(("batch", "is_allowed"), [(8, True), (6, False)])
def test_26_the_batch_may_change_if_consumed_samples_divide_evenly(tmp_path, batch, is_allowed):
    data = loader(4, Tail.DROP)
    batches = iter(data)
    for _ in range(4):
        next(batches)
    saved(tmp_path, {"data": data})
    again = loader(batch, Tail.DROP)
    if is_allowed:
        loaded(tmp_path, {"data": again})
        assert again.consumed_samples == 16
    else:
        with pytest.raises(errors.LoadRefused, match=r"16.*6"):
            loaded(tmp_path, {"data": again})


def test_37_the_log_says_what_was_saved_and_loaded_and_how_long_it_took(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dcp_resume"):
        saved(tmp_path, job())
        loaded(tmp_path, job())
    committed, finished = (
        next(r.getMessage() for r in caplog.records if name in r.getMessage())
        for name in ("CheckpointCommitted", "LoadFinished")
    )
    for message in (committed, finished):
        assert "step=40" in message
        assert "duration_s=" in message
        assert str(tmp_path) in message


TESTED = (
    "tests/unit/test_format_data_file.py",
    "tests/unit/test_optimizers.py::test_24_step_count_and_both_moments_come_back_exactly",
    "tests/unit/test_trainer_items.py::TestTrainerState",
    "tests/unit/test_manager.py::test_a_resumed_run_is_bit_identical",
)
"""Serialization, optimizer state, trainer state, and a run with and without an interruption."""


def test_38_files_optimizers_progress_and_resumes_are_tested_where_no_gpu_is_seen():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTED]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_47_a_background_save_is_a_consistent_snapshot(tmp_path):
    weight = torch.ones(200_000)
    settings = Settings(mode=SaveMode.BACKGROUND)
    with CheckpointManager(tmp_path, settings) as checkpoints:
        pending = checkpoints.save(1, {"w": weight})
        weight.zero_()  # the trainer goes on at once
        pending.result()
        target = torch.zeros(200_000)
        checkpoints.load({"w": target})
    assert target.sum() == 200_000


def test_51_checks_raise_typed_errors_with_a_reason_and_before_anything_changes(tmp_path):
    model = Net()
    saved(tmp_path, {"model": model})
    [data] = tmp_path.glob("step-*/*/*.safetensors")
    data.write_bytes(data.read_bytes()[:-8])
    other = Net()
    before = other.a.weight.clone()
    with pytest.raises(errors.InvalidCheckpoint, match=r"expected \d+ bytes, found \d+"):
        loaded(tmp_path, {"model": other})
    assert torch.equal(other.a.weight, before)


def test_52_a_command_lists_tensors_and_verifies_checksums(tmp_path, capsys):
    saved(tmp_path, job())
    assert main(["inspect", str(tmp_path), "--tensors", "--json"]) == 0
    assert "model.a.weight" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0
    data = next(tmp_path.glob("step-*/*/*.safetensors"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert main(["verify", str(tmp_path)]) != 0
