"""``dcp-resume report``: one page on a run, for a browser."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_step, add_verb, open_run
from dcp_resume.cli.keep_options import (
    add_keep_options,
    is_policy_given,
    read_duration,
    read_policy,
)
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
Write one HTML file about a run: what each save took (staged, written, committed), each phase on
each rank with the slowest rank, which rank wrote which tensor, loss and learning rate, storage, and
what the options --keep-… would delete, and saves that came to nothing. It asks no network for
anything and runs no script. The log and one checkpoint's documents are read, and the names of all
files are listed, no data file is read; nothing is changed.
"""
_EXAMPLES = """\
  dcp-resume report runs/a
  dcp-resume report runs/a --output a.html --png a.png --keep-last 3 --mtbf 8h
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "report",
        summary="write a page about a run",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run")
    verb.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page"
    )
    verb.add_argument(
        "--png", type=Path, metavar="FILE", help="also a picture of it, by a Chromium on PATH"
    )
    add_step(verb, "latest", "best")
    verb.add_argument(
        "--mtbf",
        type=read_duration,
        metavar="TIME",
        help="mean time between failures, such as 8h (default: from the run's restarts)",
    )
    add_keep_options(verb)
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.run_report.gathering import gather
    from dcp_resume.run_report.lost_saves import find_lost_saves
    from dcp_resume.run_report.page import html_page
    from dcp_resume.run_report.picture import find_browser, write_png
    from dcp_resume.session.selecting import select_commits

    browser = find_browser() if arguments.png else None
    store, log = open_run(arguments)
    lost = find_lost_saves(store, log)
    history = log.history
    is_empty = arguments.step == "latest" and history.newest() is None
    entry = None if is_empty else select_commits(history, arguments.step, store.url)[0]
    report = gather(
        store,
        history,
        entry,
        read_policy(arguments) if is_policy_given(arguments) else None,
        mtbf_s=arguments.mtbf,
        lost=lost,
        trust=read_signing(arguments).trust,
    )
    page = html_page(report)
    arguments.output.write_text(page, encoding="utf-8")
    written = [arguments.output]
    if browser is not None:
        write_png(browser, page, arguments.png)
        written.append(arguments.png)
    if arguments.json:
        print_json(
            {
                "url": store.url,
                "run": history.run,
                "files": [str(path) for path in written],
                "step": report.checkpoint.step if report.checkpoint else None,
                "slowest_ranks": {
                    phase.name: phase.slowest
                    for phase in (report.checkpoint.phases if report.checkpoint else ())
                },
                "advised_interval_s": report.advice.interval_s if report.advice else None,
                "lost": [asdict(one) for one in lost],
                "missing": list(report.missing),
            }
        )
    else:
        print("wrote", ", ".join(str(path) for path in written))
        for why in report.missing:
            print_prose(f"not shown: {why}")
    return 0
