"""Train, be killed in the middle of a save, resume on the same ranks and on others; compare.

    python examples/demo.py                # on a local directory
    python examples/demo.py --storage s3   # on a real S3 server, started for the demo

Five torchrun jobs of ``train.py``, with its GPT-2:

1. the reference: four ranks (two tensor-parallel × two FSDP), never interrupted, nothing saved;
2. the same, saved at an interval; all ranks get SIGKILL in the middle of a save;
3. resumed on two FSDP ranks, saving nothing;
4. resumed on two pipeline stages, likewise;
5. resumed on the four ranks, saving on.

The demo fails unless the losses of 5 equal those of 1 bit for bit, and those of 3 and 4 differ from
them by rounding only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from s3_server import S3Server

TRAINER = Path(__file__).with_name("train.py")
ROUNDING = 1e-5
"""Another mesh adds the same numbers in another order: the last bits of a float32 near 5 differ."""
Losses = dict[int, float]


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks of a job, and how they share the model."""

    name: str
    num_ranks: int
    flags: tuple[str, ...]


FOUR_RANKS = Layout("TP2 x FSDP2", 4, ("--tensor_parallel", "2", "--data_parallel", "fsdp"))
TWO_RANKS = Layout("FSDP2", 2, ("--data_parallel", "fsdp"))
TWO_STAGES = Layout("PP2", 2, ("--pipeline_parallel", "2"))


@dataclass(frozen=True, slots=True)
class Job:
    """One torchrun job of the demo."""

    name: str
    layout: Layout
    flags: tuple[str, ...]
    num_steps: int
    """Steps it will log, for the progress bar."""
    is_killed: bool = False


class JobFailed(Exception):
    """A job did not end as it should; the message holds the end of what its ranks said."""


def run_job(job: Job, directory: Path) -> Losses:
    """Run a job to its end, and read the losses it logged.

    Raises:
        JobFailed: A rank failed, or a job that was to be killed was not.
    """
    log, output = directory / f"{job.name}.losses.jsonl", directory / f"{job.name}.out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={job.layout.num_ranks}", "--shutdown-timeout=5", str(TRAINER)]
    command += [*job.layout.flags, *job.flags, "--losses", str(log)]
    with output.open("wb") as lines, torchrun(command, lines) as process, progress(job) as show:
        while process.poll() is None:
            show(len(read_losses(log)))
            time.sleep(0.2)
        show(len(read_losses(log)))
    said = output.read_text(errors="replace")
    if job.is_killed != (process.returncode != 0) or job.is_killed != ("SIGKILL" in said):
        raise JobFailed(f"job {job.name!r} ended with {process.returncode}:\n{said[-6000:]}")
    return read_losses(log)


@contextlib.contextmanager
def torchrun(command: list[str], output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A torchrun that ends, with its ranks, when the block is left in any way."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a Ctrl-C reaches the ranks once, by the line below
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks; killed itself, it would orphan them
        process.wait()


def read_losses(log: Path) -> Losses:
    if not log.exists():
        return {}
    lines = log.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records}


@contextlib.contextmanager
def progress(job: Job) -> Iterator[Callable[[int], object]]:
    """A bar on stderr, or plain lines where rich is not installed."""
    text = f"{job.name} ({job.layout.num_ranks} ranks: {job.layout.name})"
    if importlib.util.find_spec("rich") is None:
        started = time.monotonic()
        print(f"{text} …", file=sys.stderr, flush=True)
        yield lambda done: None
        print(f"{text}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<54}"), BarColumn(24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(text, total=job.num_steps)
        yield lambda done: bars.update(task, completed=min(done, job.num_steps))


def make_jobs(url: str, steps: int, interval: int, killed_at: int) -> list[Job]:
    end = ("--num_iteration", str(steps))
    save = (*end, "--save", url, "--save_interval", str(interval))
    load = ("--load", url)
    kill = ("--preempt_at", str(killed_at))
    left = steps - (killed_at - interval)
    return [
        Job("uninterrupted", FOUR_RANKS, end, steps),
        Job("killed in a save", FOUR_RANKS, (*save, *kill), killed_at, is_killed=True),
        Job("resumed on 2 ranks", TWO_RANKS, (*end, *load), left),
        Job("resumed on 2 stages", TWO_STAGES, (*end, *load), left),
        Job("resumed on 4 ranks", FOUR_RANKS, (*save, *load), left),
    ]


def run_demo(args: argparse.Namespace, url: str, directory: Path) -> dict[str, Any]:
    """Run the jobs, and gather what they prove."""
    # Here and not above: --help and a missing S3 server should not wait for torch.
    from dcp_resume import CheckpointManager, open_store

    killed_at = (args.steps - 1) // args.save_interval * args.save_interval
    jobs = make_jobs(url, args.steps, args.save_interval, killed_at)
    losses: dict[str, Losses] = {}
    torn_files: list[str] = []
    for job in jobs:
        losses[job.name] = run_job(job, directory)
        if job.is_killed:
            with contextlib.closing(open_store(url)) as store:
                torn_files = [info.key for info in store.list(f"step-{killed_at:08d}/")]
    reference, killed, *resumed = losses.values()
    with CheckpointManager(url) as checkpoints:
        steps = checkpoints.steps()
    source = killed_at - args.save_interval
    before = {step: loss for step, loss in killed.items() if step <= source}
    return {
        "run": url,
        "steps": args.steps,
        "killed_in_save_of": killed_at,
        "files_of_the_killed_save": torn_files,
        "resumed_from": source,
        "checkpoints": steps,
        "losses": losses,
        "is_bit_equal": before | resumed[-1] == reference and min(resumed[-1]) == source + 1,
        "max_difference": {
            job.name: max(abs(loss - reference[step]) for step, loss in got.items())
            for job, got in zip(jobs[2:-1], resumed[:-1], strict=True)
        },
    }


def print_report(facts: dict[str, Any]) -> None:
    """The table of losses, and what follows from it."""
    losses, source, killed_at = facts["losses"], facts["resumed_from"], facts["killed_in_save_of"]
    reference = losses["uninterrupted"]
    before = {step: loss for step, loss in losses["killed in a save"].items() if step <= source}
    columns = {
        "killed, resumed on 4": before | losses["resumed on 4 ranks"],
        "resumed on 2 ranks": losses["resumed on 2 ranks"],
        "resumed on 2 stages": losses["resumed on 2 stages"],
    }
    meshes = [layout.name for layout in (FOUR_RANKS, FOUR_RANKS, TWO_RANKS, TWO_STAGES)]
    layouts = "".join(f"{name:<24}" for name in meshes[1:]).rstrip()
    print(f"\nstep  {'uninterrupted':<16}" + "".join(f"{name:<24}" for name in columns).rstrip())
    print(f"      {meshes[0]:<16}{layouts}")
    for step in range(max(1, source - 1), facts["steps"] + 1):
        cells = [compared(column.get(step), reference[step]) for column in columns.values()]
        row = "".join(f"{cell:<24}" for cell in cells)
        print(f"{step:>4}  {reference[step]:<16.9f}{row}".rstrip())
        if step == source:
            print(f"      -- newest whole checkpoint; SIGKILL in the save of step {killed_at} --")
    print("= means the same bits; otherwise the difference to the uninterrupted run is given.\n")
    equal = "bit for bit equal to" if facts["is_bit_equal"] else "NOT EQUAL to"
    print(f"Same mesh: the losses are {equal} the uninterrupted run's.")
    for name, difference in facts["max_difference"].items():
        cause = "rounding, no more" if difference < ROUNDING else "NOT ROUNDING"
        print(f"Other mesh, {name}: largest difference {difference:.1e}, {cause}.")
    torn = len(facts["files_of_the_killed_save"])
    print(f"The killed save of step {killed_at} left {torn} files and no commit; no load saw them.")


def compared(loss: float | None, reference: float) -> str:
    if loss is None:
        return ""
    return f"{loss:.9f} " + ("=" if loss == reference else f"{loss - reference:+.1e}")


def list_checkpoints(url: str) -> None:
    """What the run holds at the end, by the operator's own tool."""
    print(f"\n$ dcp-resume ls {url}", flush=True)
    subprocess.run([sys.executable, "-m", "dcp_resume", "ls", url], check=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", choices=["local", "s3"], default="local")
    parser.add_argument("--directory", type=Path, default=Path("demo-run"), help="where to work")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--save-interval", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON instead")
    args = parser.parse_args()
    if not 0 < 2 * args.save_interval < args.steps:
        parser.error("--steps must be more than twice --save-interval, which must be positive")
    return args


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    directory = (args.directory / time.strftime("%Y%m%d-%H%M%S")).resolve()
    directory.mkdir(parents=True)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        url = str(directory / "run")
        if args.storage == "s3":
            os.environ.update(stack.enter_context(S3Server("demo")).environment)
            url = f"s3://demo/{directory.name}"
        try:
            facts = run_demo(args, url, directory)
        except JobFailed as error:
            print(error, file=sys.stderr)
            return 1
        if args.json:
            print(json.dumps(facts, indent=1))
        else:
            print_report(facts)
            list_checkpoints(url)
            print(f"\n{time.monotonic() - started:.0f} s. What the ranks said: {directory}/*.out")
    is_rounding = all(difference < ROUNDING for difference in facts["max_difference"].values())
    return 0 if facts["is_bit_equal"] and is_rounding else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
