"""``transformers.Trainer``: its checkpoints through a ``CheckpointManager``.

with CheckpointManager("runs/a") as checkpoints:
    trainer = ResumableTrainer(model, arguments, train_dataset=…, checkpoints=checkpoints)
    trainer.train(resume_from_checkpoint=True)   # start the same again: it goes on
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_callback import TrainerState as PeerState

from dcp_resume.adapters.progress import LocalProgress, refuse_selected_parts
from dcp_resume.adapters.whole import WholeOfRank, WholeValue
from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.preemption import Preemption
from dcp_resume.manager.rng import RngState
from dcp_resume.session.load import LoadResult

__all__ = ["ResumableTrainer", "ResumableTrainerMixin"]

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ResumableTrainerMixin(_Base):
    """Put before a trainer's class: ``class Mine(ResumableTrainerMixin, SFTTrainer)``.

    ``save_strategy`` and ``save_steps`` say when to save, the manager's settings what is kept.
    ``train(resume_from_checkpoint=…)`` takes ``True`` (the newest whole checkpoint, or a new
    beginning), a step, ``"best"`` or a tag. A save that falls on the last step of an epoch is taken
    after the evaluation that ends it.

    Args:
        args: As for the trainer.
        checkpoints: Of the run; make it on every rank, after ``TrainingArguments``.
        preemption: Entered; the job leaves with its exit code after a notice.
        kwargs: As for the trainer.

    Raises:
        ConfigurationError: An argument of the trainer that its own checkpoints would be needed for,
            or settings that load some parts alone.
    """

    def __init__(
        self,
        *args: Any,
        checkpoints: CheckpointManager,
        preemption: Preemption | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_arguments(self.args)
        refuse_selected_parts(checkpoints.settings)
        self.checkpoints = checkpoints
        self._preemption = preemption
        self._progress = self._no_progress()
        self._rng = RngState(self.args.seed)
        self.resumed: LoadResult | None = None
        """What ``train`` resumed from; None if it began anew."""
        self._request: int | str | None = None
        self._bookkeeping: dict[str, Any] = {}
        self._place: dict[str, Any] = {}
        self._steps_per_epoch = 0
        self._passed_step = self._voted_step = 0
        self._is_save_due = False

    def train(
        self, resume_from_checkpoint: bool | int | str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, from a checkpoint if asked.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint, or a step, ``best`` or a
                tag; None or False begins a new line of checkpoints.
            args: As for the trainer.
            kwargs: As for the trainer.

        Raises:
            DcpResumeError: As ``CheckpointManager.resume`` and ``save``.
        """
        asked, self._progress = resume_from_checkpoint, self._no_progress()
        self._request = None if asked in (None, False) else "latest" if asked is True else asked
        return super().train(None, *args, **kwargs)

    # Loading, in the order of the trainer's steps.

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Keep the loader: everything is prepared before the trainer asks where it is."""
        self._train_dataloader = dataloader
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1]
        return values

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> Any:
        given = (max_steps, num_update_steps_per_epoch, num_train_epochs)
        start = super()._init_training_state(*given, None, trial)
        prepare: Any = super()._prepare_for_training
        self._prepared = prepare(max_steps, self._train_dataloader, None)
        self.resumed, self._place = None, {}
        if self._request is not None:
            self.resumed = self.checkpoints.resume(self._parts(), self._request)
        if self.resumed is not None:
            start = self._restore(given, trial)
        self._passed_step = self._voted_step = self.state.global_step
        return start

    def _restore(self, given: tuple[int, int, int], trial: Any) -> Any:
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(self._bookkeeping["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._bookkeeping["scaler"])
        with TemporaryDirectory() as directory:
            text = json.dumps(self._bookkeeping["state"])
            (Path(directory) / "trainer_state.json").write_text(text, encoding="utf-8")
            return super()._init_training_state(*given, directory, trial)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        return self._prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        resumed_from = self.checkpoints.url if self.resumed is not None else None
        if self._place.get("is_new"):
            self._place["is_new"] = False
            self._tr_loss += self._place["tr_loss"].to(self._tr_loss.device)
            self._globalstep_last_logged = self._place["last_logged_step"]
        run_epoch: Any = super()._run_epoch
        run_epoch(*args, **{**kwargs, "resume_from_checkpoint": resumed_from})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._rng.load_state_dict(self._place["rng"])

    # Saving.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._is_save_due = True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        is_first_call, self._passed_step = step != self._passed_step, step
        if is_first_call and float(self.state.epoch or 0).is_integer():
            return  # the epoch's end, with its own evaluation, is the second call
        if self._preemption is not None and step > self._voted_step:
            self._voted_step = step
            if self._preemption.should_stop(step):
                self._preemption.save_and_exit(step, self._parts())
        if self._is_save_due:
            self._is_save_due = False
            self.checkpoints.save(step, self._parts())

    def _parts(self) -> dict[str, Any]:
        self._note_progress()
        optimizer = self.optimizer
        return {
            "model": self.model_wrapped,
            "optim": getattr(optimizer, "optimizer", optimizer),
            "trainer": self._progress,
            "transformers": WholeValue("transformers", self._dump, self._take_bookkeeping),
            "place": WholeOfRank(
                "place",
                self._dump_place,
                self._take_place,
                derive=self._rng_of_step,
                is_bound=lambda: True,
                bound_to={
                    "steps_per_epoch": self._steps_per_epoch,
                    "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
                },
            ),
        }

    def _no_progress(self) -> LocalProgress:
        settings = self.checkpoints.settings
        return LocalProgress(modes={settings.monitor: settings.monitor_mode})

    def _note_progress(self) -> None:
        step = self.state.global_step
        if step > self._progress.step:
            optimizer: Any = self.optimizer
            losses = [log["loss"] for log in self.state.log_history if "loss" in log]
            self._progress.advance(
                step=step,
                epoch=int(self.state.epoch),
                samples=(step - self._progress.step) * self._samples_per_step(),
                loss=losses[-1] if losses else None,
                last_lr=[float(group["lr"]) for group in optimizer.param_groups],
                metrics=_evaluated(self.state.log_history, step),
            )

    def _samples_per_step(self) -> int:
        return int(self.get_total_train_batch_size(self.args))

    def _dump(self) -> dict[str, Any]:
        self.store_flos()
        stateful: list[Any] = [*self.callback_handler.callbacks, self.control]
        exported: list[Any] = [item for item in stateful if isinstance(item, ExportableState)]
        callbacks = PeerState(stateful_callbacks=exported).stateful_callbacks
        scaler, scheduler = self.accelerator.scaler, self.lr_scheduler
        return {
            "state": {**dataclasses.asdict(self.state), "stateful_callbacks": callbacks},
            "lr_scheduler": scheduler.state_dict() if scheduler is not None else {},
            "scaler": scaler.state_dict() if scaler is not None else {},
        }

    def _dump_place(self) -> dict[str, Any]:
        return {
            "rng": self._rng.state_dict(),
            "tr_loss": getattr(self, "_tr_loss", torch.zeros(())),
            "last_logged_step": getattr(self, "_globalstep_last_logged", 0),
        }

    def _take_bookkeeping(self, saved: dict[str, Any]) -> None:
        self._bookkeeping = saved

    def _take_place(self, saved: dict[str, Any]) -> None:
        self._place = {"is_new": True, **saved}

    def _rng_of_step(self, step: int) -> None:
        self._rng.derive({}, step)


class ResumableTrainer(ResumableTrainerMixin, Trainer):
    """``transformers.Trainer`` with the mixin."""


_NEEDING_DIRECTORIES = {
    "save_total_limit": "give CheckpointManager Settings(retention=…)",
    "load_best_model_at_end": "give CheckpointManager Settings(monitor='eval_loss'), and after "
    "train() call checkpoints.load({'model': trainer.model}, 'best', "
    "options=LoadOptions(parts=('model',)))",
    "save_only_model": "load the part 'model' alone",
    "push_to_hub": "call trainer.push_to_hub() at the end",
    "deepspeed": "use DDP or FSDP",
    "enable_jit_checkpoint": "give the trainer a Preemption",
    "auto_find_batch_size": "another batch has another place in the data: set the batch size",
}


def _evaluated(logs: list[dict[str, Any]], step: int) -> dict[str, float]:
    """The metrics of the evaluation after ``step``, if there was one."""
    return {
        name: float(value)
        for log in logs
        if log.get("step") == step
        for name, value in log.items()
        if name.startswith("eval_") and isinstance(value, (int, float))
    }


def _check_arguments(args: TrainingArguments) -> None:
    for name, remedy in _NEEDING_DIRECTORIES.items():
        if getattr(args, name, None):
            raise ConfigurationError(
                f"TrainingArguments.{name} acts on the trainer's own checkpoint directories, which "
                f"are not written; leave it out and {remedy}",
                option=name,
            )
