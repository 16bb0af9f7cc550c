"""Arguments that verbs share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dcp_resume.cli.exit_codes import EXIT_CODES_HELP
from dcp_resume.cli.keys import read_signing
from dcp_resume.storage import ObjectStore, RetryPolicy, open_store

if TYPE_CHECKING:
    from dcp_resume.session.run_log import RunLog

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = [
    "PATIENT",
    "Request",
    "add_other_step",
    "add_plain_verb",
    "add_step",
    "add_verb",
    "add_yes",
    "open_run",
    "open_url",
    "read_pairs",
]

Request = int | str

PATIENT = RetryPolicy()
"""For verbs that read or write for minutes: an outage must not undo them."""
_BRIEF = RetryPolicy(deadline_s=30.0)
"""A person waits, and most often the URL is wrong."""


def add_verb(
    verbs: Verbs, name: str, *, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a verb with what every verb that opens a URL takes."""
    verb = add_plain_verb(verbs, name, summary=summary, description=description, examples=examples)
    verb.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="option of the file system, such as endpoint_url=http://host:9000; the value may be "
        "JSON; may be repeated; local paths take none",
    )
    verb.add_argument(
        "--keys",
        metavar="FILE",
        help="believe only what these keys signed, and sign with the first; lines of KIND KEY-ID "
        "HEX, where KIND is hmac-sha256, ed25519 or ed25519-public",
    )
    return verb


def add_plain_verb(
    verbs: Verbs, name: str, *, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a verb with what every verb takes: output, debugging."""
    verb = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}\n{EXIT_CODES_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--json", action="store_true", help="print one JSON document")
    verb.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return verb


def add_step(verb: argparse.ArgumentParser, *words: Literal["latest", "best", "all"]) -> None:
    """Add ``--step``: a number, one of ``words``, or a tag; ``latest`` is the default."""
    verb.add_argument(
        "--step",
        type=_step_reader(words),
        default="latest",
        metavar="|".join(("N", *words, "TAG")),
        help="which checkpoint (default: latest)",
    )


def add_other_step(verb: argparse.ArgumentParser, *words: Literal["latest", "best"]) -> None:
    """Add ``--other-step``, for the second of two URLs; None is as ``--step`` says."""
    verb.add_argument(
        "--other-step",
        type=_step_reader(words),
        metavar="|".join(("N", *words)),
        help="which checkpoint of the second URL (default: as --step)",
    )


def _step_reader(words: Sequence[str]) -> Callable[[str], Request]:
    def read(text: str) -> Request:
        from dcp_resume.manifest.records import is_tag_name

        if text in words or is_tag_name(text):
            return text
        if text.isdecimal():
            return int(text)
        expected = ", ".join(("a step", *words))
        raise argparse.ArgumentTypeError(f"expected {expected} or a tag, got {text!r}")

    return read


def add_yes(verb: argparse.ArgumentParser) -> None:
    """Add ``--yes``, without which a verb that deletes only says what it would do."""
    group = verb.add_mutually_exclusive_group()
    group.add_argument("--yes", action="store_true", help="do it; without it nothing is changed")
    group.add_argument("--dry-run", action="store_true", help="change nothing (the default)")


def read_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a mapping; a value that is JSON is taken as such.

    Raises:
        ConfigurationError: A pair without ``=``.
    """
    from dcp_resume.errors import ConfigurationError

    options: dict[str, Any] = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key:
            raise ConfigurationError(
                "expected KEY=VALUE as storage option, got one without a key or a '='",
                option="storage-option",
            )
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def open_url(
    url: str,
    options: Mapping[str, Any],
    *,
    is_strict: bool = True,
    retry: RetryPolicy = _BRIEF,
) -> ObjectStore:
    """Open the store of a URL.

    Args:
        url: As the user wrote it.
        options: Storage options.
        is_strict: Whether options for a local path are an error; else they are meant for the
            other URL of the same command.
        retry: For transient faults.

    Raises:
        ConfigurationError: The URL or an option cannot work.
    """
    is_local = "://" not in url or url.startswith("file://")
    own = None if is_local and not is_strict else options
    return open_store(url, storage_options=own, retry=retry)


def open_run(
    arguments: argparse.Namespace, *, retry: RetryPolicy = _BRIEF
) -> tuple[ObjectStore, RunLog]:
    """Open the run that ``url`` and ``storage_option`` name, and read its log.

    Raises:
        CheckpointNotFound: It has no log.
        ConfigurationError: The URL or an option cannot work.
        InvalidDocument: A record of the log is malformed.
        StorageError: The store failed.
    """
    from dcp_resume.errors import CheckpointNotFound
    from dcp_resume.session.run_log import RunLog

    store = open_url(arguments.url, read_pairs(arguments.storage_option), retry=retry)
    log = RunLog(store, signing=read_signing(arguments))
    if not log.refresh().last_seq:
        raise CheckpointNotFound(
            f"{store.url} is no run: it has no log. A single checkpoint's directory is shown by "
            "`dcp-resume inspect`",
            url=store.url,
            request="log",
        )
    return store, log
