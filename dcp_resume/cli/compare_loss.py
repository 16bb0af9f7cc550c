"""``dcp-resume compare-loss``: two training logs, step by step. Loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_plain_verb
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.printing import print_json, print_table
from dcp_resume.proof.losses import (
    TOLERANCES,
    LogComparison,
    StepComparison,
    Tolerance,
    compare_logs,
)

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
Compare the losses of two training logs on the steps that both have. A log holds JSON lines with
`step` and `loss`, or lines of text such as `step 12/100 | train loss 5.123`; other lines are passed
over. Of a step that a log tells more than once (a job that was killed and resumed repeats some) the
last value counts. A loss that is NaN or infinite is never equal, also if both are; nor are logs
without a common step. A and B may be directories: files of the same name are compared.
"""
_EXAMPLES = """\
  dcp-resume compare-loss whole.jsonl resumed.jsonl --tolerance 0
  dcp-resume compare-loss logs-before logs-after --dtype bfloat16
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_plain_verb(
        verbs,
        "compare-loss",
        summary="compare the losses of two training logs",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("a", metavar="A", help="a log, or a directory of logs")
    verb.add_argument("b", metavar="B", help="the same kind")
    verb.add_argument(
        "--dtype",
        choices=list(TOLERANCES),
        help="what the training computed in; each has a tolerance (default: as the file's name "
        "says, else float32)",
    )
    verb.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest absolute difference instead of the dtype's bounds; 0 asks for equal bits",
    )
    verb.add_argument("--brief", action="store_true", help="show only the steps that are not equal")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    tolerance = None if arguments.tolerance is None else Tolerance(arguments.tolerance)
    found = compare_logs(Path(arguments.a), Path(arguments.b), arguments.dtype, tolerance)
    if arguments.json:
        print_json(
            {
                "is_equal": found.is_equal,
                "logs": [_document(pair) for pair in found.pairs],
                "unpaired": list(found.unpaired),
            }
        )
    else:
        for pair in found.pairs:
            _print(pair, is_brief=arguments.brief)
        for name in found.unpaired:
            print(f"on one side only: {name}")
        if not found.pairs:
            print("NOT EQUAL: no log tells a loss")
    return ExitCode.OK if found.is_equal else ExitCode.DIFFERENT


def _print(pair: LogComparison, *, is_brief: bool) -> None:
    print(f"A: {pair.a.name}\nB: {pair.b.name}")
    shown = pair.different if is_brief else pair.steps
    if shown:
        columns = ("step", "A", "B", "abs diff", "rel diff", "")
        print_table(columns, [_row(step) for step in shown])
    for line in _summary(pair):
        print(line)
    print()


def _row(step: StepComparison) -> list[str]:
    return [
        str(step.step),
        repr(step.a),
        repr(step.b),
        f"{step.absolute:.3g}",
        f"{step.relative:.3g}",
        "equal" if step.is_equal else "DIFFERENT",
    ]


def _summary(pair: LogComparison) -> Iterator[str]:
    bounds = pair.tolerance
    within = "to the last bit"
    if bounds.absolute or bounds.relative:
        within = f"within {bounds.absolute:g}"
        within += f", or {bounds.relative:g} of the loss" if bounds.relative else ""
    if not pair.steps:
        a, b = _steps(pair.a.losses), _steps(pair.b.losses)
        yield f"NOT EQUAL: no common step; A tells {a}, B {b}"
    elif pair.is_equal:
        yield f"equal: {len(pair.steps)} of {len(pair.steps)} common steps {within}"
    else:
        yield (
            f"NOT EQUAL: {len(pair.different)} of {len(pair.steps)} common steps differ, the first "
            f"is step {pair.different[0].step}; asked for {within}"
        )
    for name, only, repeated in (
        ("A", pair.only_in_a, pair.a.num_repeated),
        ("B", pair.only_in_b, pair.b.num_repeated),
    ):
        if pair.steps and only:
            yield f"only in {name}: {_steps(only)}"
        if repeated:
            yield f"repeated in {name}: {repeated} value(s); the last one of a step counts"


def _steps(steps: Sequence[int] | dict[int, float]) -> str:
    """``3 step(s), 1 to 5``."""
    numbers = list(steps)
    return f"{len(numbers)} step(s), {numbers[0]} to {numbers[-1]}" if numbers else "none"


def _document(pair: LogComparison) -> dict[str, object]:
    return {
        "a": pair.a.name,
        "b": pair.b.name,
        "is_equal": pair.is_equal,
        "dtype": pair.dtype,
        "absolute_tolerance": pair.tolerance.absolute,
        "relative_tolerance": pair.tolerance.relative,
        "num_different": len(pair.different),
        "num_repeated": {"a": pair.a.num_repeated, "b": pair.b.num_repeated},
        "only_in_a": list(pair.only_in_a),
        "only_in_b": list(pair.only_in_b),
        "steps": [
            {
                "step": step.step,
                "a": step.a,
                "b": step.b,
                "absolute": step.absolute,
                "relative": step.relative,
                "is_equal": step.is_equal,
            }
            for step in pair.steps
        ],
    }
