"""The losses that a training log tells, whatever else it says. Pure text.

Two kinds of line tell a loss, and may be mixed:

    {"step": 12, "loss": 5.123}                      also "train_loss"; null counts as NaN
    step 12/100 | train loss 5.123000 | lr 1e-04     also "iteration 12/ 100 | lm loss: 5.123E+00"

A job that was killed and resumed repeats the steps after its checkpoint: of a step that occurs more
than once the last value counts. A line that was cut off by a kill tells nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dcp_resume.errors import ConfigurationError

__all__ = ["LOG_SUFFIXES", "LossLog", "find_logs", "parse_log", "read_log"]

LOG_SUFFIXES = (".jsonl", ".json", ".log", ".out", ".txt")
"""Files of a directory that are taken for logs."""

_STEP = re.compile(r"\b(?:step|iter(?:ation)?)\s*[:=]?\s*(\d+)\b", re.IGNORECASE)
_LOSS = re.compile(
    r"(?:([a-z]+)[ _])?loss\s*[:=]?\s*([-+]?(?:nan|inf(?:inity)?|\d+\.?\d*(?:e[-+]?\d+)?))"
    r"(?=[\s,;|)\]}]|$)",
    re.IGNORECASE,
)
_NOT_TRAINING = {"val", "valid", "validation", "eval", "evaluation", "test", "dev"}


@dataclass(frozen=True, slots=True)
class LossLog:
    """The losses of one log."""

    name: str
    losses: dict[int, float]
    """Step → loss, in order of the steps; of repeated steps the last value."""
    num_repeated: int
    """Values that a later value of the same step replaced."""


def find_logs(directory: Path) -> dict[str, Path]:
    """The logs below a directory, by their path from there."""
    return {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.suffix in LOG_SUFFIXES and path.is_file()
    }


def read_log(path: Path) -> LossLog:
    """The losses in a file.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return parse_log(lines, str(path))
    except OSError as error:
        raise ConfigurationError(f"cannot read the log {path}: {error}", option="log") from error


def parse_log(lines: Iterable[str], name: str = "log") -> LossLog:
    """The losses in lines of text.

    >>> parse_log(["step 1/9 | train loss 5.5", '{"step": 2, "loss": 5.25}']).losses
    {1: 5.5, 2: 5.25}
    """
    losses: dict[int, float] = {}
    num_repeated = 0
    for line in lines:
        told = _of_json(line) if line.lstrip().startswith("{") else _of_text(line)
        for step, loss in told:
            num_repeated += step in losses
            losses[step] = loss
    return LossLog(name, dict(sorted(losses.items())), num_repeated)


def _of_json(line: str) -> list[tuple[int, float]]:
    try:
        row = json.loads(line)
    except ValueError:  # cut off by a kill, or no JSON after all
        return []
    name = "loss" if "loss" in row else "train_loss"
    step, loss = row.get("step"), row.get(name, "")
    if type(step) is not int or not (loss is None or type(loss) in (int, float)):
        return []
    return [(step, math.nan if loss is None else float(loss))]


def _of_text(line: str) -> list[tuple[int, float]]:
    step = _STEP.search(line)
    if step is None:
        return []
    found = {(kind or "").lower(): value for kind, value in reversed(_LOSS.findall(line))}
    wanted = [kind for kind in found if kind not in _NOT_TRAINING]
    if not wanted:
        return []
    kind = next((kind for kind in wanted if kind.startswith("train")), wanted[-1])
    return [(int(step[1]), float(found[kind]))]
