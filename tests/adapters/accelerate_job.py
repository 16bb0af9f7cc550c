"""A small training on an Accelerator of one's own loop: dropout, a schedule, accumulation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.adapters.accelerate import AcceleratedRun


class Average:
    """A registered object with tensors of its own."""

    def __init__(self, parameter):
        self._parameter, self.value = parameter, torch.zeros_like(parameter)

    def update(self):
        self.value.lerp_(self._parameter.detach(), 0.5)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


@dataclass
class Outcome:
    """What a training leaves."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    average: torch.Tensor
    lr: list[float]
    resumed_step: int | None


@dataclass
class Job:
    """How to train."""

    root: Any
    save_interval: int = 3
    accumulation: int = 1
    data: dict[str, Any] = field(default_factory=dict)

    def run(self, stop_after=-1, num_epochs=3):
        """Train to the end, or until ``stop_after`` steps."""
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        set_seed(4)
        accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=self.accumulation,
            dataloader_config=DataLoaderConfiguration(**self.data),
        )
        layers = (torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        samples = torch.linspace(-1, 1, 80).reshape(20, 4)
        loader = DataLoader(TensorDataset(samples, samples.sum(1)), 2, shuffle=True)
        average = Average(layers[2].weight)
        model, optimizer, scheduler, loader = accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        accelerator.register_for_checkpointing(average)
        run, losses = AcceleratedRun(accelerator), []
        settings = Settings(save_interval=self.save_interval, mode=SaveMode.BLOCKING)
        with warnings.catch_warnings(), CheckpointManager(self.root, settings) as checkpoints:
            warnings.simplefilter("ignore")
            resumed = checkpoints.resume(run.parts())
            for _ in range(run.epoch, num_epochs):
                for inputs, targets in run.batches(loader):
                    if run.trainer.step == stop_after:
                        break
                    with accelerator.accumulate(model):
                        loss = (model(inputs).squeeze(1) - targets).square().mean()
                        accelerator.backward(loss)
                        optimizer.step()
                        scheduler.step()
                        optimizer.zero_grad()
                    losses.append(loss.item())
                    if not accelerator.sync_gradients:
                        continue
                    average.update()
                    step = run.trainer.step + 1
                    run.trainer.advance(step=step, loss=loss.item(), epoch=run.epoch)
                    if checkpoints.should_save(step):
                        checkpoints.save(step, run.parts())
                else:
                    continue
                break
        weights = accelerator.unwrap_model(model).state_dict()
        return Outcome(
            losses,
            {name: value.clone() for name, value in weights.items()},
            average.value,
            scheduler.get_last_lr(),
            resumed.step if resumed else None,
        )
