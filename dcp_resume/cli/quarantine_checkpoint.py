"""``dcp-resume quarantine`` and ``unquarantine``: an operator's word on damage. Loads no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_verb, open_run
from dcp_resume.cli.printing import print_json, print_prose
from dcp_resume.errors import CheckpointNotFound
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.session.marks import quarantine, unquarantine

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.run_log import RunLog

__all__ = ["add_parser"]

_QUARANTINE = """\
Say that a checkpoint is damaged: no job resumes from it, and its files are kept. Jobs do so by
themselves where bytes are proven wrong. This verb is for what only a person can tell: a disk that
reads one file with errors, a loss that went up.
"""
_UNQUARANTINE = """\
Lift a quarantine: the checkpoint counts again. Prove it first, by `dcp-resume verify --step N`.

If a job has gone on from an older checkpoint meanwhile, this one is "rolled back", as `ls --all`
says: it can be loaded, and resumed from, by its step.
"""


def add_parser(verbs: Verbs) -> None:
    """Add both verbs."""
    verb = add_verb(
        verbs,
        "quarantine",
        summary="say that a checkpoint is damaged",
        description=_QUARANTINE,
        examples="  dcp-resume quarantine runs/a 4000 --reason 'disk 3 reads it with errors'\n",
    )
    _add_place(verb)
    verb.add_argument("--reason", default="", metavar="TEXT", help="for whoever reads the log")
    verb.set_defaults(run=_quarantine)
    verb = add_verb(
        verbs,
        "unquarantine",
        summary="lift a quarantine",
        description=_UNQUARANTINE,
        examples="  dcp-resume unquarantine runs/a 4000\n",
    )
    _add_place(verb)
    verb.set_defaults(run=_unquarantine)


def _add_place(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("url", help="root of the run: a path or a URL")
    place = verb.add_mutually_exclusive_group(required=True)
    place.add_argument("lone_step", nargs="?", type=int, metavar="step", help="of the checkpoint")
    place.add_argument("--step", type=int, metavar="N", help="the same, as other verbs take it")


def _step(arguments: argparse.Namespace) -> int:
    step: int = arguments.step if arguments.lone_step is None else arguments.lone_step
    return step


def _quarantine(arguments: argparse.Namespace) -> int:
    _, log = open_run(arguments)
    entry = log.history.find_step(_step(arguments), is_any_line=True)
    if entry is None:
        raise _no_step(log, _step(arguments), "usable")
    history = quarantine(log, entry.seq, reason=arguments.reason).history
    return _tell(arguments, history, entry, "quarantined")


def _unquarantine(arguments: argparse.Namespace) -> int:
    _, log = open_run(arguments)
    history = log.history
    held = [
        CommitEntry(seq, history.commits[seq])
        for seq in sorted(history.quarantined, reverse=True)
        if history.commits[seq].step == _step(arguments) and seq not in history.retired
    ]
    if not held:
        raise _no_step(log, _step(arguments), "quarantined")
    history = unquarantine(log, held[0].seq).history
    is_on_line = any(entry.seq == held[0].seq for entry in history.lineage())
    return _tell(arguments, history, held[0], "current" if is_on_line else "rolled back")


def _tell(
    arguments: argparse.Namespace, history: RunHistory, entry: CommitEntry, state: str
) -> int:
    newest = history.newest()
    newest_step = newest.record.step if newest else None
    if arguments.json:
        print_json(
            {
                "step": entry.record.step,
                "seq": entry.seq,
                "state": state,
                "newest_step": newest_step,
            }
        )
    else:
        follows = "no checkpoint" if newest_step is None else f"step {newest_step}"
        print_prose(f"step {entry.record.step} is {state}; the run would resume from {follows}")
    return 0


def _no_step(log: RunLog, step: int, what: str) -> CheckpointNotFound:
    return CheckpointNotFound(
        f"{log.url} has no {what} checkpoint of step {step}. `dcp-resume ls --all` shows which "
        f"there are",
        url=log.url,
        request=str(step),
    )
