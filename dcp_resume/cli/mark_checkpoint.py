"""``dcp-resume pin``, ``unpin`` and ``tag``: say something of one checkpoint in the run's log."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_step, add_verb, open_run
from dcp_resume.cli.printing import print_json

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.manifest.history import CommitEntry
    from dcp_resume.session.run_log import Appended, RunLog

__all__ = ["add_parser"]

_PIN = """\
Keep a checkpoint whatever a retention policy says, until it is unpinned. The pin is a record of the
run's log: it holds on every storage, and for every job that works on the run.
"""
_UNPIN = """\
Lift a pin: retention policies decide on the checkpoint again.
"""
_TAG = """\
Give a checkpoint a name that --step accepts. A name that is in use moves. A tag does not keep the
checkpoint: pin it, or prune with --keep-tagged. --delete takes the name away.
"""


def add_parser(verbs: Verbs) -> None:
    """Add the three verbs."""
    pin = add_verb(
        verbs,
        "pin",
        summary="keep one checkpoint, whatever a policy says",
        description=_PIN,
        examples="  dcp-resume pin runs/a --step 400 --label 'paper, table 2'\n",
    )
    pin.add_argument("url", help="root of the run")
    add_step(pin, "latest", "best")
    pin.add_argument("--label", default="", metavar="TEXT", help="why, for people")
    pin.set_defaults(run=_pin)
    unpin = add_verb(
        verbs,
        "unpin",
        summary="lift a pin",
        description=_UNPIN,
        examples="  dcp-resume unpin runs/a --step 400\n",
    )
    unpin.add_argument("url", help="root of the run")
    add_step(unpin, "latest", "best")
    unpin.set_defaults(run=_unpin)
    tag = add_verb(
        verbs,
        "tag",
        summary="name one checkpoint",
        description=_TAG,
        examples="  dcp-resume tag runs/a before-lr-drop --step 400\n"
        "  dcp-resume tag runs/a before-lr-drop --delete\n",
    )
    tag.add_argument("url", help="root of the run")
    tag.add_argument("name", help="a letter and up to 63 more of [a-z0-9._-]")
    add_step(tag, "latest", "best")
    tag.add_argument("--delete", action="store_true", help="take the name away")
    tag.set_defaults(run=_tag)


def _pin(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.marks import pin

    log, entry = _find(arguments)
    return _report(arguments, log, pin(log, entry.seq, label=arguments.label), entry)


def _unpin(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.marks import unpin

    log, entry = _find(arguments, among_pinned=True)
    return _report(arguments, log, unpin(log, entry.seq), entry)


def _tag(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.marks import tag, untag

    if arguments.delete:
        _, log = open_run(arguments)
        return _report(arguments, log, untag(log, arguments.name), None)
    log, entry = _find(arguments)
    return _report(arguments, log, tag(log, entry.seq, arguments.name), entry)


def _find(
    arguments: argparse.Namespace, *, among_pinned: bool = False
) -> tuple[RunLog, CommitEntry]:
    """The checkpoint that ``--step`` names; of several of one step a pinned one, if so asked."""
    from dcp_resume.session.selecting import select_commits

    store, log = open_run(arguments)
    (entry,) = select_commits(log.history, arguments.step, store.url)
    if among_pinned and entry.seq not in log.history.pinned:
        everyone = select_commits(log.history, "all", store.url)
        pinned = (one for one in everyone if one.seq in log.history.pinned)
        entry = next((one for one in pinned if one.record.step == arguments.step), entry)
    return log, entry


def _report(
    arguments: argparse.Namespace, log: RunLog, appended: Appended, entry: CommitEntry | None
) -> int:
    kind = appended.record.kind
    if arguments.json:
        print_json(
            {
                "url": log.url,
                "run": log.run,
                "kind": kind,
                "record": appended.seq,
                "seq": entry.seq if entry else None,
                "step": entry.record.step if entry else None,
                "name": getattr(appended.record, "name", None),
            }
        )
        return 0
    what = f"step {entry.record.step} (log record {entry.seq})" if entry else arguments.name
    print(f"{kind}: {what}; log record {appended.seq}")
    return 0
