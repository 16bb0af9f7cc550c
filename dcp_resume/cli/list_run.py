"""``dcp-resume ls``: the checkpoints of a run, from its log alone. Loads no torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_verb, open_run
from dcp_resume.cli.printing import print_json, print_prose, print_table, size_text
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.records import CommitRecord

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
List the checkpoints of a run, oldest first. Only the run's log is read, no checkpoint is opened,
and torch is not loaded. `*` marks the newest one, from which the run would resume; pins and tags
are named behind the state.

Shown are those on the current line: what the live generation descends from. With --all also
  rolled back   left behind when a later generation resumed from an older step
  quarantined   found damaged; not resumed from
  retired       removed by the retention policy; files may be gone
"""
_EXAMPLES = """\
  dcp-resume ls runs/a
  dcp-resume ls --all --json s3://bucket/runs/a --storage-option endpoint_url=http://host:9000
"""
_COLUMNS = ("", "step", "gen", "time", "size", "loss", "best", "lr", "state")


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "ls",
        summary="list the checkpoints of a run",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run: a path or a URL")
    verb.add_argument("--all", action="store_true", help="also those that no longer count")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    store, log = open_run(arguments)
    history = log.history
    states = dict(_states(history))
    chosen = [seq for seq, state in states.items() if arguments.all or state == "current"]
    newest = history.newest()
    if arguments.json:
        print_json(
            {
                "url": store.url,
                "run": history.run,
                "generation": history.generation,
                "newest_step": newest.record.step if newest else None,
                "checkpoints": [_document(history, seq, states[seq]) for seq in chosen],
            }
        )
        return 0
    rows = [_row(history.commits[seq], states[seq]) for seq in chosen]
    for row, seq in zip(rows, chosen, strict=True):
        row[0] = "*" if newest and newest.seq == seq else ""
        row[-1] += ", pinned" if seq in history.pinned else ""
        row[-1] += "".join(f", {name}" for name in history.tags_of(seq))
    if not rows:
        left = f"; --all lists the other {len(states)}" if states else " yet"
        print_prose(
            f"{store.url} has no checkpoint{' on its current line' if states else ''}{left}"
        )
        return 0
    print_table(_COLUMNS, rows, words={"state"})
    return 0


def _states(history: RunHistory) -> Iterator[tuple[int, str]]:
    current = {entry.seq for entry in history.lineage()}
    for seq in sorted(history.commits):
        if seq in history.retired:
            yield seq, "retired"
        elif seq in history.quarantined:
            yield seq, "quarantined"
        else:
            yield seq, "current" if seq in current else "rolled back"


def _document(history: RunHistory, seq: int, state: str) -> dict[str, object]:
    record, newest = history.commits[seq], history.newest()
    return {
        "seq": seq,
        "step": record.step,
        "generation": record.generation,
        "created": record.created,
        "num_bytes": record.num_bytes,
        "attempt": record.attempt,
        "manifest": record.manifest.key,
        "state": state,
        "is_newest": newest is not None and newest.seq == seq,
        "is_pinned": seq in history.pinned,
        "tags": list(history.tags_of(seq)),
        "trainer": {
            name: getattr(record.trainer, name) for name in type(record.trainer).model_fields
        },
    }


def _row(record: CommitRecord, state: str) -> list[str]:
    trainer = record.trainer
    best = "" if trainer.best_step is None else f" @{trainer.best_step}"
    return [
        "",
        str(record.step),
        str(record.generation),
        record.created,
        size_text(record.num_bytes),
        _number(trainer.metrics.get("loss")),
        _number(trainer.best_loss) + best,
        _number(trainer.last_lr[0] if trainer.last_lr else None),
        state,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None or math.isinf(value) else f"{value:.4g}"
