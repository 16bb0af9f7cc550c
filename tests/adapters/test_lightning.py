"""Lightning's own Trainer, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import functools
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dcp_resume import LoadOptions, PreemptionSettings, errors
from tests.adapters.breaks import damage_newest, kill_after
from tests.adapters.lightning_job import BATCH, Job, Noisy, Regression

pytestmark = pytest.mark.adapters


def assert_equal(resumed, straight):
    assert resumed.losses == straight.losses[len(straight.losses) - len(resumed.losses) :]
    assert resumed.lr == straight.lr
    torch.testing.assert_close(resumed.weights, straight.weights, rtol=0, atol=0)
    torch.testing.assert_close(resumed.optimizer, straight.optimizer, rtol=0, atol=0)


def stateful():
    return StatefulDataLoader(Noisy(), BATCH, shuffle=True)


def workers():
    return DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2)


@pytest.mark.parametrize(
    ("options", "stop_after", "resumed_step"),
    [
        ({}, 8, 6),  # in the first epoch
        ({}, 14, 12),  # in the second
        ({"options": {"accumulate_grad_batches": 3}}, 4, 3),
        ({"save_interval": 5}, 13, 10),  # between two epochs
        ({"save_interval": 5, "options": {"max_steps": 27}}, 13, 10),
        # After a validation whose metric a scheduler looks at when the epoch ends.
        ({"options": {"val_check_interval": 3}}, 9, 9),
        ({"validates": False, "loader": workers}, 14, 12),
        ({"validates": False, "loader": stateful}, 8, 6),
        ({"validates": False, "loader": stateful}, 14, 12),
        ({"validates": False, "loader": stateful, "save_interval": 5}, 13, 10),
        ({"validates": False, "loader": workers, "save_interval": 5}, 13, 10),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tmp_path, options, stop_after, resumed_step
):
    straight = Job(tmp_path / "straight", **options).run()
    job = Job(tmp_path / "stopped", **options)
    stopped = job.run(stop_after)
    assert stopped.losses == straight.losses[: len(stopped.losses)]
    resumed = job.run()
    assert resumed.resumed_step == resumed_step
    assert_equal(resumed, straight)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("straight")).run()


def test_a_killed_job_goes_on(tmp_path, straight):
    kill_after("lightning", tmp_path, 14)
    resumed = Job(tmp_path).run()
    assert resumed.resumed_step == 12
    assert_equal(resumed, straight)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, straight):
    Job(tmp_path).run(8)
    damage_newest(tmp_path)
    resumed = Job(tmp_path).run()
    assert resumed.resumed_step == 3
    assert_equal(resumed, straight)


def test_a_resumed_run_does_not_depend_on_its_seed(tmp_path, straight):
    Job(tmp_path).run(8)
    resumed = Job(tmp_path, seed=99).run()
    assert resumed.resumed_step == 6
    assert_equal(resumed, straight)


def test_a_job_is_stopped_twice_and_ends_as_if_never(tmp_path, straight):
    Job(tmp_path).run(14)
    assert Job(tmp_path).run(17).resumed_step == 12
    resumed = Job(tmp_path).run()
    assert resumed.resumed_step == 15
    assert_equal(resumed, straight)
    again = Job(tmp_path).run()
    assert (again.resumed_step, again.losses) == (30, [])


class Notify(Callback):
    """Sends this process the signal of a platform that wants its machine back."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4 and trainer.current_epoch == 0:
            signal.raise_signal(signal.SIGUSR1)


def test_a_notice_stops_the_job_at_a_step_that_is_saved(tmp_path, straight):
    settings = PreemptionSettings(signals={"SIGUSR1": 30.0}, poll_s=0.01)
    with pytest.raises(SystemExit) as left:
        Job(tmp_path, save_interval=0, callbacks=[Notify()]).run(preemption=settings)
    assert left.value.code == settings.exit_code
    resumed = Job(tmp_path).run()
    assert 4 < resumed.resumed_step < 30
    assert_equal(resumed, straight)


class SaveByLightning(Callback):
    """Writes a checkpoint of Lightning's own when the training begins."""

    def __init__(self, path):
        self._path = path

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self._path)


def test_a_run_may_begin_from_a_checkpoint_of_lightning_and_then_goes_on_from_its_own(tmp_path):
    path = tmp_path / "lightning.ckpt"
    Job(tmp_path / "before", callbacks=[SaveByLightning(path)]).run(1)
    job = Job(tmp_path / "run", fit={"ckpt_path": path, "weights_only": False})
    job.run(5)
    with pytest.raises(errors.ConfigurationError, match="has a checkpoint of step 3") as caught:
        job.run()
    assert caught.value.option == "ckpt_path"


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(tmp_path):
    Job(tmp_path).run(8)
    job = Job(tmp_path, loader=lambda: DataLoader(Noisy(), 4, shuffle=True))
    with pytest.raises(errors.ConfigurationError, match=r"with 10 batches .* has 5 now"):
        job.run()


class Odd(Callback):
    """State that only pickle could hold."""

    def state_dict(self):
        return {"function": print}


def test_state_that_only_pickle_could_hold_is_refused_by_name(tmp_path):
    with pytest.raises(errors.UnsupportedLeaf, match=r"lightning\.callbacks\.Odd\.function"):
        Job(tmp_path, callbacks=[Odd()]).run()


def test_loaders_of_two_kinds_are_refused(tmp_path):
    job = Job(tmp_path, loader=lambda: [stateful(), workers()])
    with pytest.raises(errors.ConfigurationError, match="use one kind"):
        job.run()


class Adversaries(Regression):
    """Two optimizers, each of some of the parameters, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        optimizer = optimizers[batch_idx % 2]
        loss = self._loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.zero_grad()
        return {"loss": loss}

    def configure_optimizers(self):
        layers = (self.layers[0], self.layers[3])
        return [torch.optim.Adam(layer.parameters(), lr=1e-2) for layer in layers]


def test_several_optimizers_and_steps_by_hand_resume_too(tmp_path):
    job = {"model": Adversaries, "validates": False}
    straight = Job(tmp_path / "straight", **job).run()
    Job(tmp_path / "stopped", **job).run(14)
    resumed = Job(tmp_path / "stopped", **job).run()
    assert resumed.resumed_step == 12
    assert_equal(resumed, straight)


class StopIn(Callback):
    """Asks for a stop after one batch of the first epoch."""

    def __init__(self, batch_idx):
        self._batch_idx = batch_idx

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self._batch_idx:
            trainer.should_stop = True


class StopsItself(Regression):
    """Likewise, from the module's own hook, which comes after those of callbacks."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 5:
            self.trainer.should_stop = True


@pytest.fixture(scope="module")
def straight_of(tmp_path_factory):
    """Runs that nothing stops, by the batches that they accumulate."""

    @functools.cache
    def run(accumulated):
        options = {"accumulate_grad_batches": accumulated}
        root = tmp_path_factory.mktemp("straight")
        return Job(root, options=options, validates=False, max_epochs=2).run()

    return run


@pytest.mark.parametrize(
    ("stop", "accumulated", "num_batches", "resumed_step"),
    [
        ({"callbacks": [StopIn(5)]}, 1, 6, 6),
        ({"callbacks": [StopIn(5)]}, 4, 8, 2),  # the stop waits for the second step
        ({"model": StopsItself}, 1, 6, 6),
        ({"model": StopsItself}, 4, 6, None),  # among accumulated batches, and nothing saved before
        ({"callbacks": [StopIn(9)]}, 4, 10, 3),  # the epoch's last batch
    ],
)
def test_after_a_stop_the_epoch_goes_on_with_the_batch_that_is_next(
    tmp_path, straight_of, stop, accumulated, num_batches, resumed_step
):
    options = {"accumulate_grad_batches": accumulated}
    job = {"validates": False, "max_epochs": 2, "save_interval": 100}
    stopped = Job(tmp_path, **{**job, **stop}, options=options).run()
    assert len(stopped.losses) == num_batches
    is_told = any("step 1 is not saved" in warning for warning in stopped.warnings)
    assert is_told == (resumed_step is None)
    resumed = Job(tmp_path, **job, options=options).run()
    assert resumed.resumed_step == resumed_step
    assert len(resumed.losses) == 20 - min((resumed_step or 0) * accumulated, 10)
    assert_equal(resumed, straight_of(accumulated))


class StopByMetric(Callback):
    """Asks for a stop after a validation, as early stopping does."""

    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = not trainer.sanity_checking


def test_a_stop_after_a_validation_waits_for_the_step_of_accumulated_batches(tmp_path):
    options = {"accumulate_grad_batches": 4, "val_check_interval": 3}
    job = {"save_interval": 100, "options": options, "max_epochs": 1}
    stopped = Job(tmp_path, **job, callbacks=[StopByMetric()]).run()
    assert [number for _, number, _ in stopped.losses] == list(range(4))
    resumed = Job(tmp_path, **job).run()
    assert resumed.resumed_step == 1
    assert [number for _, number, _ in resumed.losses] == list(range(4, 10))


def test_a_callback_that_averages_weights_is_refused(tmp_path):
    with pytest.raises(errors.ConfigurationError, match="EMAWeightAveraging saves its average"):
        Job(tmp_path, callbacks=[EMAWeightAveraging()]).run()


def test_settings_that_load_some_parts_alone_are_refused(tmp_path):
    with pytest.raises(errors.ConfigurationError, match="a trainer resumes all parts"):
        Job(tmp_path, settings={"load": LoadOptions(parts=("model",))}).run()
