"""The options ``--keep-…`` of a verb, and the retention policy that they make."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from dcp_resume.errors import ConfigurationError

if TYPE_CHECKING:
    from dcp_resume.manager.policies import RetentionPolicy

__all__ = ["add_keep_options", "is_policy_given", "read_duration", "read_policy"]


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def add_keep_options(verb: argparse.ArgumentParser) -> None:
    """Add one option for each kind of policy; what any of them keeps is kept."""
    group = verb.add_argument_group("what to keep (what any of them keeps)")
    group.add_argument("--keep-last", type=_count, metavar="N", help="the youngest N")
    group.add_argument(
        "--keep-best",
        type=_best,
        action="append",
        default=[],
        metavar="METRIC[:MODE[:N]]",
        help="the N best by a metric; MODE is min or max (default: min:1); may be repeated",
    )
    group.add_argument("--keep-every", type=_count, metavar="STEPS", help="multiples of STEPS")
    group.add_argument(
        "--keep-younger",
        type=read_duration,
        metavar="AGE",
        help="made within AGE before the youngest one, such as 36h or 7d",
    )
    group.add_argument(
        "--keep-one-per", type=read_duration, metavar="TIME", help="the youngest of each TIME"
    )
    group.add_argument("--keep-tagged", action="store_true", help="those that have a tag")


def is_policy_given(arguments: argparse.Namespace) -> bool:
    """Whether any option says what to keep."""
    return any(value for name, value in vars(arguments).items() if name.startswith("keep_"))


def read_policy(arguments: argparse.Namespace) -> RetentionPolicy:
    """The policy that the options make.

    Raises:
        ConfigurationError: None was given.
    """
    from dcp_resume.manager import policies as kinds

    single: list[tuple[Any, Callable[[Any], RetentionPolicy]]] = [
        (arguments.keep_last, kinds.KeepLast),
        (arguments.keep_every, kinds.KeepEvery),
        (arguments.keep_younger, kinds.KeepYounger),
        (arguments.keep_one_per, kinds.KeepOnePer),
        (arguments.keep_tagged or None, lambda _: kinds.KeepTagged()),
    ]
    chosen = [make(value) for value, make in single if value is not None]
    chosen += [kinds.KeepBest(*words) for words in arguments.keep_best]
    if not chosen:
        raise ConfigurationError(
            "prune was not told what to keep; expected at least one option --keep-…, such as "
            "--keep-last 3. Add one.",
            option="keep",
        )
    return reduce(or_, chosen)


def read_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``36h``, ``7d`` or ``2w``.

    Raises:
        ArgumentTypeError: It is no such text.

    >>> read_duration("36h")
    129600.0
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a number and s, m, h, d or w, got {text!r}")
    return float(found[1]) * _UNITS_S[found[2]]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _best(text: str) -> tuple[str, str, int]:
    words = text.split(":")
    metric, mode, count, *rest = words + ["min", "1"][len(words) - 1 :]
    if not metric or mode not in ("min", "max") or rest:
        raise argparse.ArgumentTypeError(f"expected METRIC[:min|max[:N]], got {text!r}")
    return metric, mode, _count(count)
