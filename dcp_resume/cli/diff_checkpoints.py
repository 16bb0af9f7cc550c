"""``dcp-resume diff``: in what two checkpoints differ, whatever topology wrote them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import (
    add_other_step,
    add_step,
    add_target_option,
    add_verb,
    open_pair,
)
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose, print_table, size_text
from dcp_resume.cli.progress import ProgressLine

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.session.difference import CheckpointDifference

__all__ = ["add_ignore", "add_parser", "difference_document", "print_difference"]

_DESCRIPTION = """\
Compare what two checkpoints hold: names, dtypes and shapes, every value, and every element of every
tensor, bit by bit. Which ranks wrote them does not matter: boxes are put together, padding is left
out, and a tensor with several names (tied weights) is found under any of them. What cannot be
compared, values of each rank's own on other numbers of ranks, is said. Equal blocks of equal boxes
are not read: their digests prove them. Memory: a window on each side, and 4 readers of 16 MiB.

Not compared, because it may differ: where and when a checkpoint was written and by which ranks, the
trainer state's wall_time_s and lineage, and what --ignore names.
"""
_EXAMPLES = """\
  dcp-resume diff runs/a runs/b
  dcp-resume diff runs/a runs/a --step 400 --other-step 800 --json
"""
_SHOWN = 4
"""Differences of each part that are spelled out."""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "diff",
        summary="compare two checkpoints",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("a", metavar="A", help="run, or a checkpoint's directory")
    verb.add_argument("b", metavar="B", help="the other; may be the same run")
    add_step(verb, "latest", "best")
    add_other_step(verb, "latest", "best")
    add_target_option(verb, "B")
    add_ignore(verb)
    verb.add_argument(
        "--window-mib", type=int, default=64, metavar="MIB", help="memory of a side (default: 64)"
    )
    verb.set_defaults(run=_run)


def add_ignore(verb: argparse.ArgumentParser) -> None:
    """Add ``--ignore``."""
    verb.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names that may differ, such as 'trainer.metrics*'; may be repeated",
    )


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.difference import DiffOptions, compare_checkpoints
    from dcp_resume.session.side import open_side

    other = arguments.step if arguments.other_step is None else arguments.other_step
    trust = read_signing(arguments).trust
    stores = open_pair(arguments.a, arguments.b, arguments)
    a, b = open_side(stores[0], arguments.step, trust), open_side(stores[1], other, trust)
    progress = ProgressLine("comparing")
    try:
        difference = compare_checkpoints(
            a,
            b,
            DiffOptions(
                ignored=tuple(arguments.ignore),
                window_bytes=arguments.window_mib << 20,
                progress=progress,
            ),
        )
    finally:
        progress.close()
    if arguments.json:
        print_json({"a": arguments.a, "b": arguments.b, **difference_document(difference)})
    else:
        print_difference(difference)
    return ExitCode.OK if difference.is_equal else ExitCode.DIFFERENT


def print_difference(difference: CheckpointDifference) -> None:
    """Say in what two checkpoints differ, or that they are equal."""
    what = (
        f"{difference.num_tensors} tensors ({size_text(difference.num_bytes)}) and "
        f"{difference.num_values} values"
    )
    lines = list(difference.lines())
    if not lines:
        print_prose(f"equal: {what}")
    else:
        print_prose(f"NOT EQUAL: {len(lines)} difference(s) in {what}; the first:")
        print_prose(f"  {lines[0]}")
        print()
        columns = ("part", "tensors", "values", "differ")
        rows = [
            [part.name, str(part.num_tensors), str(part.num_values), str(len(part.differences))]
            for part in difference.parts
        ]
        print_table(columns, rows, words={"part"})
        print()
        for part in difference.parts:
            _print_some(part.name, part.differences)
        _print_some("the manifest", list(map(str, difference.facts)))
    for problem in difference.uncompared:
        print_prose(f"not compared: {problem}")
    if difference.passed_over:
        print_prose(f"may differ, not looked at: {', '.join(difference.passed_over)}")


def _print_some(name: str, lines: Sequence[str]) -> None:
    for line in lines[:_SHOWN]:
        print_prose(f"  - {line}")
    if len(lines) > _SHOWN:
        print_prose(f"    … and {len(lines) - _SHOWN} more in {name}; --json has all")


def difference_document(difference: CheckpointDifference) -> dict[str, object]:
    """The same for ``--json``."""
    return {"is_equal": difference.is_equal, **asdict(difference)}
