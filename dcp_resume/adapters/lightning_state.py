"""What a ``lightning.Trainer`` is made of, as the parts of a checkpoint, and back."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from typing import Any

from lightning import __version__
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer import call

from dcp_resume.adapters.progress import LocalProgress
from dcp_resume.adapters.whole import WholeOfRank, WholeValue
from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.rng import RngState

__all__ = ["LightningState"]


@dataclass(slots=True)
class _Draws:
    """States of this rank's random number generators, at the moments that a resume returns to."""

    at_fit_start: dict[str, Any] = field(default_factory=dict)
    """Before the data loaders were made."""
    at_epoch_start: dict[str, Any] = field(default_factory=dict)
    """Before the epoch's order was drawn."""


class LightningState:
    """A trainer's state, bound to the trainer; made once the strategy has set it up.

    Args:
        trainer: In ``fit``, with model and optimizers in their final form.
        modes: Metric → ``min`` or ``max``, of those whose best value is kept.
    """

    def __init__(self, trainer: Trainer, modes: dict[str, str]) -> None:
        self._trainer = trainer
        self._progress = LocalProgress(modes=modes)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self._rng = RngState(seed)
        self._draws = _Draws(at_fit_start=self._rng.state_dict())
        self._is_between_epochs = False
        self._bookkeeping: dict[str, Any] = {}
        self._place: dict[str, Any] = {}

    # Saving.

    def parts(self, *, is_between_epochs: bool) -> dict[str, Any]:
        """The state for ``CheckpointManager``.

        Args:
            is_between_epochs: Whether the last epoch is over with all that follows it.
        """
        trainer = self._trainer
        self._is_between_epochs = is_between_epochs
        self._note_progress()
        optimizers = trainer.optimizers
        names = (
            ["optim"] if len(optimizers) == 1 else [f"optim_{n}" for n in range(len(optimizers))]
        )
        return {
            "model": trainer.strategy.model,
            **dict(zip(names, optimizers, strict=True)),
            "trainer": self._progress,
            "lightning": WholeValue("lightning", self._dump, self._take_bookkeeping),
            "place": WholeOfRank(
                "place",
                self._dump_place,
                self._take_place,
                derive=self._derive_place,
                is_bound=lambda: not self._is_between_epochs,
                bound_to={"accumulate_grad_batches": trainer.accumulate_grad_batches},
            ),
        }

    def note_epoch_start(self) -> None:
        """The order of the next epoch is about to be drawn."""
        self._draws.at_epoch_start = self._rng.state_dict()

    def _note_progress(self) -> None:
        trainer = self._trainer
        if trainer.global_step <= self._progress.step:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loss = next((values.pop(name) for name in ("loss", "train_loss") if name in values), None)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._progress.advance(
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            loss=loss,
            last_lr=[float(group["lr"]) for group in groups],
            metrics=values,
        )

    def _dump(self) -> dict[str, Any]:
        """What Lightning's own checkpoints hold beside tensors, in their layout."""
        trainer, connector = self._trainer, self._trainer._checkpoint_connector
        found: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "pytorch-lightning_version": __version__,
            "loops": connector._get_loops_state_dict(),
            "callbacks": call._call_callbacks_state_dict(trainer),
            "lr_schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "is_between_epochs": self._is_between_epochs,
        }
        found["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        if not self._is_between_epochs:  # also where a stop made Lightning count the epoch
            for tracker in ("total", "current"):
                counts = found["loops"]["fit_loop"]["epoch_progress"][tracker]
                counts["processed"] = counts["completed"]
        precision = trainer.precision_plugin
        if state := precision.state_dict():
            found[type(precision).__qualname__] = state
        precision.on_save_checkpoint(found)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is not None and (state := datamodule.state_dict()):
            found[type(datamodule).__qualname__] = state
        call._call_callbacks_on_save_checkpoint(trainer, found)
        call._call_lightning_module_hook(trainer, "on_save_checkpoint", found)
        return found

    def _dump_place(self) -> dict[str, Any]:
        combined = self._trainer.fit_loop._combined_loader
        return {
            "loaders": combined._state_dicts() if combined is not None else [],
            "at_fit_start": self._draws.at_fit_start,
            "at_epoch_start": self._draws.at_epoch_start,
            "now": self._rng.state_dict(),
            "metrics": dict(self._trainer.callback_metrics),
            "num_batches": self._trainer.num_training_batches,
        }

    # Loading.

    def _take_bookkeeping(self, saved: dict[str, Any]) -> None:
        self._bookkeeping = saved

    def _take_place(self, saved: dict[str, Any]) -> None:
        self._place = saved
        self._draws = _Draws(saved["at_fit_start"], saved["at_epoch_start"])

    def _derive_place(self, step: int) -> None:
        self._rng.derive({}, step)
        now = self._rng.state_dict()
        names = ("at_fit_start", "at_epoch_start", "now")
        self._take_place({"loaders": [], "metrics": {}, **dict.fromkeys(names, now)})

    def restore(self) -> None:
        """Hand what was loaded to the trainer, and repeat the start of its ``fit``."""
        trainer, saved = self._trainer, self._bookkeeping
        connector = trainer._checkpoint_connector
        connector._loaded_checkpoint = saved
        connector.restore_datamodule()
        call._call_lightning_module_hook(trainer, "on_load_checkpoint", saved)
        connector.restore_callbacks()
        connector.restore_precision_plugin_state()
        connector.restore_loops()
        connector.restore_lr_schedulers()
        connector._loaded_checkpoint = {}
        if saved["is_between_epochs"]:
            self._begin_next_epoch()
        self._rng.load_state_dict(self._draws.at_fit_start)

    def _begin_next_epoch(self) -> None:
        """As if the loops had never stopped, so that Lightning restarts nothing."""
        fit_loop = self._trainer.fit_loop
        for tracker in (fit_loop.epoch_progress.total, fit_loop.epoch_progress.current):
            tracker.ready = tracker.completed
        loop = fit_loop.epoch_loop
        loop.batch_progress.reset_on_run()
        loop.scheduler_progress.reset_on_run()
        loop.automatic_optimization.optim_progress.reset_on_run()
        loop.val_loop.batch_progress.total.reset()
        _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]

    def return_to_place(self) -> None:
        """Go on in the middle of an epoch: put the data loaders where they were.

        Raises:
            ConfigurationError: The epoch has not as many batches as before.
        """
        if not self._place:
            return
        # Schedulers and callbacks may look at what was logged before.
        self._trainer._logger_connector._callback_metrics.update(self._place["metrics"])
        if self._bookkeeping["is_between_epochs"]:
            return  # the samplers do not know their epoch yet
        fit_loop, fetcher = self._trainer.fit_loop, _fetcher(self._trainer)
        _check_length(self._place["num_batches"], self._trainer.num_training_batches)
        used = fit_loop.epoch_loop.batch_progress.current.ready
        is_first, states = fit_loop.epoch_progress.current.completed == 0, self._place["loaders"]
        if states or not is_first:
            # What ``setup_data`` began is another epoch's.
            self._begin_iteration(self._draws.at_epoch_start)
        for number in range(0 if states else used):
            if next(fetcher, None) is None:
                _check_length(used, number)
        fetcher.fetched = 0  # the loop adds what was used
        # It warns of what was just seen to.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the")
        fit_loop._restarting = False  # else plateau schedulers are left out at the epoch's end
        self._rng.load_state_dict(self._place["now"])
        self._place = {}

    def return_to_epoch_start(self) -> None:
        """Go on between two epochs."""
        if self._place:
            self._begin_iteration(self._place["now"])
            self._place = {}

    def _begin_iteration(self, draws: dict[str, Any]) -> None:
        combined = self._trainer.fit_loop._combined_loader
        assert combined is not None
        for loader in combined.flattened:
            _set_sampler_epoch(loader, self._trainer.current_epoch)
        combined._load_state_dicts(self._place["loaders"])
        if self._bookkeeping["is_between_epochs"]:
            for loader in combined.flattened:
                if getattr(loader, "next_iter_state", None) is not None:
                    iter(loader)  # torchdata's returns to the end of the epoch that is over
        self._rng.load_state_dict(draws)
        iter(_fetcher(self._trainer))


def _fetcher(trainer: Trainer) -> _DataFetcher:
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return fetcher


def _check_length(was: float, now: float) -> None:
    if was != now:
        raise ConfigurationError(
            f"the epoch was saved with {was} batches on each rank, and has {now} now, so that some "
            f"samples would come twice and some never; resume with the same data and batch size",
            option="train_dataloaders",
        )


def check_loaders(trainer: Trainer) -> None:
    """Refuse training data of which no place can be saved.

    Raises:
        ConfigurationError: ``training_step`` takes an iterator, some loaders have a state and
            others none, or one with a state has no length.
    """
    fetcher = _fetcher(trainer)
    loaders = fetcher.combined_loader.flattened
    stateful = [isinstance(loader, _Stateful) for loader in loaders]
    problem = ""
    if isinstance(fetcher, _DataLoaderIterDataFetcher):
        problem = "training_step takes dataloader_iter, and nobody counts batches; take batch"
    elif any(stateful) and not all(stateful):
        problem = "some have state_dict() and others none; use one kind for all"
    elif any(stateful) and fetcher.length is None:
        problem = (
            "a loader with state_dict() has no length, so Lightning fetches one batch ahead, which "
            "a resume would skip; give it __len__, or the trainer limit_train_batches"
        )
    if problem:
        raise ConfigurationError(f"training data: {problem}", option="train_dataloaders")
