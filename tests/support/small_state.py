"""A state that tells its step, for tests of what becomes of it."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["MIB", "is_at", "state_at"]

MIB = 1 << 20


def state_at(step: int, num_floats: int = MIB // 4) -> dict[str, Any]:
    """One MiB, unless told otherwise."""
    return {"model": {"w": torch.full((num_floats,), float(step))}, "step": step}


def is_at(state: dict[str, Any], step: int) -> bool:
    """Whether it is the state of this step, to the last element."""
    return bool((state["model"]["w"] == step).all()) and state["step"] == step
