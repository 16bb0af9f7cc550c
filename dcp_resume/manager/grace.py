"""What can be saved before the process is killed: a pure choice, from measured times."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from dcp_resume.manager.stateful import optimizers_of

__all__ = ["Budget", "ExitAction", "RunningSave", "SaveTimes", "WhenShort", "optimizer_share"]

_REMEMBERED = 5


class WhenShort(Enum):
    """What is saved when there is no time for the whole state."""

    LEAVE = "leave"
    """Nothing: the run goes on from the checkpoint before."""
    LEAVE_OUT_OPTIMIZER = "leave_out_optimizer"
    """All but optimizer state, if there is time for that."""


class ExitAction(Enum):
    """What a process does before it leaves."""

    SAVE = "save"
    """Wait for a save that runs, then save."""
    SAVE_WITHOUT_OPTIMIZER = "save_without_optimizer"
    """Likewise, but optimizer state."""
    WAIT = "wait"
    """Wait for the save that runs."""
    LEAVE = "leave"
    """Nothing."""


@dataclass(frozen=True, slots=True)
class RunningSave:
    """A save in the background."""

    step: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds there are, and seconds that things take."""

    left_s: float
    """Until the process is killed."""
    save_s: float = 0.0
    """A save of the whole state; 0 if none was measured, which is reason enough to try."""
    optimizer_share: float = 0.0
    """Of the state's bytes, from 0 to 1."""
    margin: float = 1.5
    """How much longer than measured a save may take."""

    def choose(
        self, step: int, running: RunningSave | None, saved_step: int | None, when_short: WhenShort
    ) -> ExitAction:
        """What to do.

        Args:
            step: Optimizer steps completed.
            running: The save that is not done yet.
            saved_step: Step of the newest checkpoint.
            when_short: If there is no time for the whole state.
        """
        if running is not None and running.step == step:
            return ExitAction.WAIT
        if saved_step == step:
            return ExitAction.LEAVE
        left_s = self.left_s
        if running is not None:
            left_s -= max(0.0, self.save_s - running.elapsed_s)
        if left_s > 0 and left_s >= self.save_s * self.margin:
            return ExitAction.SAVE
        light_s = self.save_s * (1.0 - self.optimizer_share)
        may_be_light = when_short is WhenShort.LEAVE_OUT_OPTIMIZER and self.optimizer_share > 0
        if may_be_light and left_s > 0 and left_s >= light_s * self.margin:
            return ExitAction.SAVE_WITHOUT_OPTIMIZER
        return ExitAction.LEAVE if running is None else ExitAction.WAIT


class SaveTimes:
    """How long the last saves took; the slowest of them counts."""

    def __init__(self) -> None:
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, duration_s: float) -> None:
        """A save was committed."""
        self._durations_s.append(duration_s)

    @property
    def save_s(self) -> float:
        """Seconds to expect; 0 if none was measured."""
        return max(self._durations_s, default=0.0)


def optimizer_share(state: Mapping[str, Any]) -> float:
    """Which part of this rank's bytes is optimizer state; modules and optimizers are counted."""
    held = optimizers_of(state)
    optimizers = sum(
        _num_bytes(value)
        for several in held.values()
        for optimizer in several
        for of_parameter in optimizer.state.values()
        for value in of_parameter.values()
    )
    modules = sum(
        _num_bytes(tensor)
        for value in state.values()
        for module in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(module, Module)
        for tensor in (*module.parameters(), *module.buffers())
    )
    return optimizers / max(optimizers + modules, 1)


def _num_bytes(value: object) -> int:
    if isinstance(value, DTensor):
        value = value.to_local()
    return value.nbytes if isinstance(value, Tensor) else 0
