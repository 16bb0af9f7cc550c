"""What a trainer knows besides its tensors: where it is, and how well it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.models import TrainerFacts
from dcp_resume.manifest.report import ReportItem, Severity, newer_version

__all__ = ["Ancestor", "TrainerState", "check_trainer", "note_ancestor", "trainer_facts"]

VERSION = 1


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A checkpoint that a run went on from."""

    step: int
    url: str
    """Root of its run."""
    seq: int
    """Log number of its commit."""
    world_size: int
    """Ranks that saved it."""


@dataclass(slots=True)
class TrainerState:
    """Progress of a training run; saved with every checkpoint, and shown by ``dcp-resume ls``.

        >>> trainer = TrainerState(modes={"accuracy": "max"})
        >>> trainer.advance(step=10, samples=320, loss=2.5, metrics={"accuracy": 0.7})
        >>> trainer.best_loss, trainer.best_step, trainer.bests["accuracy"]
        (2.5, 10, (0.7, 10))

    It is a ``Stateful``: put it into the state beside model and optimizer.
    """

    of_coordinator: ClassVar[tuple[str, ...]] = ("wall_time_s",)
    """Fields that ranks measure each for themselves; rank 0's are saved."""

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
    modes: dict[str, str] = field(default_factory=dict)
    """Metric → ``min`` or ``max``, of those whose best value is kept; the trainer's choice."""
    bests: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Metric → its best value and the step it was reached at."""
    wall_time_s: float = 0.0
    """Seconds spent in training, over all incarnations of the run."""
    lineage: list[Ancestor] = field(default_factory=list)
    """The checkpoints that this run went on from, oldest first."""

    def __post_init__(self) -> None:
        wrong = {name: mode for name, mode in self.modes.items() if mode not in ("min", "max")}
        if wrong:
            raise ConfigurationError(f"modes must be 'min' or 'max', got {wrong}", option="modes")

    def advance(
        self,
        *,
        step: int,
        samples: int = 0,
        tokens: int = 0,
        loss: float | None = None,
        last_lr: Sequence[float] | None = None,
        metrics: Mapping[str, float] | None = None,
        epoch: int | None = None,
        duration_s: float = 0.0,
    ) -> None:
        """Record one completed step.

        Args:
            step: Optimizer steps completed, this one included.
            samples: Samples that this step consumed over all ranks.
            tokens: Tokens likewise.
            loss: The step's loss; NaN never becomes the best.
            last_lr: Learning rate per parameter group.
            metrics: Further metrics, whose best is kept if ``modes`` names them.
            epoch: The epoch that the data is in now.
            duration_s: Seconds that the step took.

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
        self.wall_time_s += duration_s
        if epoch is not None:
            self.epoch = epoch
        if last_lr is not None:
            self.last_lr = [float(lr) for lr in last_lr]
        if loss is not None:
            self.metrics["loss"] = float(loss)
            if loss < self.best_loss:
                self.best_loss, self.best_step = float(loss), step
        for name, value in (metrics or {}).items():
            self._note(name, float(value))

    def _note(self, name: str, value: float) -> None:
        self.metrics[name] = value
        if name not in self.modes or math.isnan(value):
            return
        best = self.bests.get(name)
        is_better = best is None or (
            value < best[0] if self.modes[name] == "min" else value > best[0]
        )
        if is_better:
            self.bests[name] = (value, self.step)

    def went_on_from(self, ancestor: Ancestor) -> None:
        """Note the checkpoint that this incarnation resumed from; the manager calls it."""
        self.lineage = [*self.lineage, ancestor]

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
            wall_time_s=self.wall_time_s,
        )

    def state_dict(self) -> dict[str, Any]:
        """For saving; mappings become pairs, so that a new metric is no new name."""
        return {
            "version": VERSION,
            **{item.name: getattr(self, item.name) for item in fields(self)},
            "metrics": sorted(self.metrics.items()),
            "modes": sorted(self.modes.items()),
            "bests": sorted(self.bests.items()),
            "lineage": [asdict(ancestor) for ancestor in self.lineage],
        }

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """A newer version, and metrics whose best would mean something else."""
        yield from newer_version(saved, VERSION)
        before = dict(saved.get("modes", ()))
        for name in sorted(before.keys() & self.modes.keys()):
            if before[name] != self.modes[name]:
                message = f"saved with mode {before[name]!r}, now {self.modes[name]!r}"
                yield ReportItem(Severity.REFUSE, "trainer", f"modes.{name}", message)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading; modes that were not saved are kept.

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
        modes = self.modes
        for name in known & set(state_dict):
            setattr(self, name, state_dict[name])
        self.metrics = dict(self.metrics)
        self.modes = {**dict(self.modes), **modes}
        self.bests = {name: (value, step) for name, (value, step) in dict(self.bests).items()}
        self.lineage = [
            item if isinstance(item, Ancestor) else Ancestor(**item) for item in self.lineage
        ]


def _trainer_of(state: Mapping[str, Any]) -> TrainerState | None:
    return next((value for value in state.values() if isinstance(value, TrainerState)), None)


def trainer_facts(step: int, state: Mapping[str, Any]) -> TrainerFacts:
    """What the trainer state among the values says; ``step`` alone if there is none."""
    trainer = _trainer_of(state)
    return trainer.to_facts() if trainer is not None else TrainerFacts(step=step)


def note_ancestor(state: Mapping[str, Any], ancestor: Ancestor) -> None:
    """Note in the trainer state, if there is one, what it went on from."""
    trainer = _trainer_of(state)
    if trainer is not None:
        trainer.went_on_from(ancestor)


def check_trainer(step: int, state: Mapping[str, Any]) -> None:
    """Refuse a save whose objects contradict each other.

    Raises:
        ConfigurationError: The trainer state is at another step, or counts other samples than the
            data that it was trained on; the checkpoint would contradict itself.
    """
    trainer = _trainer_of(state)
    if trainer is None:
        return
    if trainer.step != step:
        raise ConfigurationError(
            f"save({step}, …) but the trainer state is at step {trainer.step}; call "
            f"advance(step=…) before save()",
            option="step",
        )
    for key, value in state.items():
        consumed = getattr(value, "consumed_samples", None)
        if value is trainer or not isinstance(consumed, int) or not trainer.consumed_samples:
            continue
        if consumed != trainer.consumed_samples:
            raise ConfigurationError(
                f"state[{key!r}] has consumed {consumed} samples, the trainer state says "
                f"{trainer.consumed_samples}, a difference of {consumed - trainer.consumed_samples}"
                f"; pass advance(samples=…) what a step takes over all ranks",
                option=key,
            )
