"""What the exit code says, and which error gives which one."""

from __future__ import annotations

from enum import IntEnum

from dcp_resume.errors import (
    CheckpointNotFound,
    ConfigurationError,
    DcpResumeError,
    KeyNotFound,
    StorageError,
)

__all__ = ["EXIT_CODES_HELP", "ExitCode", "exit_code_of"]


class ExitCode(IntEnum):
    """Exit codes of every verb."""

    OK = 0
    PROBLEM = 1
    USAGE = 2
    NOT_FOUND = 3
    STORAGE = 4
    DIFFERENT = 5
    INTERRUPTED = 130


EXIT_CODES_HELP = """\
exit codes:
  0    done, nothing wrong
  1    a problem was found, or the request was refused
  2    wrong arguments, options or layout file
  3    no such run or checkpoint
  4    the storage refused or failed
  5    what was compared is not equal
  130  interrupted (Ctrl-C)
"""


def exit_code_of(error: DcpResumeError) -> ExitCode:
    """The exit code that stands for an error."""
    if isinstance(error, ConfigurationError):
        return ExitCode.USAGE
    if isinstance(error, (CheckpointNotFound, KeyNotFound)):
        return ExitCode.NOT_FOUND
    return ExitCode.STORAGE if isinstance(error, StorageError) else ExitCode.PROBLEM
