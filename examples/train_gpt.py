"""Train a small GPT on any mix of tensor, data and pipeline parallelism; stop and resume it.

    torchrun --nproc-per-node 4 examples/train_gpt.py runs/a --tp 2 --dp-shard 2 --save-interval 10
    torchrun --nproc-per-node 2 examples/train_gpt.py runs/a --pp 2 --save-interval 10

The second command goes on where the first one stopped, on another mesh. What that takes is marked
``dcp_resume`` in ``train``; everything else is an ordinary PyTorch trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from gpt import GPT, Shape
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from dcp_resume import CheckpointManager, SaveMode, Settings, TrainerState
from dcp_resume.events import Event, StepReached, subscribe

SHAPE = Shape()
WARMUP_STEPS = 10


# The data: which bytes a step sees depends on the samples consumed so far, never on the ranks.


class Corpus:
    """A text cut into windows, shuffled anew each epoch."""

    def __init__(self, text: bytes, seed: int) -> None:
        num_windows = (len(text) - 1) // SHAPE.context
        if num_windows < 1:
            raise SystemExit(f"the corpus has {len(text)} bytes; it needs {SHAPE.context + 1}")
        data = torch.tensor(list(text[: num_windows * SHAPE.context + 1]))
        self._windows = data.unfold(0, SHAPE.context + 1, SHAPE.context)
        self._seed = seed

    def batch(self, samples: range) -> tuple[Tensor, Tensor]:
        """Inputs, and the same one byte later, for samples counted from the start of the run."""
        rows = torch.stack([self._window(sample) for sample in samples])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _window(self, sample: int) -> Tensor:
        epoch, place = divmod(sample, len(self._windows))
        return self._windows[_order(len(self._windows), self._seed + epoch)[place]]


@cache
def _order(length: int, seed: int) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def read_corpus(path: Path | None) -> bytes:
    """A file, or the language reference that every CPython carries: 466 kB of English."""
    if path is not None:
        return path.read_bytes()
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


# The model, spread over the mesh by torch's own means.


def make_mesh(args: argparse.Namespace) -> DeviceMesh:
    sizes = (args.pp, args.dp_replicate, args.dp_shard, args.tp)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))


def make_model(mesh: DeviceMesh, seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(SHAPE, stage=mesh["pp"].get_local_rank(), num_stages=mesh["pp"].size())
    data_mesh = mesh["dp_replicate", "dp_shard"]
    for layer in model.layers.values():
        if mesh["tp"].size() > 1:
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {f"attention.{name}": columns for name in "qkv"}
            plan |= {"attention.out": rows, "up": columns, "down": rows}
            parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=data_mesh)
    return fully_shard(model, mesh=data_mesh)


def make_forward_backward(
    model: GPT, mesh: DeviceMesh, microbatches: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that fills the gradients, and returns the mean loss on the last stage, else 0."""
    pipe = mesh["pp"]
    if pipe.size() == 1:

        def whole(inputs: Tensor, targets: Tensor) -> Tensor:
            loss = token_loss(model(inputs), targets)
            loss.backward()
            return loss.detach()

        return whole

    place, last = pipe.get_local_rank(), pipe.size() - 1
    stage = PipelineStage(model, place, pipe.size(), torch.device("cpu"), group=pipe.get_group())
    schedule = Schedule1F1B(stage, microbatches, loss_fn=token_loss)

    def staged(inputs: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        given = (inputs,) if place == 0 else ()
        schedule.step(*given, **({"target": targets, "losses": losses} if place == last else {}))
        return torch.stack(losses).mean().detach() if losses else torch.zeros(())

    return staged


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def global_loss(loss: Tensor, mesh: DeviceMesh) -> float:
    """Mean over the data-parallel ranks, the same on every rank of the world."""
    is_last_stage = mesh["pp"].get_local_rank() == mesh["pp"].size() - 1
    counts = is_last_stage and mesh["tp"].get_local_rank() == 0
    total = loss.double() if counts else torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / (mesh["dp_replicate"].size() * mesh["dp_shard"].size())


# The training.


def train(args: argparse.Namespace) -> None:
    mesh = make_mesh(args)
    model = make_model(mesh, args.seed)
    # One tensor at a time (foreach=False): tensors of one model lie on different meshes.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS)
    )
    forward_backward = make_forward_backward(model, mesh, microbatches=2 * args.pp)
    corpus = Corpus(read_corpus(args.corpus), args.seed)
    trainer = TrainerState()
    state = {"model": model, "optim": optimizer, "schedule": schedule, "trainer": trainer}

    with CheckpointManager(args.run, settings(args)) as checkpoints:  # ← dcp_resume
        if args.resume != "none":
            loaded = checkpoints.resume(state, args.resume)  # ← dcp_resume
            say(f"resumed from step {loaded.step}" if loaded else "nothing to resume, starting")
        if args.preempt_at and trainer.step == 0:
            preempt_in_save(args.preempt_at)

        while trainer.step < args.steps:
            started = time.monotonic()
            inputs, targets = corpus.batch(my_samples(mesh, trainer.consumed_samples, args.batch))
            optimizer.zero_grad()
            loss = global_loss(forward_backward(inputs, targets), mesh)
            optimizer.step()
            schedule.step()
            trainer.advance(
                step=trainer.step + 1,
                samples=args.batch,
                tokens=args.batch * SHAPE.context,
                loss=loss,
                last_lr=schedule.get_last_lr(),
            )
            note(args.losses, trainer.step, loss, time.monotonic() - started)
            if checkpoints.should_save(trainer.step):
                checkpoints.save(trainer.step, state)  # ← dcp_resume


def settings(args: argparse.Namespace) -> Settings:
    return Settings(
        save_interval=args.save_interval,
        mode=SaveMode(args.mode),
        storage_options=dict(args.storage_option),
        deadline_s=args.deadline,
    )


def my_samples(mesh: DeviceMesh, consumed: int, batch: int) -> range:
    """This rank's slice of the global batch that begins after ``consumed`` samples."""
    ranks = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    place = mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size()
    place += mesh["dp_shard"].get_local_rank()
    share = batch // ranks
    return range(consumed + place * share, consumed + (place + 1) * share)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def note(losses: Path | None, step: int, loss: float, duration_s: float) -> None:
    """One line a step; a JSON number of 17 digits gives every bit of the loss back."""
    say(f"step {step:4d}  loss {loss:.6f}  {duration_s * 1000:4.0f} ms")
    if losses is not None and dist.get_rank() == 0:
        with losses.open("a") as lines:
            lines.write(json.dumps({"step": step, "loss": loss}) + "\n")


def preempt_in_save(step: int) -> None:
    """Kill every rank of this host in the middle of the save of ``step``, as a lost machine would.

    The last rank stops before its first byte, gives the others time to write their files, then
    sends SIGKILL to all: the attempt on storage has some files, and no commit.
    """
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())

    def watch(event: Event) -> None:
        if isinstance(event, StepReached) and (event.step, event.number) == (step, 3):
            time.sleep(0.5)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    if dist.get_rank() == dist.get_world_size() - 1:
        subscribe(watch)


# The command line.


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("run", help="root of the run: a directory or s3://bucket/prefix")
    parser.add_argument("--save-interval", type=int, default=10, help="steps; 0 never saves")
    parser.add_argument("--resume", type=_request, default="latest", metavar="latest|best|N|none")
    parser.add_argument("--mode", choices=[mode.value for mode in SaveMode], default="background")
    parser.add_argument("--deadline", type=float, default=120.0, help="seconds a save may wait")
    parser.add_argument("--storage-option", type=_pair, action="append", default=[], metavar="K=V")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16, help="sequences, over all ranks")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a text file")
    parser.add_argument("--losses", type=Path, help="append JSON lines of step and loss")
    for axis in ("tp", "pp", "dp-shard", "dp-replicate"):
        parser.add_argument(f"--{axis}", type=int, default=1)
    parser.add_argument(
        "--preempt-at", type=int, help="be killed in the save of this step, unless resumed"
    )
    args = parser.parse_args()
    pieces = args.dp_shard * args.dp_replicate * (2 * args.pp if args.pp > 1 else 1)
    if args.batch % pieces:
        parser.error(f"--batch must be a multiple of {pieces} for this layout, got {args.batch}")
    return args


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the module's docstring."""


def _request(text: str) -> int | str:
    return text if text in ("latest", "best", "none") else int(text)


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark:
        raise argparse.ArgumentTypeError(f"expected K=V, got {text!r}")
    return key, value


@record  # torchrun then shows the traceback of the rank that failed first
def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # a sum split over threads would round differently on another machine
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
