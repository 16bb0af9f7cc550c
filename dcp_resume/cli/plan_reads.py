"""``dcp-resume plan``: what each rank of a mesh would read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_step, add_verb, open_url
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.layout_file import read_layout
from dcp_resume.cli.printing import print_json, print_prose, print_table, size_text

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.read_plan import RankReads, ReadPlan

__all__ = ["add_parser"]

_DESCRIPTION = """\
Say what each rank of a mesh would read, if a job on it loaded the checkpoint: bytes needed, bytes
fetched, requests, files. Fetched are whole digest blocks, and small gaps that are cheaper read than
left out; amplification is bytes fetched for each byte needed. Only documents are read, no rank is
started. Where it is far above 1, `dcp-resume reshard` to the mesh first.

The mesh and --layout are those of `dcp-resume reshard`, whose --help explains them.
"""
_EXAMPLES = """\
  dcp-resume plan runs/a --to tp=2,dp_shard=4
  dcp-resume plan s3://bucket/runs/a --to pp=2,tp=8,dp_shard=64 --step 400 --json
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "plan",
        summary="say what each rank of a mesh would read",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run, or a checkpoint's directory")
    verb.add_argument("--to", required=True, metavar="AXIS=SIZE,…", help="mesh of the job")
    add_step(verb, "latest", "best")
    verb.add_argument("--layout", metavar="FILE", help="JSON with rules, as of reshard")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.planning.layout_rules import TargetMesh
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.opening import open_checkpoint
    from dcp_resume.session.read_plan import plan_rank_reads

    mesh, rules = TargetMesh.parse(arguments.to), read_layout(arguments.layout)
    store = open_url(arguments.url, arguments)
    trust = read_signing(arguments).trust
    (located,) = find_checkpoints(store, arguments.step, trust)
    opened = open_checkpoint(store, located.prefix, located.manifest, trust=trust, is_listed=False)
    plan = plan_rank_reads(opened, mesh, rules, store.read_bytes)
    if arguments.json:
        print_json({"step": opened.manifest.step, "mesh": str(mesh), **_document(plan)})
    else:
        _print(plan, opened.manifest.step, str(mesh))
    return 0


def _document(plan: ReadPlan) -> dict[str, object]:
    return {
        "fetched_bytes": plan.fetched_bytes,
        "unique_bytes": plan.unique_bytes,
        "document_bytes": plan.document_bytes,
        "amplification": plan.amplification,
        "kept_replicated": [{"fqn": k.fqn, "axes": list(k.axes)} for k in plan.kept],
        "dropped": list(plan.dropped),
        "ranks": [{**asdict(rank), "amplification": rank.amplification} for rank in plan.ranks],
    }


def _print(plan: ReadPlan, step: int, mesh: str) -> None:
    columns = ("ranks", "needed", "fetched", "amplification", "requests", "files")
    print_table(columns, list(_rows(plan)), words={"ranks"})
    what = f"{len(plan.ranks)} rank(s) of {mesh}"
    print()
    print_prose(
        f"step {step} on {what}: {size_text(plan.unique_bytes)} needed by any, "
        f"{size_text(plan.fetched_bytes)} fetched by all, {plan.amplification:.2f} times as much"
    )
    print_prose(f"each rank also reads {size_text(plan.document_bytes)} of catalog and index")
    if plan.kept:
        axes = sorted({axis for kept in plan.kept for axis in kept.axes})
        print_prose(
            f"read whole along {', '.join(axes)}, because no rule says how it splits them: "
            f"{len(plan.kept)} tensor(s), such as {plan.kept[0].fqn}; --layout gives rules"
        )
    if plan.dropped:
        print_prose(f"not read, because other ranks wrote these values: {', '.join(plan.dropped)}")


def _rows(plan: ReadPlan) -> Iterator[list[str]]:
    """One row for neighbours that read alike."""
    for _, group in groupby(plan.ranks, key=lambda rank: replace(rank, rank=0)):
        alike: list[RankReads] = list(group)
        first, last = alike[0], alike[-1]
        yield [
            str(first.rank) if len(alike) == 1 else f"{first.rank}-{last.rank}, each",
            size_text(first.needed_bytes),
            size_text(first.fetched_bytes),
            f"{first.amplification:.2f}",
            str(first.num_requests),
            str(first.num_files),
        ]
