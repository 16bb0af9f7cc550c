"""Which strings are keys: checked before any backend is touched, so no key can leave the root."""

from __future__ import annotations

import re

from dcp_resume.errors import ConfigurationError

__all__ = ["TEMP_PREFIX", "check_key", "check_prefix", "is_key"]

TEMP_PREFIX = ".tmp-"
"""Names of unfinished files begin like this; the leading dot keeps them out of the keys."""

_SEGMENT = r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*|\.metadata)"
"""``.metadata`` is the one name with a dot in front: the index of stock DCP directories."""

_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*\Z")
_PREFIX = re.compile(rf"(?:{_SEGMENT}/)*(?:{_SEGMENT})?\Z")


def is_key(name: str) -> bool:
    """Whether a name that a store listed can be one of our keys."""
    return _KEY.match(name) is not None


def check_key(key: str) -> str:
    """Return the key itself if it is one.

    Raises:
        ConfigurationError: It is none.
    """
    if not is_key(key):
        raise ConfigurationError(
            f"not a storage key: {key!r}. Expected non-empty segments of [A-Za-z0-9._-] joined by"
            " '/', none of them beginning with a dot",
            option="key",
        )
    return key


def check_prefix(prefix: str, *, option: str = "prefix") -> str:
    """Return the prefix itself if keys can begin with it; it may be empty or end in a segment.

    Raises:
        ConfigurationError: No key can begin with it.
    """
    if _PREFIX.match(prefix) is None:
        raise ConfigurationError(
            f"no storage key can begin with {option} {prefix!r}. Expected segments of"
            " [A-Za-z0-9._-] joined by '/', the last of which may be unfinished",
            option=option,
        )
    return prefix
