"""Lightning: a callback for its ``Trainer``, and one function for ``Fabric``.

trainer = Trainer(callbacks=[ResumableCheckpoint("runs/a", Settings(save_interval=100))])
trainer.fit(model, loader)   # start the same again: it goes on
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

from lightning.fabric.wrappers import _unwrap_objects
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from dcp_resume.adapters.lightning_state import LightningState, check_loaders
from dcp_resume.adapters.progress import refuse_selected_parts
from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.choosing import Request
from dcp_resume.manager.preemption import Preemption
from dcp_resume.manager.preemption_settings import PreemptionSettings
from dcp_resume.manager.settings import Settings
from dcp_resume.session.load import LoadResult

__all__ = ["ResumableCheckpoint", "behind_fabric"]


class ResumableCheckpoint(Checkpoint):
    """Saves a ``lightning.Trainer`` through a ``CheckpointManager``, and resumes it in ``fit``.

    It takes the place of ``ModelCheckpoint``, with any strategy that leaves model and optimizers to
    torch: one device, DDP, FSDP, ``ModelParallelStrategy``. Steps are optimizer steps,
    ``trainer.global_step``; saved are those of ``save_interval``, and the last. A save that falls
    on the last batch of an epoch is taken when the next epoch begins, after validation and
    schedulers. A stop between two optimizer steps of accumulated batches waits for the second.

    Args:
        url: Root of the run.
        settings: Of the manager.
        resume_from: ``latest``, ``best``, a step or a tag; a run without a checkpoint begins anew
            with ``latest``.
        preemption: Whether and how to listen for notices; the job then leaves with its exit code.
        model_facts: What must be equal to resume, such as layer counts.
        data_facts: Likewise of the data.

    Raises:
        ConfigurationError: The settings load some parts alone.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        settings: Settings | None = None,
        *,
        resume_from: Request = "latest",
        preemption: PreemptionSettings | None = None,
        model_facts: Mapping[str, Any] = MappingProxyType({}),
        data_facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._url, self._settings = url, settings or Settings()
        refuse_selected_parts(self._settings)
        self._request, self._preemption_settings = resume_from, preemption
        self._facts = {"model_facts": model_facts, "data_facts": data_facts}
        self._open = ExitStack()
        self._preemption: Preemption | None = None
        self._passed_step = self._saved_step = 0
        self._is_stop_held = False
        self.resumed: LoadResult | None = None
        """What ``fit`` resumed from; None if the run had no checkpoint."""

    # Hooks, in the order in which they come.

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the run over, and load.

        Raises:
            ConfigurationError: ``ckpt_path`` was given too, and the run has a checkpoint; or a
                callback averages weights.
            DcpResumeError: As ``CheckpointManager.resume``.
        """
        _refuse_averages(trainer)
        self._is_stop_held = False
        checkpoints = CheckpointManager(self._url, self._settings, **self._facts)
        self._checkpoints = self._open.enter_context(checkpoints)
        monitored = {self._settings.monitor: self._settings.monitor_mode}
        self._state = LightningState(trainer, monitored)
        if trainer.ckpt_path is not None:
            _refuse_two_beginnings(str(trainer.ckpt_path), checkpoints)
        self.resumed = checkpoints.resume(self._parts(is_between_epochs=False), self._request)
        if self.resumed is not None:
            self._state.restore()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the next batch, and listen for notices.

        Raises:
            ConfigurationError: The place in the training data cannot be saved, or not be found.
        """
        check_loaders(trainer)
        self._state.return_to_place()
        self._passed_step = self._saved_step = trainer.global_step
        if self._preemption_settings is not None:  # after Lightning's own handlers of signals
            preemption = Preemption(self._checkpoints, self._preemption_settings)
            self._preemption = self._open.enter_context(preemption)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch is over with all that follows it."""
        self._state.return_to_epoch_start()
        self._state.note_epoch_start()
        self._pass_boundary(trainer, is_between_epochs=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """A step may be complete."""
        self._hold_stop(trainer)
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if not loop._num_ready_batches_reached() and not loop._should_check_val_fx(fetcher):
            self._pass_boundary(trainer, is_between_epochs=False)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A step that validation followed is complete."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._hold_stop(trainer)
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._pass_boundary(trainer, is_between_epochs=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step where the training was stopped before the epoch's last batch.

        Raises:
            DcpResumeError: As ``CheckpointManager.save``.
        """
        loop = trainer.fit_loop.epoch_loop
        if loop._num_ready_batches_reached() or trainer.global_step == self._saved_step:
            return
        if loop._should_accumulate():
            rank_zero_warn(
                f"step {trainer.global_step} is not saved: the training was stopped in epoch "
                f"{trainer.current_epoch} after {loop.batch_progress.current.ready} batches, among "
                f"the {trainer.accumulate_grad_batches} of an optimizer step, whose gradients are "
                f"in no checkpoint; the newest is of step {self._saved_step}. Stop from a callback"
            )
            return
        self._save(trainer, is_between_epochs=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step of a whole epoch.

        Raises:
            DcpResumeError: As ``CheckpointManager.save``.
        """
        is_whole = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if is_whole and trainer.global_step > self._saved_step:
            self._save(trainer, is_between_epochs=True)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Wait for the save that runs, and let go of the run."""
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the save that runs, and let go of the run.

        Raises:
            SaveError: It did not commit.
        """
        self._close()

    # Inside.

    def _parts(self, *, is_between_epochs: bool) -> dict[str, Any]:
        return self._state.parts(is_between_epochs=is_between_epochs)

    def _hold_stop(self, trainer: Trainer) -> None:
        """Let accumulated batches come to their step: their gradients are in no checkpoint."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self._is_stop_held |= trainer.should_stop
            trainer.should_stop = False
        elif self._is_stop_held:
            self._is_stop_held, trainer.should_stop = False, True

    def _pass_boundary(self, trainer: Trainer, *, is_between_epochs: bool) -> None:
        """Once for each completed step."""
        before, step = self._passed_step, trainer.global_step
        if step == before:
            return
        self._passed_step = step
        if self._preemption is not None and self._preemption.should_stop(step):
            parts = self._parts(is_between_epochs=is_between_epochs)
            self._preemption.save_and_exit(step, parts)
        # Manual optimization may take several steps a batch.
        is_due = any(self._checkpoints.should_save(n) for n in range(before + 1, step + 1))
        is_last = trainer.should_stop and trainer.fit_loop._can_stop_early
        if is_due or is_last or step == trainer.max_steps:
            self._save(trainer, is_between_epochs=is_between_epochs)

    def _save(self, trainer: Trainer, *, is_between_epochs: bool) -> None:
        parts = self._parts(is_between_epochs=is_between_epochs)
        self._checkpoints.save(trainer.global_step, parts)
        self._saved_step = trainer.global_step

    def _close(self) -> None:
        self._preemption = None
        self._open.__exit__(*sys.exc_info())


def _refuse_averages(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            raise ConfigurationError(
                f"{type(callback).__name__} saves its average in place of the model's own "
                f"state_dict, which does not pass through Lightning's checkpoint here; average in "
                f"a torch.optim.swa_utils.AveragedModel that the module holds beside its network",
                option="callbacks",
            )


def _refuse_two_beginnings(ckpt_path: str, checkpoints: CheckpointManager) -> None:
    step = checkpoints.latest()
    if step is not None:
        raise ConfigurationError(
            f"fit(ckpt_path={ckpt_path!r}), and {checkpoints.url} has a checkpoint of step {step}: "
            f"a training begins once. Leave ckpt_path out, or give an empty root",
            option="ckpt_path",
        )


def behind_fabric(state: Mapping[str, Any]) -> dict[str, Any]:
    """What lies behind the wrappers of ``fabric.setup``, as ``CheckpointManager`` wants it.

    Args:
        state: As for the manager; modules and optimizers, alone or in lists, may be Fabric's.
    """
    return {key: _unwrapped(value) for key, value in state.items()}


def _unwrapped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_unwrapped(item) for item in value]
    # Anything else would be copied, and a load would go into the copy.
    return _unwrap_objects(value) if isinstance(value, (Module, Optimizer)) else value
