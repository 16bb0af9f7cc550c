"""What torchtitan's own checkpointer wrote, by name: to be imported, never read in its place."""

from __future__ import annotations

import re
from collections.abc import Iterable

from dcp_resume.errors import ConfigurationError

__all__ = ["STEP_PATH", "newest_first", "to_be_imported"]

STEP_PATH = re.compile(r"(?P<run>.+)/step-(?P<step>\d+)/?")
_STEP_NAME = re.compile(r"step-(?P<step>\d+)/?")


def newest_first(names: Iterable[str]) -> list[str]:
    """Those of checkpoints, by step.

    Args:
        names: Entries of a folder.
    """
    found = [match for match in map(_STEP_NAME.fullmatch, names) if match]
    return [match[0] for match in sorted(found, key=lambda match: -int(match["step"]))]


def to_be_imported(path: str, run: str | None, option: str) -> ConfigurationError:
    """The error that says how to bring a checkpoint into a run.

    Args:
        path: Of the checkpoint.
        run: Root of the run that is to hold it; None for a new one, which the option then names.
        option: That led to it.
    """
    match = STEP_PATH.fullmatch(path)
    step = match["step"] if match else "0"
    then = f", then set {option} to RUN" if run is None else ""
    return ConfigurationError(
        f"{path} was written by torchtitan's own checkpointer, and holds pickles, which are never "
        f"executed; bring it into a run first: dcp-resume import {path} {run or 'RUN'} "
        f"--loose model --step {step}{then}",
        option=option,
    )
