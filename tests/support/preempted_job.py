"""A small trainer that is meant to be preempted, and notes what it did.

    torchrun --nproc-per-node 2 tests/support/preempted_job.py ROOT --last-step 400

The weights are a function of the steps that were trained, each once. Each rank appends a line to
``ROOT.notes/rank-N.jsonl`` when it starts, after each step, and when it leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, Preemption, PreemptionSettings, Settings, TrainerState
from dcp_resume.data import ResumableLoader, ResumableSampler

NUM_WEIGHTS = 1024
GLOBAL_BATCH = 2


def notes_of(root: str, rank: int) -> Path:
    """Where a rank writes what it did."""
    return Path(f"{root}.notes") / f"rank-{rank}.jsonl"


def expected_weights(step: int) -> torch.Tensor:
    """Of every rank, after that many steps, each trained once and in turn."""
    weights = torch.zeros(NUM_WEIGHTS, dtype=torch.float64)
    for number in range(1, step + 1):
        weights = train_step(weights, number)
    return weights


def train_step(weights: torch.Tensor, step: int) -> torch.Tensor:
    """Not commutative: a step left out, doubled or in another order shows."""
    return weights * 0.999 + step


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--last-step", type=int, required=True)
    parser.add_argument(
        "--save-interval", type=int, default=0, help="steps; 0: only when preempted"
    )
    parser.add_argument("--step-s", type=float, default=0.02, help="seconds that a step takes")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds after a signal")
    parser.add_argument("--workers", type=int, default=0, help="data workers of each rank")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    notes = notes_of(args.root, dist.get_rank())
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.open("a") as lines:

        def note(**facts: Any) -> None:
            lines.write(json.dumps({**facts, "time": time.time()}) + "\n")
            lines.flush()

        try:
            train(args, note)
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) else 1
            note(left=code, error=f"{type(error).__name__}: {error}"[:300])
            raise
        note(left=0, error="")
    dist.destroy_process_group()


def train(args: argparse.Namespace, note: Any) -> None:
    trainer = TrainerState()
    model = {"w": torch.zeros(NUM_WEIGHTS, dtype=torch.float64)}
    sampler = ResumableSampler(
        1_000_000,
        global_batch=GLOBAL_BATCH,
        micro_batch=1,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
    )
    data = ResumableLoader(range(1_000_000), sampler, num_workers=args.workers)
    state = {"model": model, "trainer": trainer, "data": data}
    signals = dict.fromkeys(("SIGTERM", "SIGUSR1", "SIGINT"), args.grace)
    with (
        CheckpointManager(args.root, Settings(save_interval=args.save_interval)) as checkpoints,
        Preemption(checkpoints, PreemptionSettings(signals=signals)) as preemption,
    ):
        checkpoints.resume(state)
        note(pid=os.getpid(), resumed=trainer.step)
        for _ in data:  # one epoch, which is never over
            if not data.is_step_complete:
                continue
            step = trainer.step + 1
            time.sleep(args.step_s)
            gradient = torch.ones(1, dtype=torch.float64)
            dist.all_reduce(gradient)
            model["w"].copy_(train_step(model["w"], step))
            trainer.advance(step=step, samples=GLOBAL_BATCH)
            note(step=step)
            if preemption.should_stop(step):
                preemption.save_and_exit(step, state)
            if checkpoints.should_save(step) or step == args.last_step:
                checkpoints.save(step, state)
            if step == args.last_step:
                return


if __name__ == "__main__":
    main(parse())
