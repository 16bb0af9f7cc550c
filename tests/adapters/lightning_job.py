"""A small training on Lightning's own Trainer: dropout, augmentation, a schedule, validation."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from dcp_resume import SaveMode, Settings
from dcp_resume.adapters.lightning import ResumableCheckpoint

NUM_SAMPLES, BATCH = 20, 2


class Stopped(Exception):
    """The training was to end here."""


def stop():
    """End the training, but not the process."""
    raise Stopped


class Noisy(Dataset):
    """Samples that are augmented with whatever the random numbers of the process say."""

    def __init__(self, num_samples=NUM_SAMPLES):
        self.samples = torch.linspace(-1, 1, 4 * num_samples).reshape(num_samples, 4)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index] + 0.1 * torch.randn(4)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8),
            torch.nn.Dropout(0.3),
            torch.nn.BatchNorm1d(8),
            torch.nn.Linear(8, 1),
        )

    def _loss(self, batch):
        return (self.layers(batch).squeeze(1) - batch.sum(1)).square().mean()

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        schedulers = [{"scheduler": decay, "interval": "step"}]
        if self.trainer.enable_validation:
            # Each epoch but the first is worse than demanded, so that a lost one shows.
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, factor=0.7, threshold=10.0, threshold_mode="abs"
            )
            schedulers.append({"scheduler": plateau, "monitor": "val_loss"})
        return [optimizer], schedulers


class Sharded(Regression):
    """By FSDP2, as ``ModelParallelStrategy`` wants it."""

    def __init__(self):
        super().__init__()
        del self.layers[2]

    def configure_model(self):
        for layer in (self.layers[0], self.layers[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Record(Callback):
    """Keeps the loss of each batch, and stops after some step."""

    def __init__(self, stop_after, stop):
        self.losses, self._stop_after, self._stop = [], stop_after, stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append((trainer.current_epoch, batch_idx, outputs["loss"].item()))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self._stop_after:
            self._stop()


@dataclass
class Outcome:
    """What a training leaves."""

    losses: list[tuple[int, int, float]]
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    lr: list[float]
    resumed_step: int | None
    warnings: list[str] = field(default_factory=list)


def local_clones(value):
    """This rank's shards: they outlive the process group of a pool's call."""
    if isinstance(value, dict):
        return {key: local_clones(item) for key, item in value.items()}
    return (value.to_local() if isinstance(value, DTensor) else value).clone()


@dataclass
class Job:
    """How to train."""

    root: Any
    save_interval: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    validates: bool = True
    loader: Any = None
    max_epochs: int = 3
    model: Any = Regression
    settings: dict[str, Any] = field(default_factory=dict)
    strategy: Any = None
    seed: int = 3
    callbacks: list[Any] = field(default_factory=list)
    stop: Any = stop
    fit: dict[str, Any] = field(default_factory=dict)

    def run(self, stop_after=-1, **callback_options):
        """Train to the end, or until ``stop_after`` steps."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = self._run(stop_after, callback_options)
        outcome.warnings = [str(warning.message) for warning in caught]
        return outcome

    def _run(self, stop_after, callback_options):
        seed_everything(self.seed, verbose=False)
        record = Record(stop_after, self.stop)
        settings = Settings(
            save_interval=self.save_interval, mode=SaveMode.BLOCKING, **self.settings
        )
        checkpoint = ResumableCheckpoint(self.root, settings, **callback_options)
        trainer = Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": self.max_epochs,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 2,
                "callbacks": [checkpoint, record, *self.callbacks],
                "default_root_dir": str(self.root),
                **self.options,
                **({"strategy": self.strategy()} if self.strategy else {}),
            }
        )
        model = self.model()
        loader = self.loader() if self.loader else DataLoader(Noisy(), BATCH, shuffle=True)
        validation = DataLoader(Noisy(4), BATCH) if self.validates else None
        with contextlib.suppress(Stopped):
            trainer.fit(model, loader, validation, **self.fit)
        return Outcome(
            record.losses,
            local_clones(model.state_dict()),
            local_clones(trainer.optimizers[0].state_dict()["state"]),
            [group["lr"] for group in trainer.optimizers[0].param_groups],
            checkpoint.resumed.step if checkpoint.resumed else None,
        )
