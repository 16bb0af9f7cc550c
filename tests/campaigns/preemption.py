"""Preempt a real torchrun job at random instants, again and again; the same command goes on.

    python -m tests.campaigns.preemption --trials 20

Ends with 0 if every notice was answered by a save, and no step was lost. ``--seed`` repeats the
instants and the kinds of notice; how far the job is by then depends on the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dcp_resume import CheckpointManager
from tests.support.launched import Job

NUM_RANKS = 2
GRACE_S = 30.0
LATEST_S = 3.0
"""After all ranks trained a step, the notice comes within this time."""
FLAGS = ("--last-step", "400000", "--save-interval", "7", "--grace", str(GRACE_S), "--workers", "1")


def to_worker(number: signal.Signals, rank: int) -> Callable[[Job], object]:
    return lambda job: os.kill(job.notes.pids[rank], number)


def to_launcher(number: signal.Signals) -> Callable[[Job], object]:
    return lambda job: job.process.send_signal(number)


def to_both(job: Job) -> None:
    """As Slurm does: every process hears it, and torchrun passes it on once more."""
    job.process.send_signal(signal.SIGTERM)
    for pid in job.notes.pids:
        os.kill(pid, signal.SIGTERM)


KINDS: dict[str, Callable[[Job], object]] = {
    "SIGTERM to torchrun": to_launcher(signal.SIGTERM),
    "SIGINT to torchrun": to_launcher(signal.SIGINT),
    "SIGTERM to everyone": to_both,
    "SIGTERM to rank 0": to_worker(signal.SIGTERM, 0),
    "SIGTERM to rank 1": to_worker(signal.SIGTERM, 1),
    "SIGUSR1 to rank 1": to_worker(signal.SIGUSR1, 1),
}


@dataclass(frozen=True)
class Trial:
    """One notice, and what came of it."""

    kind: str
    after_s: float
    step: int
    """The last one that was trained."""
    saved: int
    """The newest checkpoint afterwards; -1 if there is none."""
    codes: list[int]
    """Exit codes of the ranks that were not killed."""
    left_s: float
    """From the signal until the last rank had saved and left."""
    ended_s: float
    """From the signal until the launcher's end."""
    is_killed: bool
    """Whether the grace period was over before."""

    @property
    def has_fired(self) -> bool:
        """Whether every rank saved and left by itself."""
        return not self.is_killed and self.codes == [75] * NUM_RANKS

    @property
    def lost_steps(self) -> int:
        """Steps that the next incarnation has to train again."""
        return self.step - max(self.saved, 0)

    def row(self, number: int) -> str:
        """For the table."""
        fired = "yes" if self.has_fired else f"NO {self.codes}"
        return (
            f"{number:5}  {self.kind:19}  {self.after_s:8.2f}  {self.step:6}  {fired:5}  "
            f"{self.lost_steps:4}  {self.left_s:8.2f}  {self.ended_s:9.2f}"
        )


HEADER = "trial  notice                after/s    step  fired  lost  to exit/s  to end/s"


def preempt(root: Path, kind: str, after_s: float) -> Trial:
    """Start the job, give it a notice, and kill it if it is still there after the grace period."""
    with CheckpointManager(root) as checkpoints, Job(root, *FLAGS) as job:
        job.wait_for_step((checkpoints.latest() or 0) + 1)
        time.sleep(after_s)
        started = time.time()
        KINDS[kind](job)
        is_killed = not job.has_ended(GRACE_S)
        if is_killed:
            job.kill()
        outcome = job.outcome()
        ended_s = time.time() - started
        saved = checkpoints.latest()
    return Trial(
        kind,
        after_s,
        outcome.trained,
        -1 if saved is None else saved,
        outcome.codes,
        left_s=outcome.left_at - started,
        ended_s=ended_s,
        is_killed=is_killed,
    )


def run(kinds: Sequence[str], trials: int, seed: int, act: Callable[[str, float], Trial]) -> int:
    """The campaign's table, and its exit code.

    Args:
        kinds: Of notices, of which each trial draws one.
        trials: How many.
        seed: Of kinds and instants.
        act: Given a kind, and seconds after the first step, makes a trial.
    """
    draw = random.Random(seed)
    print(f"seed {seed}, {NUM_RANKS} ranks, grace period {GRACE_S:.0f} s\n{HEADER}", flush=True)
    found = []
    for number in range(1, trials + 1):
        found.append(act(draw.choice(kinds), draw.uniform(0.0, LATEST_S)))
        print(found[-1].row(number), flush=True)
    print(summary(found))
    return 0 if all(trial.has_fired and trial.lost_steps == 0 for trial in found) else 1


def summary(found: list[Trial]) -> str:
    fired = sum(trial.has_fired for trial in found)
    lost = sum(trial.lost_steps for trial in found)
    times = sorted(trial.left_s for trial in found)
    return (
        f"fired {fired} of {len(found)}, lost steps {lost}, from signal to exit: median "
        f"{times[len(times) // 2]:.2f} s, longest {times[-1]:.2f} s"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__, 20, argv)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "run"
        return run(list(KINDS), args.trials, args.seed, partial(preempt, root))


def parse(about: str | None, trials: int, argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
