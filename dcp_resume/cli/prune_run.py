"""``dcp-resume prune``: retire and delete what a retention policy does not keep."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import PATIENT, add_verb, add_yes, open_run
from dcp_resume.cli.exit_codes import ExitCode, exit_code_of
from dcp_resume.cli.keep_options import add_keep_options, read_policy
from dcp_resume.cli.printing import print_json, print_prose, print_table, size_text

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.manager.policies import Decision
    from dcp_resume.manager.retention import Pruned
    from dcp_resume.manifest.history import RunHistory

__all__ = ["add_parser"]

_DESCRIPTION = """\
Delete the checkpoints that the options --keep-… do not keep. Without --yes nothing is changed: the
table says what would be kept, and why. Kept whatever the options say are the newest checkpoint that
is whole, the one that the live job resumed from, pinned ones, and damaged ones, which do not count.
A job may go on training meanwhile. What another job does between the choice and the deletion is
respected: each checkpoint is chosen anew at the record that retires it.
"""
_EXAMPLES = """\
  dcp-resume prune runs/a --keep-last 3
  dcp-resume prune runs/a --keep-last 3 --keep-best loss:min:2 --keep-every 1000 --yes
  dcp-resume prune s3://bucket/runs/a --keep-younger 7d --keep-one-per 1d --yes --json
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "prune",
        summary="delete checkpoints that no policy keeps",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run")
    add_keep_options(verb)
    add_yes(verb)
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.manager.policies import decide
    from dcp_resume.manager.retention import prune
    from dcp_resume.session.litter import find_litter, remove_litter

    policy = read_policy(arguments)
    store, log = open_run(arguments, retry=PATIENT)
    run = log.history
    decisions = decide(run, policy)
    pruned: dict[int, Pruned] = {}
    if arguments.yes:
        pruned = {one.entry.seq: one for one in prune(store, log, policy)}
    failures = [one.failure for one in pruned.values() if one.failure is not None]
    if arguments.yes and not failures:
        # What earlier deletions left; attempts that never committed are the business of gc.
        remove_litter(store, log, find_litter(store, log, until_s=-math.inf))
    if arguments.json:
        checkpoints = [_document(one, pruned.get(one.entry.seq)) for one in decisions]
        print_json(
            {
                "url": store.url,
                "run": run.run,
                "policy": str(policy),
                "is_dry_run": not arguments.yes,
                "checkpoints": checkpoints,
            }
        )
    else:
        _print(run, decisions, list(pruned.values()), is_dry_run=not arguments.yes)
    return exit_code_of(failures[0]) if failures else ExitCode.OK


def _document(decision: Decision, pruned: Pruned | None) -> dict[str, object]:
    seq, record = decision.entry
    return {
        "seq": seq,
        "step": record.step,
        "generation": record.generation,
        "created": record.created,
        "num_bytes": record.num_bytes,
        "is_kept": decision.is_kept,
        "reason": decision.reason,
        "is_retired": pruned is not None and pruned.is_retired,
        "freed_bytes": pruned.swept.num_bytes if pruned else 0,
        "failure": str(pruned.failure) if pruned and pruned.failure else None,
    }


def _print(
    history: RunHistory, decisions: list[Decision], pruned: list[Pruned], *, is_dry_run: bool
) -> None:
    newest = history.newest()
    rows = [
        [
            "*" if newest and newest.seq == one.entry.seq else "",
            str(one.entry.record.step),
            str(one.entry.record.generation),
            one.entry.record.created,
            size_text(one.entry.record.num_bytes),
            "keep" if one.is_kept else "retire",
            one.reason,
        ]
        for one in decisions
    ]
    columns = ("", "step", "gen", "time", "size", "action", "because")
    print_table(columns, rows, words={"action", "because"})
    print()
    surplus = [one.entry.record.num_bytes for one in decisions if not one.is_kept]
    if is_dry_run:
        print_prose(
            f"{len(surplus)} of {len(decisions)} checkpoint(s), {size_text(sum(surplus))}, would "
            "be retired and deleted. Nothing was changed; add --yes to do it."
        )
        return
    freed = sum(one.swept.num_bytes for one in pruned)
    num_retired = sum(one.is_retired for one in pruned)
    print(f"{num_retired} checkpoint(s) retired, {size_text(freed)} deleted")
    if len(pruned) < len(surplus):
        print_prose(
            f"{len(surplus) - len(pruned)} left: another job needs or has retired them by now"
        )
    for one in pruned:
        if one.failure is not None:
            what = "not deleted whole" if one.is_retired else "not retired"
            print_prose(f"  - step {one.entry.record.step}: {what}: {one.failure}")
