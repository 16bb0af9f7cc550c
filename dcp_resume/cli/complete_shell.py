"""``dcp-resume completion``: a script that completes verbs and options in a shell."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from dcp_resume.cli.arguments import add_plain_verb
from dcp_resume.cli.printing import print_json
from dcp_resume.errors import ConfigurationError

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs

__all__ = ["add_parser"]

_DESCRIPTION = """\
Print a script that completes verbs, options and paths. It is made once and asks nothing at a Tab,
so that a shell does not wait for Python. Make it again after an update. Needs shtab, which
`pip install "dcp-resume[cli]"` brings.
"""
_EXAMPLES = """\
  dcp-resume completion bash > ~/.local/share/bash-completion/completions/dcp-resume
  dcp-resume completion zsh > ~/.zfunc/_dcp-resume
"""
_SHELLS = ("bash", "zsh", "tcsh")
_PATHS = {"url", "source", "target", "a", "b", "keys", "layout", "scratch"}
"""Arguments that may be a path."""


def add_parser(verbs: Verbs, program: argparse.ArgumentParser) -> None:
    """Add the verb.

    Args:
        verbs: Of the program.
        program: What is completed.
    """
    verb = add_plain_verb(
        verbs,
        "completion",
        summary="print a script for a shell's completion",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("shell", choices=_SHELLS, help="for which shell")
    verb.set_defaults(run=partial(_run, program))


def _run(program: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("shtab") is None:
        raise ConfigurationError(
            'shtab is not installed; expected it for completion. pip install "dcp-resume[cli]"',
            option="completion",
        )
    import shtab

    for action in _actions(program):
        if action.dest in _PATHS:
            action.complete = shtab.FILE
    script = shtab.complete(program, shell=arguments.shell)
    if arguments.json:
        print_json({"shell": arguments.shell, "script": script})
    else:
        print(script)
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Every argument of a program and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
