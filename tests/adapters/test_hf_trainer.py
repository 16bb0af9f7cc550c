"""transformers' own Trainer, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import signal

import pytest
import torch
from transformers import TrainerCallback

from dcp_resume import (
    CheckpointManager,
    LoadOptions,
    Preemption,
    PreemptionSettings,
    Settings,
    errors,
)
from tests.adapters.breaks import damage_newest, kill_after
from tests.adapters.hf_job import Job, tiny_model

pytestmark = pytest.mark.adapters


def assert_equal(resumed, straight):
    assert resumed.losses == straight.losses[len(straight.losses) - len(resumed.losses) :]
    assert resumed.logs[:-1] == straight.logs[:-1]  # the last is of the call, not of the run
    assert resumed.lr == straight.lr
    torch.testing.assert_close(resumed.weights, straight.weights, rtol=0, atol=0)
    torch.testing.assert_close(
        resumed.optimizer["state"], straight.optimizer["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "stop_after", "resumed_step"),
    [
        ({}, 5, 3),  # between two logged losses
        ({}, 14, 12),
        ({"save_steps": 5, "eval_strategy": "epoch"}, 13, 10),  # between two epochs
        ({"eval_strategy": "steps", "eval_steps": 3}, 8, 6),
        ({"gradient_accumulation_steps": 2, "save_steps": 2}, 7, 6),
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, 13, 10),
        ({"dataloader_num_workers": 2}, 8, 6),
        ({"max_steps": 17, "train_sampling_strategy": "sequential"}, 8, 6),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tmp_path, options, stop_after, resumed_step
):
    straight = Job(tmp_path / "straight", options).run()
    job = Job(tmp_path / "stopped", options)
    stopped = job.run(stop_after)
    assert stopped.losses == straight.losses[: len(stopped.losses)]
    resumed = job.run()
    assert resumed.resumed_step == resumed_step
    assert_equal(resumed, straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("straight")).run()


def test_a_killed_job_goes_on(tmp_path, straight):
    kill_after("transformers", tmp_path, 14)
    resumed = Job(tmp_path).run()
    assert resumed.resumed_step == 12
    assert_equal(resumed, straight)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, straight):
    Job(tmp_path).run(8)
    damage_newest(tmp_path)
    resumed = Job(tmp_path).run()
    assert resumed.resumed_step == 3
    assert_equal(resumed, straight)


class Notify(TrainerCallback):
    """Sends this process the signal of a platform that wants its machine back."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            signal.raise_signal(signal.SIGUSR1)


def test_a_notice_stops_the_job_at_a_step_that_is_saved(tmp_path, straight):
    settings = PreemptionSettings(signals={"SIGUSR1": 30.0}, poll_s=0.01)
    job = Job(tmp_path, {"save_strategy": "no"}, callbacks=[Notify()])
    with pytest.raises(SystemExit) as left:
        job.run(preemption=lambda checkpoints: Preemption(checkpoints, settings))
    assert left.value.code == settings.exit_code
    resumed = Job(tmp_path).run()
    assert 4 < resumed.resumed_step < 30
    assert_equal(resumed, straight)


def test_the_best_by_an_evaluation_is_resumed_and_its_model_loaded_alone(tmp_path):
    monitored = {"monitor": "eval_loss", "monitor_mode": "max"}  # the first, as the loss falls
    options = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 9}
    trained = Job(tmp_path, options, settings=monitored).run()
    evaluated = {log["step"]: log["eval_loss"] for log in trained.logs if "eval_loss" in log}
    assert max(evaluated, key=evaluated.get) == 3
    with CheckpointManager(tmp_path, Settings(**monitored)) as checkpoints:
        model = {"model": tiny_model()}
        found = checkpoints.load(model, "best", options=LoadOptions(parts=("model",)))
    assert found.step == 3
    resumed = Job(tmp_path, options, settings=monitored).run(3, resume="best")
    assert resumed.resumed_step == 3
    torch.testing.assert_close(resumed.weights, model["model"].state_dict(), rtol=0, atol=0)


def test_settings_that_load_some_parts_alone_are_refused(tmp_path):
    with pytest.raises(errors.ConfigurationError, match="a trainer resumes all parts"):
        Job(tmp_path, settings={"load": LoadOptions(parts=("model", "optim"))}).run()


def test_another_batch_size_is_refused(tmp_path):
    Job(tmp_path).run(8)
    with pytest.raises(errors.LoadRefused, match="steps_per_epoch: saved with 10, now 5"):
        Job(tmp_path, {"per_device_train_batch_size": 4}).run()


@pytest.mark.parametrize("name", ["save_total_limit", "save_only_model"])
def test_arguments_that_act_on_directories_are_refused(tmp_path, name):
    with pytest.raises(errors.ConfigurationError) as caught:
        Job(tmp_path, {name: 1}).run()
    assert caught.value.option == name


def test_a_trainer_that_is_not_asked_to_resume_begins_anew(tmp_path):
    Job(tmp_path).run(5)
    anew = Job(tmp_path).run(5, resume=None)
    assert (anew.resumed_step, len(anew.losses)) == (None, 5)
    with CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.steps() == [3]
