"""``dcp-resume gc``: remove what belongs to no checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import PATIENT, add_verb, add_yes, open_run
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.keep_options import read_duration
from dcp_resume.cli.printing import print_json, print_prose, print_table, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.litter import Litter
    from dcp_resume.session.run_log import RunLog
    from dcp_resume.storage import ObjectInfo

__all__ = ["add_parser"]

_DESCRIPTION = """\
Remove litter: files of attempts that never committed, unfinished uploads and temporary files, and
what a deletion that failed or was cut off left of retired checkpoints. No checkpoint is touched.
Without --yes nothing is changed: the table says what would go. Age is told by the storage's clock,
which is read by writing a small object below probe/, also without --yes.

A job may go on training meanwhile: an attempt is given up in the log before its files go, so that a
save of such an attempt is refused, never half there. A grace time longer than any save keeps that
from happening.
"""
_EXAMPLES = """\
  dcp-resume gc runs/a
  dcp-resume gc s3://bucket/runs/a --older-than 2d --yes
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "gc",
        summary="remove what belongs to no checkpoint",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run")
    verb.add_argument(
        "--older-than",
        type=read_duration,
        default=read_duration("24h"),
        metavar="AGE",
        help="grace time: leave alone what is younger, such as 36h or 2d (default: 24h)",
    )
    add_yes(verb)
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.litter import find_litter, grace_limit, remove_litter
    from dcp_resume.session.sweep import Swept

    store, log = open_run(arguments, retry=PATIENT)
    litter = find_litter(store, log, until_s=grace_limit(store, arguments.older_than))
    swept = remove_litter(store, log, litter) if arguments.yes else Swept()
    kinds = list(_kinds(litter, log))
    if arguments.json:
        items = [
            {"kind": kind, "name": name, "num_objects": len(infos), "num_bytes": _sum(infos)}
            for kind, name, infos in kinds
        ]
        print_json(
            {
                "url": store.url,
                "run": log.run,
                "is_dry_run": not arguments.yes,
                "litter": items,
                "freed_bytes": swept.num_bytes,
            }
        )
        return ExitCode.OK
    rows = [[kind, name, str(len(infos)), size_text(_sum(infos))] for kind, name, infos in kinds]
    if rows:
        print_table(("litter", "where", "objects", "size"), rows, words={"litter", "where"})
        print()
    if arguments.yes:
        print(f"{litter.num_objects} object(s) removed, {size_text(swept.num_bytes)}")
    else:
        hint = " Nothing was changed; add --yes to do it." if rows else ""
        print_prose(f"{litter.num_objects} object(s) would be removed.{hint}")
    return ExitCode.OK


def _kinds(litter: Litter, log: RunLog) -> Iterator[tuple[str, str, Sequence[ObjectInfo]]]:
    for seq, infos in sorted(litter.retired.items()):
        yield "retired", f"step {log.history.commits[seq].step}", infos
    for attempt, infos in litter.attempts.items():
        yield "attempt", infos[0].key.partition(attempt)[0] + attempt, infos
    if litter.unfinished:
        yield "unfinished", "uploads and temporary files", litter.unfinished
    if litter.probes:
        yield "probe", "probe/", litter.probes


def _sum(infos: Sequence[ObjectInfo]) -> int:
    return sum(info.size for info in infos)
