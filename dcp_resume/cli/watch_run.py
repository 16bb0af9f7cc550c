"""``dcp-resume watch``: a run's log as it grows. Loads no torch."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import PATIENT, add_verb, open_run
from dcp_resume.cli.keep_options import read_duration
from dcp_resume.cli.printing import duration_text, print_prose, size_text, without_infinities
from dcp_resume.cli.progress import StatusLine
from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.records import (
    CommitRecord,
    DropRecord,
    LogRecord,
    OpenRecord,
    TagRecord,
    UntagRecord,
)

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
Follow a run: each record of its log is one line as it comes (saves, resumes, pins, retentions,
quarantines), after the last few that are there already. On a terminal the last line says which
checkpoint is the newest, how old it is, and how often the job saves: the median of the last ten
intervals. Ages are told by this machine's clock.

The log is asked every --interval. Nothing is written. Ends by Ctrl-C.
"""
_EXAMPLES = """\
  dcp-resume watch runs/a
  dcp-resume watch s3://bucket/runs/a --interval 30s --json | jq .step
"""
_NUM_SHOWN = 10
"""Records that were there before, and are shown."""
_NUM_INTERVALS = 10
_PAST = {
    "retire": "retired",
    "pin": "pinned",
    "unpin": "unpinned",
    "quarantine": "quarantined",
    "unquarantine": "restored",
    "tag": "tagged",
    "untag": "untagged",
}
_TICK_S = 1.0
"""How often the age on a terminal moves."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "watch",
        summary="follow a running job",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run")
    verb.add_argument(
        "--interval",
        type=read_duration,
        default=read_duration("5s"),
        metavar="TIME",
        help="between two looks at the log, such as 30s (default: 5s)",
    )
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    heard: list[tuple[int, LogRecord]] = []
    _, log = open_run(arguments, retry=PATIENT, heard=lambda *item: heard.append(item))
    del heard[:-_NUM_SHOWN]
    status = StatusLine()
    try:
        while True:
            for seq, record in heard:
                status.close()
                _print(seq, record, log.history, is_json=arguments.json)
            heard.clear()
            _wait(arguments.interval, status, log.history)
            log.refresh()
    finally:
        status.close()


def _wait(interval_s: float, status: StatusLine, history: RunHistory) -> None:
    end = time.monotonic() + interval_s
    while (left_s := end - time.monotonic()) > 0:
        status.show(_status(history))
        time.sleep(min(left_s, _TICK_S) if status.is_shown else left_s)


def _status(history: RunHistory) -> str:
    newest = history.newest()
    if newest is None:
        return f"generation {history.generation}, no checkpoint yet"
    age_s = (datetime.now(UTC) - _time(newest.record)).total_seconds()
    times = [
        _time(entry.record)
        for entry in islice(history.lineage(), _NUM_INTERVALS + 1)
        if entry.record.generation == newest.record.generation
    ]
    between_s = [(later - earlier).total_seconds() for later, earlier in pairwise(times)]
    rate = f", saves every {duration_text(statistics.median(between_s))}" if between_s else ""
    return (
        f"generation {history.generation}, newest step {newest.record.step}, "
        f"{duration_text(max(0.0, age_s))} old{rate}"
    )


def _time(record: CommitRecord) -> datetime:
    try:
        return datetime.fromisoformat(record.created).astimezone(UTC)
    except ValueError as error:
        problem = Problem(f"step {record.step}", "created", f"found {record.created!r:.40}")
        raise InvalidDocument(
            f"a commit record has no time (RFC 3339): {problem}. Restore the log from a copy",
            problems=(problem,),
        ) from error


def _print(seq: int, record: LogRecord, history: RunHistory, *, is_json: bool) -> None:
    if is_json:
        document = record.model_dump(mode="json", exclude={"format"})
        line = json.dumps(
            {"seq": seq, "step": _step(record, history), **without_infinities(document)}
        )
    else:
        why = history.ignored.get(seq)
        line = f"{record.created}  {_text(record, history)}"
        line += f" (does not count: {why})" if why else ""
    print_prose(line)


def _step(record: LogRecord, history: RunHistory) -> int | None:
    """Step of the checkpoint that a record is of."""
    if isinstance(record, CommitRecord):
        return record.step
    name = "resume_source" if isinstance(record, OpenRecord) else "target"
    commit = history.commits.get(getattr(record, name, None) or 0)
    return commit.step if commit else None


def _text(record: LogRecord, history: RunHistory) -> str:
    step = _step(record, history)
    if isinstance(record, OpenRecord):
        begins = "begins anew" if step is None else f"resumes from step {step}"
        return f"opened      generation {record.generation} {begins}"
    if isinstance(record, CommitRecord):
        loss = record.trainer.metrics.get("loss")
        tail = "" if loss is None else f", loss {loss:.4g}"
        return f"{'saved':<11} step {step}, {size_text(record.num_bytes)}{tail}"
    if isinstance(record, DropRecord):
        return f"{'dropped':<11} {len(record.attempts)} attempt(s) that never committed"
    what = f"step {step}" if step is not None else "no checkpoint"
    if isinstance(record, UntagRecord):
        what = record.name
    elif isinstance(record, TagRecord):
        what += f" as {record.name}"
    detail = getattr(record, "reason", "") or getattr(record, "label", "")
    return f"{_PAST[record.kind]:<11} {what}" + (f": {detail}" if detail else "")
