"""``dcp-resume reshard``: write a checkpoint anew for another mesh."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import (
    PATIENT,
    add_step,
    add_target_option,
    add_verb,
    append_deadline_s,
    open_pair,
)
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.layout_file import read_layout
from dcp_resume.cli.printing import print_json, print_prose, size_text
from dcp_resume.cli.progress import ProgressLine

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.reshard import ReshardResult

__all__ = ["add_parser"]

_DESCRIPTION = """\
Write a checkpoint anew, laid out for another mesh, so that each target rank reads its own bytes of
a part as one run of one file. Every load reshards by itself; this verb moves that work offline, and
is what to use before many ranks start from a far store.

The result is a committed checkpoint of the run at DST, which may be new, or the run of SRC. The run
is opened for it: A JOB THAT IS STILL WRITING THERE IS FENCED and its next save fails. Blocks are
verified as they are read. Memory: --window-mib, and up to 4 readers of 16 MiB; for S3 also parts.

Axes: dp, dp_shard, dp_replicate, tp, ep, cp or any other name; pp splits layers and is outermost.
Which dim an axis splits is taken from the checkpoint (DTensors say it), else from --layout:

  {"rules": [{"match": "model.*.wq.weight", "tp": 0}, {"match": "model.head.*", "stage": 1}],
   "axes": {"dp_shard": "dp"}, "replicate": ["dp"], "stages": [[0, 1], [2, 3]]}

`axes` renames axes of the checkpoint, `replicate` names axes that hold copies on purpose. Optimizer
state follows its parameter. Tensors of which nothing is known stay replicated and are listed.
Per-rank values (RNG, data loader) are kept only if the number of ranks stays the same.
"""
_EXAMPLES = """\
  dcp-resume reshard runs/a runs/a-tp2 --to tp=2,dp_shard=4
  dcp-resume reshard runs/a s3://bucket/runs/a --to dp_shard=8,tp=2,pp=2 --step 400 --strict
  dcp-resume reshard runs/fsdp runs/dp --to dp=16 --layout layout.json
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "reshard",
        summary="write a checkpoint anew for another mesh",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("source", metavar="SRC", help="run, or a checkpoint's directory")
    verb.add_argument("target", metavar="DST", help="run to commit into; made if absent")
    verb.add_argument("--to", required=True, metavar="AXIS=SIZE,…", help="target mesh")
    add_step(verb, "latest", "best")
    verb.add_argument("--layout", metavar="FILE", help="JSON with rules; see above")
    verb.add_argument(
        "--strict", action="store_true", help="refuse what cannot be laid out as asked"
    )
    verb.add_argument(
        "--window-mib", type=int, default=64, metavar="MIB", help="memory in transit (default: 64)"
    )
    add_target_option(verb, "DST")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.planning.layout_rules import TargetMesh
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.reshard import ReshardOptions, reshard

    mesh, rules = TargetMesh.parse(arguments.to), read_layout(arguments.layout)
    source, target = open_pair(arguments.source, arguments.target, arguments, retry=PATIENT)
    signing = read_signing(arguments)
    progress = ProgressLine("resharding")
    options = ReshardOptions(
        rules=rules,
        is_strict=arguments.strict,
        window_bytes=arguments.window_mib << 20,
        progress=progress,
        trust=signing.trust,
        signing=signing,
        append_deadline_s=append_deadline_s(arguments),
    )
    (located,) = find_checkpoints(source, arguments.step, signing.trust)
    try:
        result = reshard(source, located, target, mesh, options)
    finally:
        progress.close()
    if arguments.json:
        print_json({"url": target.url, "mesh": str(mesh), **_document(result)})
    else:
        _print(result, target.url, str(mesh))
    return 0


def _document(result: ReshardResult) -> dict[str, object]:
    return {
        "step": result.step,
        "seq": result.seq,
        "generation": result.generation,
        "prefix": result.prefix,
        "world_size": result.world_size,
        "num_files": result.num_files,
        "num_bytes": result.num_bytes,
        "read_bytes": result.read_bytes,
        "duration_s": result.duration_s,
        "kept_replicated": [{"fqn": k.fqn, "axes": list(k.axes)} for k in result.kept],
        "dropped": list(result.dropped),
    }


def _print(result: ReshardResult, url: str, mesh: str) -> None:
    rate = size_text(result.num_bytes / max(result.duration_s, 1e-9))
    print(
        f"step {result.step} is committed for {mesh} at {url}/{result.prefix}\n"
        f"{result.num_files} file(s), {size_text(result.num_bytes)} written, "
        f"{size_text(result.read_bytes)} read, {result.duration_s:.1f} s, {rate}/s"
    )
    if result.kept:
        print_prose(
            f"kept replicated, because no rule says how the axis splits them: {len(result.kept)}"
        )
        for kept in result.kept:
            print(f"  - {kept.fqn}: {', '.join(kept.axes)}")
    if result.dropped:
        print_prose("dropped, because these values belong to the ranks that wrote them:")
        for fqn in result.dropped:
            print(f"  - {fqn}")
