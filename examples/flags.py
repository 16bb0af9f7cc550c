"""The command line of ``train.py``, checked as a whole before anything starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import gpt2
import llama3
import lora
import torch
from parallel import Config, Layout

from dcp_resume import SaveMode

__all__ = ["layout_of", "model_of", "num_data_ranks", "num_micro_batches", "parse_flags"]

SIZES: dict[str, dict[str, Config]] = {"gpt2": {**gpt2.SIZES}, "llama3": {**llama3.SIZES}}


def parse_flags(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check; every wrong combination is named at once, and ends the program."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_model_flags(parser)
    _add_training_flags(parser)
    _add_parallel_flags(parser)
    _add_lora_flags(parser)
    _add_checkpoint_flags(parser)
    args = parser.parse_args(arguments)
    args.save, args.load = args.save.rstrip("/"), args.load.rstrip("/")
    args.lora_target_modules = args.lora_target_modules or lora.TARGETS[args.model]
    args.stop_at = min(args.stop_at or args.num_iteration, args.num_iteration)
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    faults = [fault for check in CHECKS for fault in check(args)]
    if faults:
        parser.error("; ".join(faults) if len(faults) == 1 else "\n  - ".join(["", *faults]))
    return args


def model_of(args: argparse.Namespace) -> Config:
    """Sizes of the model that was asked for."""
    return replace(SIZES[args.model][args.size], dropout=args.dropout)


def layout_of(args: argparse.Namespace) -> Layout:
    """How the ranks share the work."""
    return Layout(
        data_parallel=args.data_parallel,
        tensor_parallel=args.tensor_parallel,
        sequence_parallel=args.sequence_parallel,
        pipeline_parallel=args.pipeline_parallel,
        virtual_pipeline_parallel=args.virtual_pipeline_parallel,
    )


def num_data_ranks(args: argparse.Namespace) -> int:
    """Ranks that get batches of their own."""
    return args.world_size // (args.tensor_parallel * args.pipeline_parallel)


def num_micro_batches(args: argparse.Namespace) -> int:
    """Micro batches of a data-parallel rank in one step."""
    return args.total_batch_size // (args.batch_size * args.sequence_length * num_data_ranks(args))


# The flags, by what they are about.


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and its initial weights")
    group.add_argument("--model", choices=list(SIZES), default="gpt2")
    sizes = "; ".join(f"{model}: {', '.join(names)}" for model, names in SIZES.items())
    group.add_argument("--size", default="tiny", help=sizes)
    group.add_argument("--dropout", type=_number(float, 0), default=0.0)
    group.add_argument("--llmc_filepath", type=Path, help="a GPT-2 file of llm.c")
    group.add_argument("--hf_weights", type=Path, help="a safetensors file, or its directory")


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    count = _number(int, 1)
    group.add_argument("--num_iteration", type=count, default=40, help="number of the last step")
    group.add_argument(
        "--stop_at", type=count, metavar="N", help="end early, after step N, as if preempted"
    )
    group.add_argument("--batch_size", type=count, default=8, help="sequences in a micro batch")
    group.add_argument("--sequence_length", type=count, default=64, help="tokens")
    group.add_argument(
        "--total_batch_size", type=count, default=1024, help="tokens of a step, over all ranks"
    )
    group.add_argument("--optimizer", choices=["sgd", "adamw"], default="adamw")
    group.add_argument("--learning_rate", type=_number(float, 0), default=2e-3)
    group.add_argument("--warmup", type=_number(int, 0), default=10, help="steps")
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation"
    )
    group.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    group.add_argument("--seed", type=_number(int, 0), default=0)
    group.add_argument("--input_bin", type=Path, help="a token file of llm.c, or any text")
    group.add_argument("--losses", type=Path, help="append JSON lines of step and loss")


def _add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallelism; ranks that are left are data-parallel")
    count = _number(int, 1)
    group.add_argument("--data_parallel", choices=["ddp", "fsdp"], default="ddp")
    group.add_argument("--tensor_parallel", type=count, default=1, help="ranks")
    group.add_argument("--sequence_parallel", action="store_true", help="with tensor parallelism")
    group.add_argument("--pipeline_parallel", type=count, default=1, help="ranks")
    group.add_argument(
        "--virtual_pipeline_parallel", type=count, default=1, help="stages of each pipeline rank"
    )


def _add_lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument("--lora_rank", type=_number(int, 0), default=0, help="0 trains all weights")
    group.add_argument("--lora_alpha", type=_number(float, 0), default=16.0)
    group.add_argument(
        "--lora_target_modules",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,…",
        help="ends of layer names",
    )
    group.add_argument("--lora_save_path", default="", help="at the end, the adapters alone")
    group.add_argument("--lora_load_path", default="", help="at the start, adapters alone")


def _add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints; a DIR may be s3://bucket/prefix")
    group.add_argument("--save", default="", metavar="DIR", help="without it nothing is written")
    group.add_argument(
        "--save_interval", type=_number(int, 0), default=0, help="steps; the last is saved too"
    )
    group.add_argument(
        "--max_checkpoint_keep", type=_number(int, 0), default=3, help="the newest; 0 keeps all"
    )
    group.add_argument("--save_optimizer_state", type=_boolean, default=True, metavar="BOOL")
    group.add_argument(
        "--load",
        default="",
        metavar="DIR",
        help="go on from there; the DIR of --save may still be empty",
    )
    group.add_argument("--load_step", type=_load_step, default="latest", metavar="latest|best|N")
    group.add_argument("--load_optimizer_state", type=_boolean, default=True, metavar="BOOL")
    modes = [mode.value for mode in SaveMode]
    group.add_argument("--save_mode", choices=modes, default=SaveMode.BACKGROUND.value)
    group.add_argument(
        "--deadline", type=_number(float, 1), default=120.0, help="seconds ranks may wait"
    )
    group.add_argument("--storage_option", type=_pair, action="append", default=[], metavar="K=V")
    group.add_argument(
        "--preempt_at",
        type=_number(int, 0),
        default=0,
        metavar="N",
        help="be killed in the save of step N, unless resumed",
    )


def _number(kind: type[int] | type[float], least: float):  # noqa: ANN202
    def parse(text: str) -> int | float:
        if (number := kind(text)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {text}")
        return number

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def _boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text == "true"


def _load_step(text: str) -> int | str:
    return text if text in ("latest", "best") else int(text)


def _pair(text: str) -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark:
        raise argparse.ArgumentTypeError(f"expected K=V, got {text!r}")
    return key, value


# What must hold between them.


def _check_model(args: argparse.Namespace) -> Iterator[str]:
    if args.size not in SIZES[args.model]:
        yield f"--size of {args.model} must be one of {list(SIZES[args.model])}, got {args.size}"
        return
    config = SIZES[args.model][args.size]
    if args.sequence_length > config.block_size:
        yield f"--sequence_length {args.sequence_length} is over the model's {config.block_size}"
    for name in ("n_head", "n_kv_head"):
        if getattr(config, name) % args.tensor_parallel:
            yield (
                f"--tensor_parallel {args.tensor_parallel} does not divide the model's {name} of "
                f"{getattr(config, name)}"
            )
    num_stages = args.pipeline_parallel * args.virtual_pipeline_parallel
    if num_stages > config.n_layer:
        yield f"{num_stages} pipeline stages are more than the model's {config.n_layer} layers"
    if args.dropout >= 1:
        yield f"--dropout must be below 1, got {args.dropout}"


def _check_initial_weights(args: argparse.Namespace) -> Iterator[str]:
    if args.llmc_filepath and args.hf_weights:
        yield "--llmc_filepath and --hf_weights both give initial weights; choose one"
    if args.llmc_filepath and args.model != "gpt2":
        yield f"--llmc_filepath is for gpt2; use --hf_weights for {args.model}"
    for flag in ("llmc_filepath", "hf_weights", "input_bin"):
        path = getattr(args, flag)
        if path and not path.exists():
            yield f"--{flag} {path} does not exist"


def _check_parallelism(args: argparse.Namespace) -> Iterator[str]:
    model_ranks = args.tensor_parallel * args.pipeline_parallel
    if args.world_size % model_ranks:
        yield (
            f"--tensor_parallel {args.tensor_parallel} x --pipeline_parallel "
            f"{args.pipeline_parallel} does not divide the {args.world_size} rank(s) of the job"
        )
    if args.sequence_parallel and args.tensor_parallel == 1:
        yield "--sequence_parallel needs --tensor_parallel 2 or more"
    if args.sequence_parallel and args.sequence_length % args.tensor_parallel:
        yield (
            f"--sequence_parallel cuts --sequence_length {args.sequence_length} into "
            f"{args.tensor_parallel} parts; choose a multiple"
        )
    if args.virtual_pipeline_parallel > 1 and args.pipeline_parallel == 1:
        yield "--virtual_pipeline_parallel needs --pipeline_parallel 2 or more"


def _check_batch(args: argparse.Namespace) -> Iterator[str]:
    if args.world_size % (args.tensor_parallel * args.pipeline_parallel):
        return  # said already
    unit = args.batch_size * args.sequence_length * num_data_ranks(args)
    if args.total_batch_size % unit:
        yield (
            f"--total_batch_size {args.total_batch_size} must be a multiple of {unit} tokens: "
            f"--batch_size {args.batch_size} x --sequence_length {args.sequence_length} x "
            f"{num_data_ranks(args)} data-parallel rank(s)"
        )
    elif num_micro_batches(args) % args.pipeline_parallel:
        yield (
            f"--total_batch_size gives each rank {num_micro_batches(args)} micro batch(es) a step; "
            f"--pipeline_parallel {args.pipeline_parallel} needs a multiple of itself"
        )


def _check_lora(args: argparse.Namespace) -> Iterator[str]:
    for flag in ("lora_save_path", "lora_load_path"):
        if getattr(args, flag) and not args.lora_rank:
            yield f"--{flag} needs --lora_rank"


def _check_checkpoints(args: argparse.Namespace) -> Iterator[str]:
    if args.save and not args.save_interval:
        yield "--save needs --save_interval"
    if args.save_interval and not args.save:
        yield "--save_interval needs --save"
    if args.load_step != "latest" and not args.load:
        yield "--load_step needs --load"
    if not args.load_optimizer_state and not args.load:
        yield "--load_optimizer_state needs --load"
    if args.preempt_at and not args.save:
        yield "--preempt_at needs --save"


CHECKS = (
    _check_model,
    _check_initial_weights,
    _check_parallelism,
    _check_batch,
    _check_lora,
    _check_checkpoints,
)
