"""Arguments that verbs share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dcp_resume.cli.exit_codes import EXIT_CODES_HELP
from dcp_resume.storage import ObjectStore, RetryPolicy, open_store

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["Request", "add_step", "add_verb", "open_url", "read_pairs"]

Request = int | Literal["latest", "best", "all"]


def add_verb(
    verbs: Verbs, name: str, *, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a verb with what every verb takes: output, storage options, keys, debugging."""
    verb = verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}\n{EXIT_CODES_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("--json", action="store_true", help="print one JSON document")
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
    verb.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return verb


def add_step(verb: argparse.ArgumentParser, *words: Literal["latest", "best", "all"]) -> None:
    """Add ``--step``, which is a number or one of ``words``; ``latest`` is the default."""
    verb.add_argument(
        "--step",
        type=_step_reader(words),
        default="latest",
        metavar="|".join(("N", *words)),
        help="which checkpoint (default: latest)",
    )


def _step_reader(words: Sequence[str]) -> Callable[[str], Request]:
    def read(text: str) -> Request:
        if text in words:
            return text  # type: ignore[return-value]
        if text.isdecimal():
            return int(text)
        raise argparse.ArgumentTypeError(f"expected a step or {', '.join(words)}, got {text!r}")

    return read


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
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
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
