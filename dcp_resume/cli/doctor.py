"""``dcp-resume doctor``: could a run be saved here?"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_verb, open_url
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose, print_table
from dcp_resume.storage import RetryPolicy

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.preflight import PreflightReport

__all__ = ["add_parser"]

_DESCRIPTION = """\
Ask of a store what a run will ask of it, before training begins: list, read the log, create a key
twice and from eight threads (exactly one may win), write, read back, delete; compare clocks, and
look at the free space. Every failed check says what to do. No object is left behind. What several
ranks see, `dcp_resume.preflight` asks from within a job.
"""
_EXAMPLES = """\
  dcp-resume doctor s3://bucket/runs/a --size 40GiB --keep 3
  dcp-resume doctor --json /shared/runs/a
"""
_IMPATIENT = RetryPolicy(deadline_s=15.0)
"""Whoever asks is there to wait, and a store that fails for so long is what they ask about."""
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "doctor",
        summary="ask whether a run could be saved here",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run; may not exist yet")
    verb.add_argument(
        "--size",
        type=_read_size,
        default=0,
        metavar="BYTES",
        help="of one checkpoint, such as 40GiB; compared with the free space",
    )
    verb.add_argument(
        "--keep", type=int, default=0, metavar="N", help="checkpoints that retention keeps"
    )
    verb.set_defaults(run=_run)


def _read_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", text, re.IGNORECASE)
    unit = _UNITS.get((match[2] or "").upper().removeprefix("B")) if match else None
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 40GiB, got {text!r}")
    return int(float(match[1]) * unit)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.preflight import Need, run_preflight
    from dcp_resume.session.votes import LonelyVotes

    store = open_url(arguments.url, arguments, retry=_IMPATIENT)
    need = Need(checkpoint_bytes=arguments.size, num_kept=arguments.keep)
    report = run_preflight(store, LonelyVotes(), need, read_signing(arguments))
    if arguments.json:
        print_json({"url": report.url, "is_ready": report.is_ready, "checks": _documents(report)})
    else:
        _print(report)
    return ExitCode.OK if report.is_ready else ExitCode.PROBLEM


def _documents(report: PreflightReport) -> list[dict[str, str]]:
    return [
        {"name": c.name, "verdict": c.verdict.value, "found": c.found, "remedy": c.remedy}
        for c in report.checks
    ]


def _print(report: PreflightReport) -> None:
    rows = [(c.name, c.verdict.value, c.found) for c in report.checks]
    columns = ("check", "verdict", "found")
    print_table(columns, rows, words=columns)
    print_prose(f"{report.url} {'is ready' if report.is_ready else 'is NOT ready'}")
    for check in report.checks:
        if check.remedy:
            print_prose(f"  - {check.name}: {check.remedy}")
