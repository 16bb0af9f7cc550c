"""A small training on transformers' own Trainer: GPT-2 with dropout, a schedule, an evaluation."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.adapters.hf_trainer import ResumableTrainer

NUM_SAMPLES = 20


class Stopped(Exception):
    """The training was to end here."""


def stop():
    """End the training, but not the process."""
    raise Stopped


class Tokens(Dataset):
    def __init__(self, num_samples=NUM_SAMPLES):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(32, (num_samples, 8), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Stop(TrainerCallback):
    """After some step, before the next one."""

    def __init__(self, stop_after, stop):
        self._stop_after, self._stop = stop_after, stop

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._stop_after:
            self._stop()


class Recorded(ResumableTrainer):
    """Keeps the loss of each micro batch."""

    losses: list[float]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


@dataclass
class Outcome:
    """What a training leaves."""

    losses: list[float]
    logs: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    lr: list[float]
    resumed_step: int | None


def tiny_model():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    )


@dataclass
class Job:
    """How to train."""

    root: Any
    options: dict[str, Any] = field(default_factory=dict)
    num_epochs: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    callbacks: list[Any] = field(default_factory=list)
    stop: Any = stop

    def run(self, stop_after=-1, resume=True, preemption=None):
        """Train to the end, or until ``stop_after`` steps."""
        set_seed(5)
        arguments = TrainingArguments(
            **{
                "output_dir": str(self.root / "unused"),
                "num_train_epochs": self.num_epochs,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "save_steps": 3,
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                **self.options,
            }
        )
        settings = Settings(mode=SaveMode.BLOCKING, **self.settings)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(CheckpointManager(self.root, settings))
            listening = stack.enter_context(preemption(checkpoints)) if preemption else None
            trainer = Recorded(
                tiny_model(),
                arguments,
                train_dataset=Tokens(),
                eval_dataset=Tokens(4),
                callbacks=[Stop(stop_after, self.stop), *self.callbacks],
                checkpoints=checkpoints,
                preemption=listening,
            )
            trainer.losses = []
            with contextlib.suppress(Stopped):
                trainer.train(resume_from_checkpoint=resume)
        return Outcome(
            trainer.losses,
            [
                {
                    name: log[name]
                    for name in ("step", "loss", "eval_loss", "grad_norm")
                    if name in log
                }
                for log in trainer.state.log_history
            ],
            {name: value.clone() for name, value in trainer.model.state_dict().items()},
            trainer.optimizer.state_dict(),
            trainer.lr_scheduler.get_last_lr(),
            trainer.resumed.step if trainer.resumed else None,
        )
