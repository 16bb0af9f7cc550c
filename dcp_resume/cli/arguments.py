"""Arguments that verbs share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from dcp_resume.cli.exit_codes import EXIT_CODES_HELP
from dcp_resume.cli.keys import read_signing
from dcp_resume.storage import ObjectStore, RetryPolicy, open_store

if TYPE_CHECKING:
    from dcp_resume.manifest.records import LogRecord
    from dcp_resume.session.run_log import RunLog

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = [
    "BRIEF",
    "PATIENT",
    "Request",
    "add_other_step",
    "add_plain_verb",
    "add_step",
    "add_target_option",
    "add_verb",
    "add_yes",
    "append_deadline_s",
    "open_log",
    "open_pair",
    "open_run",
    "open_url",
    "openers",
    "read_pairs",
]

Request = int | str

PATIENT = RetryPolicy()
"""For verbs that read or write for minutes: an outage must not undo them."""
BRIEF = RetryPolicy(deadline_s=30.0)
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
        "--deadline",
        type=_read_seconds,
        metavar="S",
        help="seconds after which a request that storage does not answer is given up (default: 30; "
        "120 where a verb reads or writes for minutes; 15 of doctor)",
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


def add_step(verb: argparse._ActionsContainer, *words: Literal["latest", "best", "all"]) -> None:
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


def add_target_option(verb: argparse.ArgumentParser, name: str) -> None:
    """Add ``--target-storage-option``, for a verb with two URLs of which ``name`` is the second."""
    verb.add_argument(
        "--target-storage-option",
        action="append",
        metavar="KEY=VALUE",
        help=f"option for {name}; without one --storage-option counts for both",
    )


def open_url(url: str, arguments: argparse.Namespace, *, retry: RetryPolicy = BRIEF) -> ObjectStore:
    """Open the store of a URL by the options of the verb.

    Args:
        url: As the user wrote it.
        arguments: Of the verb.
        retry: For transient faults, if ``--deadline`` does not say otherwise.

    Raises:
        ConfigurationError: The URL or an option cannot work.
    """
    options = read_pairs(arguments.storage_option)
    return open_store(url, storage_options=options, retry=_retry(arguments, retry))


def open_pair(
    a: str, b: str, arguments: argparse.Namespace, *, retry: RetryPolicy = BRIEF
) -> tuple[ObjectStore, ObjectStore]:
    """Open the stores of two URLs; options count for both of them, except for local paths.

    Raises:
        ConfigurationError: A URL or an option cannot work, or there is no URL that an option could
            be for.
    """
    first, second = openers(a, b, arguments, retry=retry)
    return first(a), second(b)


def openers(
    a: str, b: str, arguments: argparse.Namespace, *, retry: RetryPolicy = BRIEF
) -> tuple[Callable[[str], ObjectStore], Callable[[str], ObjectStore]]:
    """What opens each of two URLs, and others beside it.

    ``--storage-option`` counts for both, except for what is local; with
    ``--target-storage-option`` each has its own.

    What is returned raises ConfigurationError where a URL or an option cannot work, or where there
    is no URL that an option could be for.
    """
    own = read_pairs(arguments.storage_option)
    others = getattr(arguments, "target_storage_option", None)
    policy = _retry(arguments, retry)

    def opener(options: dict[str, Any], *, is_shared: bool) -> Callable[[str], ObjectStore]:
        def opened(url: str) -> ObjectStore:
            is_for_another = is_shared and _is_local(url)
            chosen = None if is_for_another else options
            return open_store(url, storage_options=chosen, retry=policy)

        return opened

    if others is not None:
        return opener(own, is_shared=False), opener(read_pairs(others), is_shared=False)
    both = opener(own, is_shared=not (_is_local(a) and _is_local(b)))
    return both, both


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def _retry(arguments: argparse.Namespace, retry: RetryPolicy) -> RetryPolicy:
    deadline_s = arguments.deadline
    return retry if deadline_s is None else replace(retry, deadline_s=deadline_s)


def append_deadline_s(arguments: argparse.Namespace) -> float:
    """Seconds until a record whose answer was lost is given up: ``--deadline``."""
    return PATIENT.deadline_s if arguments.deadline is None else float(arguments.deadline)


def _read_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def open_log(
    store: ObjectStore,
    arguments: argparse.Namespace,
    *,
    run: str | None = None,
    heard: Callable[[int, LogRecord], object] = lambda seq, record: None,
) -> RunLog:
    """The log of a run, of which nothing is read yet.

    Args:
        store: Root of the run.
        arguments: Of the verb; ``--deadline`` counts for the append of a record too.
        run: UUID that the log must belong to; None for any.
        heard: Called with each record of the log.

    Raises:
        ConfigurationError: The file of keys cannot be used.
    """
    from dcp_resume.session.run_log import RunLog

    return RunLog(
        store,
        run=run,
        signing=read_signing(arguments),
        heard=heard,
        deadline_s=append_deadline_s(arguments),
    )


def open_run(
    arguments: argparse.Namespace,
    *,
    retry: RetryPolicy = BRIEF,
    heard: Callable[[int, LogRecord], object] = lambda seq, record: None,
) -> tuple[ObjectStore, RunLog]:
    """Open the run that ``url`` names, and read its log.

    Args:
        arguments: Of the verb.
        retry: For transient faults, if ``--deadline`` does not say otherwise.
        heard: Called with each record of the log.

    Raises:
        CheckpointNotFound: It has no log.
        ConfigurationError: The URL or an option cannot work.
        InvalidDocument: A record of the log is malformed.
        StorageError: The store failed.
    """
    from dcp_resume.errors import CheckpointNotFound

    store = open_url(arguments.url, arguments, retry=retry)
    log = open_log(store, arguments, heard=heard)
    if not log.refresh().last_seq:
        raise CheckpointNotFound(
            f"{store.url} is no run: it has no log. A single checkpoint's directory is shown by "
            "`dcp-resume inspect`",
            url=store.url,
            request="log",
        )
    return store, log
