"""Prove that a training command resumes exactly, by running it with and without an interruption.

1. Straight. The command trains to the last step in one go.
2. Stopped. The same, into another run, ends early; what both have of that step is compared, which
   tells a training that is not reproducible from a resume that is not exact.
3. Resumed. The same once more: it goes on from there to the last step.
4. Compare. The two checkpoints of the last step, item by item (``session.difference``).
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.signing import ANYONE, Signing, Trust
from dcp_resume.proof.legs import Leg, run_leg
from dcp_resume.session.difference import CheckpointDifference, DiffOptions, compare_checkpoints
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.side import open_side
from dcp_resume.storage import ObjectStore, open_store

__all__ = ["Proof", "ProofPlan", "Scratch", "Verdict", "prove_resume"]

_PLACEHOLDERS = ("{run}", "{stop}")


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where a proof works."""

    url: str
    """Below it the two runs lie, ``straight`` and ``resumed``."""
    directory: Path
    """Where what the legs say is kept."""
    is_temporary: bool
    """Whether the directory was made for the proof, and goes with it."""

    @classmethod
    def at(cls, url: str | None) -> Scratch:
        """A scratch place at a URL; None for a new temporary directory."""
        is_local = url is not None and ("://" not in url or url.startswith("file://"))
        if url is not None and is_local:
            directory = Path(url.removeprefix("file://")).absolute()
            directory.mkdir(parents=True, exist_ok=True)
            return cls(str(directory), directory, is_temporary=False)
        directory = Path(tempfile.mkdtemp(prefix="dcp-resume-prove-"))
        return cls((url or str(directory)).rstrip("/"), directory, is_temporary=True)

    def remove(self) -> None:
        """Remove the directory if it was made for the proof; runs elsewhere are kept."""
        if self.is_temporary:
            shutil.rmtree(self.directory)


@dataclass(frozen=True, slots=True)
class ProofPlan:
    """What to prove.

    Raises:
        ConfigurationError: The command lacks a placeholder, or the steps are out of order.
    """

    command: tuple[str, ...]
    """Words with placeholders: ``{run}`` URL to save to and to resume from, ``{stop}`` step to end
    at, ``{last}`` last step of the training, ``{leg}`` name of the leg."""
    stop_at: int
    """Step at which the training is interrupted."""
    last: int
    """Step at which the two trainings are compared."""
    resume_words: tuple[str, ...] = ()
    """Added to the command where it is to resume."""
    storage_options: Mapping[str, Any] | None = None
    """For looking at the runs; the command gets its own."""
    trust: Trust = ANYONE
    """Whose checkpoints are believed; the command signs by its own keys."""
    diff: DiffOptions = field(default_factory=DiffOptions)

    def __post_init__(self) -> None:
        missing = [p for p in _PLACEHOLDERS if not any(p in word for word in self.command)]
        if missing:
            raise ConfigurationError(
                f"the command must say where it saves and where it stops, by {{run}} and {{stop}}; "
                f"{', '.join(missing)} is not in: {shlex.join(self.command)}",
                option="command",
            )
        if not 0 < self.stop_at < self.last:
            raise ConfigurationError(
                f"the step of the stop must be above 0 and below the last one, got {self.stop_at} "
                f"and {self.last}",
                option="stop_at",
            )

    def leg(self, name: str, run: str, stop: int, scratch: Scratch) -> Leg:
        """One training."""
        run = f"{scratch.url}/{run}"
        values = {"{run}": run, "{stop}": str(stop), "{last}": str(self.last), "{leg}": name}
        words = (*self.command, *(self.resume_words if name == "resumed" else ()))
        filled = []
        for word in words:
            for placeholder, value in values.items():
                word = word.replace(placeholder, value)
            filled.append(word)
        return Leg(name, tuple(filled), run, stop, scratch.directory / f"{name}.out")


class Verdict(Enum):
    """What a proof showed."""

    EXACT = "exact"
    """The resumed training is, item by item, what the straight one is."""
    NOT_EXACT = "not exact"
    """It is not."""
    NOT_REPRODUCIBLE = "not reproducible"
    """Two trainings differ before any resume: about the resume nothing can be said."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome of a proof."""

    stop_at: int
    last: int
    differences: tuple[CheckpointDifference, ...]
    """Of the step of the stop, if the straight leg kept a checkpoint of it too; and, if that has no
    difference, of the last step. ``a`` is the straight leg."""

    @property
    def verdict(self) -> Verdict:
        """What was shown."""
        final = self.differences[-1]
        if final.step_a == self.stop_at:
            return Verdict.NOT_REPRODUCIBLE
        is_whole = final.is_equal and not final.uncompared
        return Verdict.EXACT if is_whole else Verdict.NOT_EXACT

    @property
    def is_reproducible_to_the_stop(self) -> bool:
        """Whether two trainings are known to agree before the resume."""
        return len(self.differences) == 2


def prove_resume(
    plan: ProofPlan, scratch: Scratch, notice: Callable[[str], None] = lambda text: None
) -> Proof:
    """Run the command three times, and compare what it leaves.

    Args:
        plan: The command, and what to compare.
        scratch: Where to work.
        notice: Called with a sentence as each leg begins.

    Raises:
        LegFailed: A leg failed, or did not save or resume as it must.
        ConfigurationError: The scratch place holds runs already.
        InvalidCheckpoint: A leg left a damaged checkpoint.
        StorageError: The store failed.
    """
    straight = plan.leg("straight", "straight", plan.last, scratch)
    stopped = plan.leg("stopped", "resumed", plan.stop_at, scratch)
    resumed = plan.leg("resumed", "resumed", plan.last, scratch)
    options = plan.storage_options
    stores = [open_store(leg.run, storage_options=options) for leg in (straight, resumed)]
    for store in stores:
        _refuse_used(store, plan.trust)
    notice(f"leg 1 of 3, straight: to step {plan.last}")
    run_leg(straight)
    _check_newest(straight, _history(stores[0], plan.trust))
    notice(f"leg 2 of 3, stopped: to step {plan.stop_at}")
    run_leg(stopped)
    before = _history(stores[1], plan.trust)
    _check_newest(stopped, before)
    differences: list[CheckpointDifference] = []
    if _history(stores[0], plan.trust).find_step(plan.stop_at) is not None:
        differences.append(_compare(stores, plan.stop_at, plan))
        if not differences[0].is_equal:
            return Proof(plan.stop_at, plan.last, tuple(differences))
    notice(f"leg 3 of 3, resumed: from step {plan.stop_at} to step {plan.last}")
    run_leg(resumed)
    after = _history(stores[1], plan.trust)
    _check_newest(resumed, after)
    _check_resumed(resumed, plan.stop_at, before, after)
    differences.append(_compare(stores, plan.last, plan))
    return Proof(plan.stop_at, plan.last, tuple(differences))


def _history(store: ObjectStore, trust: Trust) -> RunHistory:
    return RunLog(store, signing=Signing(trust=trust)).refresh()


def _compare(stores: Sequence[ObjectStore], step: int, plan: ProofPlan) -> CheckpointDifference:
    a, b = (open_side(store, step, plan.trust) for store in stores)
    return compare_checkpoints(a, b, plan.diff)


def _refuse_used(store: ObjectStore, trust: Trust) -> None:
    if _history(store, trust).last_seq:
        raise ConfigurationError(
            f"{store.url} holds a run already; a proof needs an empty scratch place",
            option="scratch",
        )


def _check_newest(leg: Leg, history: RunHistory) -> None:
    """A leg must end at its step, with a checkpoint of it."""
    newest = history.newest()
    if newest is not None and newest.record.step == leg.stop:
        return
    if newest is None:
        found = f"left no checkpoint at {leg.run}"
    else:
        found = f"left step {newest.record.step} as its newest checkpoint, not step {leg.stop}"
    raise leg.failed(
        f"ended well, but {found}",
        f"let the command save to {{run}}, end at step {{stop}}, here {leg.stop}, and save that "
        f"step: what it saves at its end",
    )


def _check_resumed(leg: Leg, stop_at: int, before: RunHistory, after: RunHistory) -> None:
    """The last leg must go on from the stop; trained anew, it would equal the straight leg too."""
    stop = before.newest()
    assert stop is not None
    generation = after.generation
    source = after.sources[generation]
    while source is not None and after.commits[source].generation > stop.record.generation:
        generation = after.commits[source].generation
        source = after.sources[generation]
    if source != stop.seq:
        found = "began anew" if source is None else f"went on from {after.commits[source].step}"
        raise leg.failed(
            f"ended well, but {found} instead of going on from step {stop_at}",
            "let the command resume from {run} if that has a checkpoint; words that only a resume "
            "takes are given by --resume-with",
        )
    repeated = [r.step for s, r in after.commits.items() if s > stop.seq and r.step <= stop_at]
    if repeated:
        raise leg.failed(
            f"ended well, but saved step {repeated[0]} anew after the resume from step {stop_at}",
            "let it go on counting where the checkpoint stopped",
        )
