r"""Train GPT-2 or LLaMA-3 on any mix of data, tensor and pipeline parallelism; stop and resume it.

    torchrun --nproc-per-node 4 examples/train.py --tensor_parallel 2 --save runs/a \
        --save_interval 10 --load runs/a
    torchrun --nproc-per-node 2 examples/train.py --pipeline_parallel 2 --save runs/a \
        --save_interval 10 --load runs/a

The second command goes on where the first one stopped, on another mesh. What that takes is marked
``dcp_resume`` below; everything else is an ordinary PyTorch trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import lora
import numpy as np
import torch
import torch.distributed as dist
from flags import layout_of, model_of, num_micro_batches, parse_flags
from initial_weights import HuggingFaceWeights, LlmcWeights, RandomWeights
from parallel import ParallelModel, Weights
from tokens import Windows, read_tokens
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dcp_resume import (
    CheckpointManager,
    Declarations,
    OptimizerState,
    Preemption,
    PreemptionSettings,
    RngState,
    SaveMode,
    Settings,
    TrainerState,
)
from dcp_resume.data import ResumableLoader, ResumableSampler
from dcp_resume.events import Event, StepReached, subscribe
from dcp_resume.observe import SaveProgress


class Trainer:
    """All that a step needs and changes, on this rank."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = make_model(args)
        self.optimizers = [make_optimizer(args, stage) for stage in self.model.stages]
        self.schedules = Schedules(self.optimizers, args.warmup)
        self.data = make_data(args, self.model)
        self.progress = TrainerState()  # ← dcp_resume
        stream, num_streams = self.model.random_stream()
        seed_generators(args.seed + stream)
        self.state = {  # ← dcp_resume: all that a checkpoint holds
            "model": self.model.stages,
            "optim": self.optimizers,
            "schedule": self.schedules,
            "data": self.data,
            "rng": RngState(args.seed, stream=stream, num_streams=num_streams),
            "trainer": self.progress,
        }
        self._accumulation = num_micro_batches(args)
        self._forward_backward = self.model.make_forward_backward(
            self._accumulation, args.batch_size, args.sequence_length
        )
        self._micro_batches = endless(self.data)

    def step(self) -> None:
        """One optimizer step."""
        started = time.monotonic()
        micro_batches = [next(self._micro_batches) for _ in range(self._accumulation)]
        inputs, targets = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        device = self.model.device
        loss = self.model.global_loss(self._forward_backward(inputs.to(device), targets.to(device)))
        for optimizer in self.optimizers:
            optimizer.step()
        self.schedules.step()
        self.progress.advance(
            step=self.progress.step + 1,
            samples=self.data.consumed_samples - self.progress.consumed_samples,
            tokens=self.args.total_batch_size,
            loss=loss,
            last_lr=self.schedules.last_lr,
            epoch=self.data.epoch,
            duration_s=time.monotonic() - started,
        )
        note(self.args, self.progress.step, loss, time.monotonic() - started)


def train(args: argparse.Namespace) -> Trainer:
    """Start or resume, and go on to the last step."""
    trainer = Trainer(args)
    with contextlib.ExitStack() as stack:
        runs = {  # one if --load and --save are the same
            url: stack.enter_context(open_run(args, trainer.model, url))  # ← dcp_resume
            for url in (args.load, args.save)
            if url
        }
        if not resume(args, trainer, runs):
            trainer.model.fill(initial_weights(args, trainer.model))
            if args.preempt_at:
                preempt_in_save(args.preempt_at)
        if args.lora_load_path:
            with CheckpointManager(args.lora_load_path) as adapters:  # ← dcp_resume
                adapters.load(adapter_state(trainer))
        preemptions = [stack.enter_context(listen(runs[args.save]))] if args.save else []
        while trainer.progress.step < args.stop_at:
            trainer.step()
            for preemption in preemptions:
                if preemption.should_stop(trainer.progress.step):
                    preemption.save_and_exit(trainer.progress.step, trainer.state)
            if is_due(args, trainer.progress.step):
                runs[args.save].save(trainer.progress.step, trainer.state)  # ← dcp_resume
    if args.lora_save_path:
        with CheckpointManager(args.lora_save_path) as adapters:  # ← dcp_resume
            adapters.save(trainer.progress.step, adapter_state(trainer)).result()
    return trainer


def listen(run: CheckpointManager) -> Preemption:
    """For what says that the platform will stop this job; a Ctrl-C is the user's, see ``main``."""
    return Preemption(run, PreemptionSettings(signals={"SIGTERM": 30.0, "SIGUSR1": 30.0}))


def open_run(args: argparse.Namespace, model: ParallelModel, url: str) -> CheckpointManager:
    """The checkpoints of one run, with the options of the command line."""
    settings = Settings(
        save_interval=args.save_interval,
        max_checkpoint_keep=args.max_checkpoint_keep,
        save_optimizer_state=wanted(args.save_optimizer_state),
        load_optimizer_state=wanted(args.load_optimizer_state),
        mode=SaveMode(args.save_mode),
        storage_options=dict(args.storage_option),
        deadline_s=args.deadline,
        declarations=Declarations(
            ties={f"model.{name}": f"model.{first}" for name, first in model.ties.items()}
        ),
    )
    facts = {**model.config.facts(), "lora_rank": args.lora_rank, "lora_alpha": args.lora_alpha}
    return CheckpointManager(
        url,
        settings,
        model_facts=facts,
        precision_facts={"compute_dtype": args.dtype},
        notes=asdict(model.layout),
    )


def wanted(flag: bool) -> OptimizerState:
    return OptimizerState.REQUIRED if flag else OptimizerState.LEFT_OUT


def resume(
    args: argparse.Namespace, trainer: Trainer, runs: Mapping[str, CheckpointManager]
) -> bool:
    """Go on from the checkpoint that was asked for; False if there is none to go on from."""
    if not args.load:
        say("no --load: starting from scratch")
        return False
    if args.load == args.save:  # the job that was preempted: take its run over
        loaded = runs[args.load].resume(trainer.state, args.load_step)  # ← dcp_resume
    else:
        loaded = runs[args.load].load(trainer.state, args.load_step)  # ← dcp_resume
    if loaded is None:
        say(f"{args.load} has no checkpoint yet: starting from scratch")
        return False
    say(
        f"resumed from step {loaded.step} of {args.load}, after {trainer.data.consumed_samples} "
        f"samples; saved by {loaded.world_size} rank(s), loaded by {dist.get_world_size()} in "
        f"{loaded.duration_s:.2f} s"
    )
    return True


def is_due(args: argparse.Namespace, step: int) -> bool:
    is_last = step == args.stop_at
    return bool(args.save) and (is_last or step % args.save_interval == 0)


def adapter_state(trainer: Trainer) -> dict[str, Any]:
    return {"adapters": lora.adapters(trainer.model.stages)}


# What a trainer is made of.


def make_model(args: argparse.Namespace) -> ParallelModel:
    def adapt(stage: nn.Module) -> None:
        if args.lora_rank:
            lora.add_adapters(stage, args.lora_target_modules, args.lora_rank, args.lora_alpha)

    return ParallelModel(
        model_of(args),
        layout_of(args),
        adapt=adapt,
        dtype=getattr(torch, args.dtype),
        device=torch.device(args.device),
    )


def initial_weights(args: argparse.Namespace, model: ParallelModel) -> Weights:
    """Random numbers, or those of a published model; adapters are random either way."""
    config = model_of(args)
    made = RandomWeights(args.seed, config.n_layer, model.ties)
    given: Weights = made
    if args.llmc_filepath:
        given = LlmcWeights(args.llmc_filepath, config)
    elif args.hf_weights:
        given = HuggingFaceWeights(args.hf_weights, args.model == "gpt2" and config.n_head)
    return lambda name, shape: (made if lora.is_adapter(name) else given)(name, shape)


def make_optimizer(args: argparse.Namespace, stage: nn.Module) -> Optimizer:
    parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    kind = {"sgd": SGD, "adamw": AdamW}[args.optimizer]
    # One tensor at a time (foreach=False): tensors of one model lie on different meshes.
    return kind(parameters, lr=args.learning_rate, foreach=False)


def seed_generators(seed: int) -> None:
    """Every generator that a checkpoint holds, used or not: two runs then hold the same."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Schedules:
    """One learning rate for the optimizers of all stages of this rank."""

    def __init__(self, optimizers: list[Optimizer], warmup: int) -> None:
        self._schedules = [
            LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
            for optimizer in optimizers
        ]

    @property
    def last_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return self._schedules[0].get_last_lr()

    def step(self) -> None:
        """After each optimizer step."""
        for schedule in self._schedules:
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Of the first: they never differ."""
        return self._schedules[0].state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For all."""
        for schedule in self._schedules:
            schedule.load_state_dict(dict(state_dict))


def make_data(args: argparse.Namespace, model: ParallelModel) -> ResumableLoader:
    """Micro batches of this rank; where they begin is counted in samples over all ranks."""
    windows = Windows(read_tokens(args.input_bin), args.sequence_length)
    sampler = ResumableSampler(  # ← dcp_resume
        len(windows),
        global_batch=args.total_batch_size // args.sequence_length,
        micro_batch=args.batch_size,
        rank=model.data_rank,
        num_ranks=model.num_data_ranks,
        seed=args.seed,
        fingerprint=windows.fingerprint,
    )
    return ResumableLoader(windows, sampler)  # ← dcp_resume


def endless(loader: ResumableLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader  # one epoch, or the rest of it


# What it says.


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def note(args: argparse.Namespace, step: int, loss: float, duration_s: float) -> None:
    """One line a step; a JSON number of 17 digits gives every bit of the loss back."""
    speed = args.total_batch_size / duration_s
    say(f"step {step:4d}/{args.num_iteration}  loss {loss:.6f}  {speed:6.0f} tokens/s")
    if args.losses is not None and dist.get_rank() == 0:
        with args.losses.open("a") as lines:
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


@record  # torchrun then shows the traceback of the rank that failed first
def main() -> None:
    args = parse_flags(__doc__)
    make_exact()
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[args.device]
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    if dist.get_rank() == 0:  # says how long each save took
        logging.basicConfig(format="%(message)s")
        logging.getLogger("dcp_resume").setLevel(logging.INFO)
        subscribe(SaveProgress())  # draws on a terminal alone
    signal.signal(signal.SIGINT, interrupt)
    try:
        train(args)
    except KeyboardInterrupt:  # the running save, if any, has ended by now
        say(f"interrupted; go on with --load {args.save}" if args.save else "interrupted")
        sys.exit(128 + signal.SIGINT)
    finally:
        dist.destroy_process_group()


def interrupt(*_: object) -> None:
    """A Ctrl-C comes twice: from the terminal and from torchrun. The second must not cut a save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def make_exact() -> None:
    """The same numbers from the same state, also in another process."""
    torch.set_num_threads(1)  # a sum split over threads rounds differently on another machine
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which those need on CUDA
    # It is about writing into the logits in place, which nobody does here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


if __name__ == "__main__":
    main()
