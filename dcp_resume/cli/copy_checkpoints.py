"""``dcp-resume cp``: copy checkpoints between stores. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import (
    PATIENT,
    add_step,
    add_target_option,
    add_verb,
    open_log,
    open_pair,
)
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_table, size_text
from dcp_resume.cli.progress import ProgressLine

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.manifest.signing import Signing
    from dcp_resume.session.copying import CopiedCheckpoint
    from dcp_resume.session.located import Located
    from dcp_resume.session.run_log import RunLog
    from dcp_resume.storage import ObjectStore

__all__ = ["add_parser"]

_DESCRIPTION = """\
Copy one checkpoint, or with --all every one on the current line, to another root: between file
systems and buckets, in either direction. Files go byte for byte; each block is proved before it is
written, and the copy's documents once more where they lie. A checkpoint counts at the target by the
last write, its commit record; a copy that was cut off leaves nothing that counts.

Call it again to go on, or to bring a copy up to date: what the target's log has is passed over, and
files that an earlier call wrote are read there and kept if every block is right. Checkpoints that
the target's retention removed are not brought back. Damaged ones are named, and left out.

The copy is the same run: its UUID, steps, times, trainer state and signatures are those of SOURCE.
Pins and tags go along; nothing is unpinned or untagged at the target. Left out are checkpoints that
are retired, quarantined, or with --all rolled back. The run at TARGET is opened: A JOB THAT STILL
WRITES THERE IS FENCED. A copy that would come behind a younger checkpoint, or behind one that a job
wrote at the target, is refused.
"""
_EXAMPLES = """\
  dcp-resume cp runs/a s3://bucket/runs/a
  dcp-resume cp s3://bucket/runs/a /backup/a --all
  dcp-resume cp runs/a runs/best --step best
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "cp",
        summary="copy checkpoints to another root",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("source", metavar="SOURCE", help="run, or a checkpoint's directory")
    verb.add_argument("target", metavar="TARGET", help="root of the copy; made if absent")
    which = verb.add_mutually_exclusive_group()
    add_step(which, "latest", "best")
    which.add_argument("--all", action="store_true", help="every checkpoint of the current line")
    add_target_option(verb, "TARGET")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.copying import CopyOutcome, RunCopy

    source, target = open_pair(arguments.source, arguments.target, arguments, retry=PATIENT)
    signing = read_signing(arguments)
    origin = open_log(source, arguments)
    origin.refresh()
    wanted = _wanted(arguments, source, origin, signing)
    log = open_log(target, arguments, run=_run_id(source, origin, wanted[0], signing))
    log.refresh()
    copy, found = RunCopy(source, origin, target, log), []
    copy.check_target()
    for number, located in enumerate(wanted, 1):
        progress = ProgressLine(f"copying {number}/{len(wanted)}")
        try:
            found.append(copy.copy(located, progress))
        finally:
            progress.close()
    if arguments.json:
        checkpoints = [_document(one) for one in found]
        print_json({"source": source.url, "target": target.url, "checkpoints": checkpoints})
    else:
        _print(found, target.url)
    lost = {CopyOutcome.DAMAGED} if arguments.all else {CopyOutcome.DAMAGED, CopyOutcome.RETIRED}
    is_lost = any(one.outcome in lost for one in found)
    return ExitCode.PROBLEM if is_lost else ExitCode.OK


def _wanted(
    arguments: argparse.Namespace, source: ObjectStore, origin: RunLog, signing: Signing
) -> list[Located]:
    """Oldest first."""
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.located import Located

    if arguments.all:
        line = [Located.of(entry) for entry in origin.history.lineage()]
        if line:
            return line[::-1]
    return find_checkpoints(source, "latest" if arguments.all else arguments.step, signing.trust)


def _run_id(source: ObjectStore, origin: RunLog, located: Located, signing: Signing) -> str:
    """UUID of the run; where there is no log, the checkpoint itself says it."""
    from dcp_resume.session.opening import open_checkpoint

    if origin.history.run is not None:
        return origin.history.run
    opened = open_checkpoint(
        source, located.prefix, located.manifest, trust=signing.trust, is_listed=False
    )
    return opened.manifest.run


def _document(one: CopiedCheckpoint) -> dict[str, object]:
    return {
        "step": one.step,
        "prefix": one.prefix,
        "outcome": one.outcome.value,
        "seq": one.seq,
        "num_bytes": one.num_bytes,
        "kept_bytes": one.kept_bytes,
        "problems": [
            {"where": p.where, "kind": p.kind, "message": p.message} for p in one.problems
        ],
    }


def _print(found: Sequence[CopiedCheckpoint], url: str) -> None:
    rows = [
        [
            "?" if one.step is None else str(one.step),
            one.outcome.value,
            size_text(one.num_bytes),
            size_text(one.kept_bytes),
        ]
        for one in found
    ]
    print_table(("step", "outcome", "written", "kept"), rows)
    for one in found:
        for problem in one.problems:
            print(f"  - {problem}")
    print(f"\n{size_text(sum(one.num_bytes for one in found))} written to {url}")
