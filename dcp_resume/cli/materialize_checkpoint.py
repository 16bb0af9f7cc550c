"""``dcp-resume materialize``: make a checkpoint self-contained."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import (
    PATIENT,
    add_step,
    add_target_option,
    add_verb,
    append_deadline_s,
    open_pair,
)
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, size_text
from dcp_resume.cli.progress import ProgressLine
from dcp_resume.errors import ConfigurationError

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
Write a checkpoint anew with all that it refers to in older checkpoints, as a new attempt of its
step. Afterwards its directory can be copied and opened alone, and prune can delete its elders.

The result is a committed checkpoint of the same run, of which STEP must be the newest, or with
--into of another run. The run is opened for it: A JOB THAT IS STILL WRITING THERE IS FENCED and its
next save fails. Blocks are verified as they are read. Memory: --window-mib, and up to 4 readers.
"""
_EXAMPLES = """\
  dcp-resume materialize runs/a
  dcp-resume materialize runs/a --step 400 --into s3://bucket/runs/a-400
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "materialize",
        summary="make a checkpoint self-contained",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run")
    add_step(verb, "latest", "best")
    verb.add_argument("--into", metavar="URL", help="another run to commit into; made if absent")
    verb.add_argument(
        "--window-mib", type=int, default=64, metavar="MIB", help="memory in transit (default: 64)"
    )
    add_target_option(verb, "--into")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.materialize import materialize
    from dcp_resume.session.rewriting import RewriteOptions

    if arguments.target_storage_option is not None and arguments.into is None:
        raise ConfigurationError(
            "a target storage option was given, and no target; add --into, or leave it out",
            option="target-storage-option",
        )
    into = arguments.into or arguments.url
    source, target = open_pair(arguments.url, into, arguments, retry=PATIENT)
    signing = read_signing(arguments)
    progress = ProgressLine("materializing")
    options = RewriteOptions(
        window_bytes=arguments.window_mib << 20,
        progress=progress,
        trust=signing.trust,
        signing=signing,
        append_deadline_s=append_deadline_s(arguments),
    )
    (located,) = find_checkpoints(source, arguments.step, signing.trust)
    try:
        result = materialize(source, located, target, options)
    finally:
        progress.close()
    if arguments.json:
        print_json({"url": target.url, **asdict(result)})
    else:
        print(
            f"step {result.step} is committed, self-contained, at {target.url}/{result.prefix}\n"
            f"{result.num_files} file(s), {size_text(result.num_bytes)} written, "
            f"{size_text(result.read_bytes)} read, {result.duration_s:.1f} s"
        )
    return 0
