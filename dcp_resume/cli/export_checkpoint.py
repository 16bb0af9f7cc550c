"""``dcp-resume export``: write a checkpoint in another library's format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import PATIENT, add_step, add_target_option, add_verb, openers
from dcp_resume.cli.import_checkpoint import FORMATS
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose, size_text
from dcp_resume.cli.progress import ProgressLine

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
Write a checkpoint to TARGET in another library's format, read it back, and only then give it its
name. TARGET must not exist. What the format cannot hold (values in safetensors, what belongs to
single ranks, some dtypes) is refused with a list, or left out with --drop.

Names of a single --part lose its name in front, so that `--part model` gives the names of the
module; with --loose those of one part do beside others. Memory: twice --window-mib, and up to 4
readers.
"""
_EXAMPLES = """\
  dcp-resume export runs/a model.safetensors --format safetensors --part model
  dcp-resume export runs/a hf --format safetensors --part model --shard-mb 5000
  dcp-resume export s3://bucket/runs/a all.pth --format torch --step best --drop
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "export",
        summary="write a checkpoint in another library's format",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", metavar="URL", help="run, or a checkpoint's directory")
    verb.add_argument("target", metavar="TARGET", help="file or directory to make")
    verb.add_argument("--format", choices=FORMATS, required=True, help="of TARGET")
    add_step(verb, "latest", "best")
    verb.add_argument(
        "--part", action="append", default=[], metavar="NAME", help="only this; may be repeated"
    )
    verb.add_argument("--loose", metavar="NAME", help="names of this part lose its name in front")
    verb.add_argument("--drop", action="store_true", help="leave out what the format cannot hold")
    verb.add_argument(
        "--shard-mb",
        type=int,
        default=5000,
        metavar="MB",
        help="most of a file of safetensors or DCP (default: 5000)",
    )
    verb.add_argument(
        "--window-mib", type=int, default=64, metavar="MIB", help="memory in transit (default: 64)"
    )
    add_target_option(verb, "TARGET")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.interop import ExportOptions, Format, Leftovers, export_checkpoint
    from dcp_resume.session.finding import find_checkpoints

    open_source, open_target = openers(arguments.url, arguments.target, arguments, retry=PATIENT)
    trust = read_signing(arguments).trust
    progress = ProgressLine("exporting")
    options = ExportOptions(
        parts=tuple(arguments.part),
        loose=arguments.loose,
        leftovers=Leftovers.DROP if arguments.drop else Leftovers.REFUSE,
        shard_bytes=arguments.shard_mb * 1000**2,
        window_bytes=arguments.window_mib << 20,
        progress=progress,
        trust=trust,
        open_url=open_target,
    )
    source = open_source(arguments.url)
    (located,) = find_checkpoints(source, arguments.step, trust)
    form = Format(arguments.format)
    try:
        result = export_checkpoint(source, located, arguments.target, form, options)
    finally:
        progress.close()
    if arguments.json:
        dropped = [{"where": p.where, "kind": p.kind, "message": p.message} for p in result.dropped]
        document = {
            "target": arguments.target,
            "format": result.format.value,
            "step": result.step,
            "files": list(result.files),
            "num_tensors": result.num_tensors,
            "num_values": result.num_values,
            "num_bytes": result.num_bytes,
            "ties": list(result.ties),
            "dropped": dropped,
            "duration_s": result.duration_s,
        }
        print_json(document)
        return 0
    print(
        f"step {result.step} is at {arguments.target}, read back bit for bit\n"
        f"{len(result.files)} file(s), {result.num_tensors} tensor(s), {result.num_values} "
        f"value(s), {size_text(result.num_bytes)}, {result.duration_s:.1f} s"
    )
    for problem in result.dropped:
        print_prose(f"left out: {problem}")
    return 0
