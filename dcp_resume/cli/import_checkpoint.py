"""``dcp-resume import``: make a checkpoint of one that another library wrote."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import (
    PATIENT,
    add_target_option,
    add_verb,
    append_deadline_s,
    openers,
)
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose, size_text
from dcp_resume.cli.progress import ProgressLine

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["FORMATS", "add_parser"]

FORMATS = ("safetensors", "torch", "dcp", "torch_dist", "llmc", "infinitrain")

_DESCRIPTION = """\
Commit what a checkpoint of another library holds to the run at RUN, which may be new. The run is
opened for it: A JOB THAT IS STILL WRITING THERE IS FENCED.

SOURCE is a file (safetensors, torch.save, llm.c) or a directory (Hugging Face's of safetensors or
pytorch_model*.bin, DCP, Megatron torch_dist, InfiniTrain). Nothing of it is executed. Tensors
stream by in windows.
"""
_EXAMPLES = """\
  dcp-resume import model.pth runs/a
  dcp-resume import s3://bucket/weights runs/a --format safetensors --part model
  dcp-resume import checkpoints/400 runs/a --format dcp --step 400
  dcp-resume import outputs/checkpoint/step-500 runs/a --loose model --step 500
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "import",
        summary="make a checkpoint of another library's",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("source", metavar="SOURCE", help="file or directory of another library")
    verb.add_argument("target", metavar="RUN", help="run to commit into; made if absent")
    verb.add_argument("--format", choices=FORMATS, help="of SOURCE (default: told by its bytes)")
    verb.add_argument("--step", type=int, metavar="N", help="default: what SOURCE says, else 0")
    into = verb.add_mutually_exclusive_group()
    into.add_argument("--part", metavar="NAME", help="put everything into this part of the state")
    into.add_argument(
        "--loose", metavar="NAME", help="put what is not nested into this part, and keep the others"
    )
    verb.add_argument("--drop", action="store_true", help="leave out what cannot be taken over")
    verb.add_argument(
        "--window-mib", type=int, default=64, metavar="MIB", help="memory in transit (default: 64)"
    )
    add_target_option(verb, "RUN")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.interop import (
        Format,
        ImportOptions,
        Leftovers,
        import_checkpoint,
        locate_source,
    )

    open_source, open_target = openers(arguments.source, arguments.target, arguments, retry=PATIENT)
    progress = ProgressLine("importing")
    options = ImportOptions(
        format=Format(arguments.format) if arguments.format else None,
        step=arguments.step,
        part=arguments.part,
        loose=arguments.loose,
        leftovers=Leftovers.DROP if arguments.drop else Leftovers.REFUSE,
        window_bytes=arguments.window_mib << 20,
        progress=progress,
        signing=read_signing(arguments),
        append_deadline_s=append_deadline_s(arguments),
    )
    target = open_target(arguments.target)
    try:
        result = import_checkpoint(locate_source(arguments.source, open_source), target, options)
    finally:
        progress.close()
    left = [{"where": p.where, "kind": p.kind, "message": p.message} for p in result.left]
    if arguments.json:
        document = {
            "url": target.url,
            "format": result.format.value,
            "step": result.step,
            "seq": result.seq,
            "generation": result.generation,
            "prefix": result.prefix,
            "num_tensors": result.num_tensors,
            "num_values": result.num_values,
            "num_bytes": result.num_bytes,
            "ties": list(result.ties),
            "left": left,
            "duration_s": result.duration_s,
        }
        print_json(document)
        return 0
    print(
        f"step {result.step} is committed, from {result.format.value}, at {target.url}/"
        f"{result.prefix}\n{result.num_tensors} tensor(s), {result.num_values} value(s), "
        f"{size_text(result.num_bytes)}, {result.duration_s:.1f} s"
    )
    for problem in result.left:
        print_prose(f"left out: {problem}")
    return 0
