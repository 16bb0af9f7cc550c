"""Let Slurm preempt and requeue a job at random instants; it goes on by itself each time.

    python -m tests.campaigns.preemption_slurm --trials 6

Starts a cluster of one node for itself (``tests/support/slurm.py`` says what that needs), and says
``SKIPPED`` where it cannot. Otherwise as ``tests.campaigns.preemption``.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dcp_resume import CheckpointManager
from tests.campaigns.preemption import FLAGS, GRACE_S, NUM_RANKS, Trial, parse, run
from tests.support.launched import Notes, worker_command
from tests.support.slurm import Slurm, missing_programs

REPOSITORY = Path(__file__).parents[2]
START_S = 300.0
"""Within which a requeued job must train; Slurm alone takes half a minute."""
SCRIPT = """\
#!/bin/bash
#SBATCH --ntasks=1 --cpus-per-task=2 --requeue --open-mode=append
export PYTHONPATH={repository} GLOO_SOCKET_IFNAME=lo
srun {command} &
step=$!
trap 'kill -USR1 $step' USR1  # what --signal=B:USR1@SECONDS sends comes to this shell alone
until wait $step; code=$?; ! kill -0 $step 2>/dev/null; do :; done
[ $code -eq 0 ] || scontrol requeue $SLURM_JOB_ID
"""


def requeue(slurm: Slurm, job: str) -> None:
    """An operator, or a failed node: SIGTERM to all, SIGKILL after 30 s."""
    slurm.call("scontrol", "requeue", job)


def warn_before_the_end(slurm: Slurm, job: str) -> None:
    """What ``--signal=B:USR1@SECONDS`` does before the time limit."""
    slurm.call("scancel", "--batch", "--signal=USR1", job)


def let_another_preempt(slurm: Slurm, job: str) -> None:
    """A job of a higher partition needs the node: SIGTERM to the steps that srun started."""
    del job
    slurm.call("sbatch", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=true")


KINDS: dict[str, Callable[[Slurm, str], object]] = {
    "scontrol requeue": requeue,
    "USR1 to the script": warn_before_the_end,
    "higher partition": let_another_preempt,
}


def wait_until(is_so: Callable[[], bool], what: str, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > end:
            raise AssertionError(f"not within {within_s:.0f} s: {what}")
        time.sleep(0.05)


class Incarnations:
    """The one job of the campaign, which Slurm starts again and again."""

    def __init__(self, slurm: Slurm, directory: Path) -> None:
        self._slurm = slurm
        self._root = directory / "run"
        self._notes = Notes(self._root, NUM_RANKS)
        command = shlex.join(worker_command(self._root, NUM_RANKS, *FLAGS))
        script = directory / "job.sh"
        script.write_text(SCRIPT.format(repository=REPOSITORY, command=command))
        self._output = directory / "job.out"
        self._job = slurm.submit(script, f"--output={self._output}", f"--chdir={directory}")

    def preempt(self, kind: str, after_s: float) -> Trial:
        """Wait until it trains, preempt it, and wait until all ranks have left."""
        notes = self._notes
        with CheckpointManager(self._root) as checkpoints:
            wait_until(lambda: notes.all_have("step"), self._log("it trains"), START_S)
            time.sleep(after_s)
            started = time.time()
            KINDS[kind](self._slurm, self._job)
            wait_until(lambda: notes.all_have("left"), self._log("all ranks left"), START_S)
            left = notes.named("left")
            self._notes = Notes(self._root, NUM_RANKS)
            saved = checkpoints.latest()
        left_s = max(note["time"] for note in left) - started
        return Trial(
            kind,
            after_s,
            notes.trained,
            -1 if saved is None else saved,
            [note["left"] for note in left],
            left_s=left_s,
            ended_s=left_s,
            is_killed=left_s > GRACE_S,
        )

    def _log(self, what: str) -> str:
        return f"{what}; the job's output is in {self._output}"


def main(argv: list[str] | None = None) -> int:
    args = parse(__doc__, 6, argv)
    missing = missing_programs()
    if missing or os.geteuid() != 0:
        print(f"SKIPPED: needs root, and these programs: {missing}", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory() as directory, Slurm() as slurm:
        job = Incarnations(slurm, Path(directory))
        return run(list(KINDS), args.trials, args.seed, job.preempt)


if __name__ == "__main__":
    sys.exit(main())
