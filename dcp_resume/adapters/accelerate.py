"""Hugging Face Accelerate: all that an ``Accelerator`` has prepared, as one state.

run = AcceleratedRun(accelerator)
with CheckpointManager("runs/a") as checkpoints:
    checkpoints.resume(run.parts())
    for epoch in range(run.epoch, num_epochs):
        for batch in run.batches(loader):   # the rest of the epoch
            …
            checkpoints.save(step, run.parts())
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from dcp_resume.adapters.progress import LocalProgress
from dcp_resume.adapters.whole import WholeOfRank, WholeValue
from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.rng import RngState

__all__ = ["AcceleratedRun"]


class AcceleratedRun:
    """What ``accelerator`` prepared and registered, and the place in the training data.

    Make it after ``prepare`` and ``register_for_checkpointing``.

    Args:
        accelerator: With DDP, FSDP or one process.
        seed: Of random numbers that are derived where the number of ranks changed.
    """

    def __init__(self, accelerator: Accelerator, seed: int = 0) -> None:
        self._accelerator = accelerator
        self.trainer = LocalProgress()
        """Yours to ``advance`` once a step."""
        self.epoch = 0
        """Of the next batch; that of ``batches``."""
        self._rng = RngState(seed)
        self._loader: Any = None
        self._used = 0
        self._start: dict[str, Any] = {}
        self._place: dict[str, Any] = {}

    # The data.

    def batches(self, loader: Any) -> Iterator[Any]:
        """The rest of the epoch; the next call is the next epoch.

        Leaving the loop early ends the epoch too, at that next call: a save before it still goes on
        with the batches that are left.

        Args:
            loader: The prepared training loader. After a resume it is read up to its place.

        Raises:
            ConfigurationError: It has not as many batches as when the epoch was saved.
        """
        place, self._place, self._loader = self._place, {}, loader
        if self._used and not place:  # the loop before was left early
            self.epoch, self._used = self.epoch + 1, 0
        loader.set_epoch(self.epoch)
        if place:
            self._put_draws(place["start"])
        if self._used:
            _check_length(place["num_batches"], len(loader))
        self._start = self._draws()
        for number, batch in enumerate(loader, 1):
            if number <= self._used:
                continue
            if place and self._used:
                self._put_draws(place["now"])
            place, self._used = {}, number
            yield batch
        self.epoch += 1
        self._used = 0

    def _draws(self) -> dict[str, Any]:
        """States of the random number generators, the sampler's own too."""
        generator = getattr(self._loader, "synchronized_generator", None)
        own = [generator.get_state()] if generator is not None else []
        return {"rng": self._rng.state_dict(), "sampler": own}

    def _put_draws(self, draws: dict[str, Any]) -> None:
        self._rng.load_state_dict(draws["rng"])
        for state in draws["sampler"]:
            self._loader.synchronized_generator.set_state(state)

    # The state.

    def parts(self) -> dict[str, Any]:
        """The state for ``CheckpointManager``.

        Several optimizers are parts of their own: ``optim_0`` and so on.

        Raises:
            ConfigurationError: DeepSpeed or Megatron-LM keep their state to themselves, or several
                models were prepared.
        """
        accelerator: Any = self._accelerator
        kind = str(accelerator.distributed_type.value)
        if kind in ("DEEPSPEED", "MEGATRON_LM"):
            raise ConfigurationError(
                f"{kind} keeps its state to itself; use DDP or FSDP", option="accelerator"
            )
        if len(accelerator._models) > 1:
            raise ConfigurationError(
                f"{len(accelerator._models)} models were prepared, whose parameters may have the "
                f"same names; prepare one torch.nn.ModuleDict that holds them",
                option="accelerator",
            )
        registered = {f"custom_{n}": item for n, item in enumerate(accelerator._custom_objects)}
        return {
            "model": list(accelerator._models),
            **_numbered([wrapper.optimizer for wrapper in accelerator._optimizers]),
            "trainer": self.trainer,
            **registered,
            "accelerate": WholeValue("accelerate", self._dump, self._take),
            "place": WholeOfRank(
                "place",
                self._dump_place,
                self._take_place,
                derive=lambda step: self._rng.derive({}, step),
                is_bound=lambda: not self._is_between_epochs,
                bound_to={"gradient_accumulation_steps": accelerator.gradient_accumulation_steps},
            ),
        }

    def _dump(self) -> dict[str, Any]:
        accelerator: Any = self._accelerator
        scaler = accelerator.scaler
        return {
            "schedulers": [scheduler.state_dict() for scheduler in accelerator._schedulers],
            "scaler": scaler.state_dict() if scaler is not None else {},
            "step": accelerator.step,
            "epoch": self.epoch + (self._used > 0 and self._is_between_epochs),
        }

    def _take(self, saved: dict[str, Any]) -> None:
        accelerator: Any = self._accelerator
        for scheduler, state in zip(accelerator._schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        accelerator.step, self.epoch = saved["step"], saved["epoch"]

    def _dump_place(self) -> dict[str, Any]:
        if self._place:  # nobody has gone there yet
            return self._place
        now = self._draws()
        if self._is_between_epochs:
            return {"used": 0, "num_batches": 0, "start": now, "now": now}
        num_batches = len(self._loader)
        return {"used": self._used, "num_batches": num_batches, "start": self._start, "now": now}

    def _take_place(self, saved: dict[str, Any]) -> None:
        self._place, self._used = saved, saved["used"]

    @property
    def _is_between_epochs(self) -> bool:
        if self._used == 0 or self._place:
            return self._used == 0
        return self._used == len(self._loader)


def _numbered(optimizers: list[Any]) -> dict[str, Any]:
    if len(optimizers) == 1:
        return {"optim": optimizers[0]}
    return {f"optim_{n}": optimizer for n, optimizer in enumerate(optimizers)}


def _check_length(was: int, now: int) -> None:
    if was != now:
        raise ConfigurationError(
            f"the epoch was saved with {was} batches on each rank, and has {now} now, so that some "
            f"samples would come twice and some never; resume with the same data and batch size",
            option="loader",
        )
