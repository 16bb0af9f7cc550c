"""The command line: parse, run a verb, and turn errors into one message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from dcp_resume.cli.exit_codes import EXIT_CODES_HELP, ExitCode, exit_code_of
from dcp_resume.cli.printing import print_json, print_prose
from dcp_resume.cli.progress import RetryNotes
from dcp_resume.errors import DcpResumeError
from dcp_resume.events import subscribe

__all__ = ["main"]

_DESCRIPTION = """\
Look at, verify, compare, copy, reshard, export, import and prune the checkpoints of a training run,
and prove that it resumes. URL is a path, file://, s3://bucket/… or another URL that fsspec knows;
credentials come from the environment, as for any AWS client.
"""
_EPILOG = f"""\
examples:
  dcp-resume ls runs/a
  dcp-resume verify runs/a --step all
  dcp-resume reshard runs/a runs/b --to tp=2,dp_shard=4

`dcp-resume VERB --help` explains each verb.

{EXIT_CODES_HELP}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.USAGE
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    unsubscribe = subscribe(RetryNotes())
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except DcpResumeError as error:
        return _report(error, arguments)
    except KeyboardInterrupt:
        print("dcp-resume: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`) went away; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    finally:
        unsubscribe()
    return code


def _parser() -> argparse.ArgumentParser:
    # Imported here, so that Ctrl-C during the tenths of a second this takes ends without a trace.
    from dcp_resume.cli import (
        collect_litter,
        compare_loss,
        complete_shell,
        copy_checkpoints,
        diff_checkpoints,
        doctor,
        export_checkpoint,
        import_checkpoint,
        inspect_checkpoint,
        list_run,
        mark_checkpoint,
        materialize_checkpoint,
        plan_reads,
        prove_resume,
        prune_run,
        quarantine_checkpoint,
        report_run,
        reshard_checkpoint,
        verify_checkpoint,
        watch_run,
    )

    parser = argparse.ArgumentParser(
        prog="dcp-resume",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in (
        list_run,
        watch_run,
        inspect_checkpoint,
        verify_checkpoint,
        plan_reads,
        copy_checkpoints,
        reshard_checkpoint,
        materialize_checkpoint,
        export_checkpoint,
        import_checkpoint,
        diff_checkpoints,
        prove_resume,
        compare_loss,
        report_run,
        prune_run,
        mark_checkpoint,
        quarantine_checkpoint,
        collect_litter,
        doctor,
    ):
        module.add_parser(verbs)
    complete_shell.add_parser(verbs, parser)
    return parser


def _report(error: DcpResumeError, arguments: argparse.Namespace) -> ExitCode:
    if arguments.debug:
        traceback.print_exception(error)
    if arguments.json:
        problems = [
            {"where": p.where, "kind": p.kind, "message": p.message}
            for p in getattr(error, "problems", ())
        ]
        document = {"type": type(error).__name__, "message": str(error), "problems": problems}
        print_json({"error": document})
    print_prose(f"dcp-resume: {error}", sys.stderr)
    return exit_code_of(error)
