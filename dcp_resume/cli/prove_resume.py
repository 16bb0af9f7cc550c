"""``dcp-resume prove``: run a training command with and without an interruption, and compare."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from dcp_resume.cli.arguments import add_verb, read_pairs
from dcp_resume.cli.diff_checkpoints import add_ignore, difference_document, print_difference
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.proof.resume import Proof

__all__ = ["add_parser"]

_DESCRIPTION = """\
Prove that your own training resumes exactly. COMMAND is run three times: straight to the last step;
into another run, to the step of the stop; and there once more, resuming, to the last step. The two
checkpoints of the last step are compared item by item, as `dcp-resume diff` does: every element of
every tensor, generators, data position, schedules, optimizer options, trainer state.

COMMAND stands after `--`, and is one program with its arguments (no shell), torchrun for instance.
In it are replaced
  {run}    URL of the run to save to, and to resume from if it has a checkpoint; must occur
  {stop}   step at which this leg ends, after saving it; must occur
  {last}   last step of the training: what a schedule of the learning rate is made for
  {leg}    straight, stopped or resumed
The stopped leg must end early, as a job that is taken away does: it must not train a shorter
schedule. If the straight leg keeps a checkpoint of the stop too, that is compared first: where two
trainings differ before any resume, the resume is not to blame.
"""
_EXAMPLES = """\
  dcp-resume prove --stop-at 4 --last 8 -- torchrun --nproc-per-node 2 examples/train.py \\
      --num_iteration {last} --stop_at {stop} --save {run} --load {run} --save_interval 4
"""


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "prove",
        summary="prove that a training command resumes exactly",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument(
        "--stop-at", type=int, required=True, metavar="K", help="step of the interruption"
    )
    verb.add_argument(
        "--last", type=int, required=True, metavar="N", help="last step, which is compared"
    )
    verb.add_argument(
        "--scratch",
        metavar="URL",
        help="empty place for the two runs, kept afterwards (default: a temporary directory, "
        "removed if the proof succeeds)",
    )
    verb.add_argument(
        "--resume-with",
        default="",
        metavar="WORDS",
        help="added to the command in the leg that resumes, such as '--resume {run}'",
    )
    add_ignore(verb)
    verb.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.proof.resume import ProofPlan, Scratch, Verdict, prove_resume
    from dcp_resume.session.difference import DiffOptions

    plan = ProofPlan(
        command=tuple(arguments.command),
        stop_at=arguments.stop_at,
        last=arguments.last,
        resume_words=tuple(shlex.split(arguments.resume_with)),
        storage_options=read_pairs(arguments.storage_option) or None,
        trust=read_signing(arguments).trust,
        diff=DiffOptions(ignored=tuple(arguments.ignore)),
    )
    scratch = Scratch.at(arguments.scratch)
    print(f"the legs write to {scratch.directory}/*.out", file=sys.stderr)
    proof = prove_resume(plan, scratch, lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.json:
        print_json(_document(proof, scratch.url))
    else:
        _print(proof, scratch.url)
    if proof.verdict is Verdict.EXACT:
        scratch.remove()
        return ExitCode.OK
    return ExitCode.DIFFERENT


def _document(proof: Proof, url: str) -> dict[str, object]:
    return {
        "verdict": proof.verdict.value,
        "stop_at": proof.stop_at,
        "last": proof.last,
        "scratch": url,
        "differences": [difference_document(found) for found in proof.differences],
    }


def _print(proof: Proof, url: str) -> None:
    from dcp_resume.proof.resume import Verdict

    for found in proof.differences:
        when = "straight (A) and resumed (B)"
        if found.step_a == proof.stop_at:
            when = "two trainings, before any resume"
        print_prose(f"step {found.step_a}, {when}:")
        print_difference(found)
        print()
    what = f"the training that was stopped at step {proof.stop_at} and resumed"
    if proof.verdict is Verdict.EXACT:
        print_prose(f"PROVEN: {what} is at step {proof.last} the straight one, bit for bit")
        return
    if proof.verdict is Verdict.NOT_EXACT:
        print_prose(f"NOT PROVEN: {what} is at step {proof.last} not the straight one")
        if not proof.is_reproducible_to_the_stop:
            print_prose(
                f"whether two trainings agree up to the stop is not known: save step "
                f"{proof.stop_at} in the straight leg too, to tell that from the resume"
            )
    else:
        print_prose(
            f"NOT REPRODUCIBLE: two trainings differ at step {proof.stop_at}, before any resume; "
            f"fix seeds and deterministic algorithms, or --ignore what your training does not use, "
            f"then prove again"
        )
    print_prose(f"the runs are kept: dcp-resume diff {url}/straight {url}/resumed")
