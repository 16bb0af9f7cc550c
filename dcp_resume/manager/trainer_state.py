"""What a trainer knows besides its tensors: where it is, and how well it does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.models import TrainerFacts

__all__ = ["TrainerState", "check_trainer", "trainer_facts"]

VERSION = 1


@dataclass(slots=True)
class TrainerState:
    """Progress of a training run; saved with every checkpoint, and shown by ``dcp-resume ls``.

        >>> trainer = TrainerState()
        >>> trainer.advance(step=10, samples=320, loss=2.5, last_lr=[1e-3])
        >>> trainer.best_loss, trainer.best_step
        (2.5, 10)

    It is a ``Stateful``: put it into the state beside model and optimizer.
    """

    step: int = 0
    """Optimizer steps completed."""
    epoch: int = 0
    consumed_samples: int = 0
    """Over all ranks, since the beginning of the run."""
    consumed_tokens: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    last_lr: list[float] = field(default_factory=list)
    """Learning rate per parameter group after the step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest value of each monitored metric."""

    def advance(
        self,
        *,
        step: int,
        samples: int = 0,
        tokens: int = 0,
        loss: float | None = None,
        last_lr: Sequence[float] | None = None,
    ) -> None:
        """Record one completed step.

        Args:
            step: Optimizer steps completed, this one included.
            samples: Samples that this step consumed over all ranks.
            tokens: Tokens likewise.
            loss: The step's loss; NaN never becomes the best.
            last_lr: Learning rate per parameter group.

        Raises:
            ConfigurationError: ``step`` does not come after the last one.
        """
        if step <= self.step:
            raise ConfigurationError(
                f"step {step} does not come after step {self.step}; call advance() once a step",
                option="step",
            )
        self.step = step
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        if last_lr is not None:
            self.last_lr = [float(lr) for lr in last_lr]
        if loss is not None:
            self.metrics["loss"] = float(loss)
            if loss < self.best_loss:
                self.best_loss, self.best_step = float(loss), step

    def to_facts(self) -> TrainerFacts:
        """The same for the manifest and the log."""
        return TrainerFacts(
            step=self.step,
            epoch=self.epoch,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_tokens,
            best_loss=self.best_loss,
            best_step=self.best_step,
            last_lr=tuple(self.last_lr),
            metrics=dict(self.metrics),
        )

    def state_dict(self) -> dict[str, Any]:
        """For saving; metrics become pairs, so that a new metric is no new name."""
        return {"version": VERSION, **asdict(self), "metrics": sorted(self.metrics.items())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading.

        Raises:
            ConfigurationError: Written by a newer version, or with fields this one does not know.
        """
        known = {item.name for item in fields(self)}
        unknown = sorted(set(state_dict) - known - {"version"})
        if state_dict.get("version", VERSION) > VERSION or unknown:
            raise ConfigurationError(
                f"trainer state of version {state_dict.get('version')} with unknown fields "
                f"{unknown}; this library knows version {VERSION}. Update it",
                option="trainer",
            )
        for name in known & set(state_dict):
            setattr(self, name, state_dict[name])
        self.metrics = dict(self.metrics)


def _trainer_of(state: Mapping[str, Any]) -> TrainerState | None:
    return next((value for value in state.values() if isinstance(value, TrainerState)), None)


def trainer_facts(step: int, state: Mapping[str, Any]) -> TrainerFacts:
    """What the trainer state among the values says; ``step`` alone if there is none."""
    trainer = _trainer_of(state)
    return trainer.to_facts() if trainer is not None else TrainerFacts(step=step)


def check_trainer(step: int, state: Mapping[str, Any]) -> None:
    """Refuse a save whose step is not the one that its trainer state is at.

    Raises:
        ConfigurationError: They differ; the checkpoint would contradict itself.
    """
    trainer = _trainer_of(state)
    if trainer is not None and trainer.step != step:
        raise ConfigurationError(
            f"save({step}, …) but the trainer state is at step {trainer.step}; call "
            f"advance(step=…) before save()",
            option="step",
        )
