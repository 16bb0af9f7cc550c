"""The only place where a key of a run is spelled or parsed.

    log/000000000017.json              record 17 of the run's log
    step-00000040/<attempt>/           one try to write step 40
        manifest.json  catalog.json  chunk-index
        shard-00001-model-00001-of-00001.safetensors

Readers take the keys of data files from the catalog; only writers build them here.
"""

from __future__ import annotations

import re
import secrets

__all__ = [
    "CATALOG_NAME",
    "INDEX_NAME",
    "LOG_PREFIX",
    "MANIFEST_NAME",
    "PROBE_PREFIX",
    "STEP_PREFIX",
    "attempt_prefix",
    "data_file_name",
    "is_relative_key",
    "log_key",
    "new_attempt_id",
    "parse_attempt_prefix",
    "parse_log_key",
]

LOG_PREFIX = "log/"
STEP_PREFIX = "step-"
"""Every attempt lies below a key that begins with it."""
PROBE_PREFIX = "probe/"
"""Short-lived keys by which a store is tested."""
MANIFEST_NAME = "manifest.json"
CATALOG_NAME = "catalog.json"
INDEX_NAME = "chunk-index"

MAX_KEY_BYTES = 900
"""Object stores allow 1,024 bytes for a whole key; the rest is left to the run's own prefix."""

_LOG_KEY = re.compile(r"log/(\d{12})\.json")
_ATTEMPT = re.compile(r"step-(\d{8,})/([a-z0-9]{1,32})/")
_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def log_key(seq: int) -> str:
    """Key of log record ``seq`` (1 and up)."""
    if not 1 <= seq < 10**12:
        raise ValueError(f"log numbers run from 1 to 10^12 - 1, got {seq}")
    return f"{LOG_PREFIX}{seq:012d}.json"


def parse_log_key(key: str) -> int | None:
    """Number of a log record's key; None for any other key."""
    match = _LOG_KEY.fullmatch(key)
    return int(match[1]) if match else None


def new_attempt_id() -> str:
    """A random id for one try to write a step: 12 characters of ``[a-z0-9]``, 60 bits."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    return "".join(secrets.choice(alphabet) for _ in range(12))


def attempt_prefix(step: int, attempt: str) -> str:
    """Prefix of all files of one attempt, with its final slash."""
    prefix = f"step-{step:08d}/{attempt}/"
    if parse_attempt_prefix(prefix) != (step, attempt):
        raise ValueError(f"not a step and attempt: {step!r}, {attempt!r}")
    return prefix


def parse_attempt_prefix(key: str) -> tuple[int, str] | None:
    """Step and attempt of a key below (or equal to) an attempt's prefix; None for other keys."""
    match = _ATTEMPT.match(key)
    return (int(match[1]), match[2]) if match else None


def data_file_name(rank: int, part: str, number: int, count: int, *, is_complete: bool) -> str:
    """Name of a rank's data file.

    Args:
        rank: Writing rank, from 0.
        part: Part of the state; anything outside ``[a-z0-9.]`` becomes a dot.
        number: Number of the file among the rank's files of the part, from 1.
        count: Number of the rank's files of the part.
        is_complete: Whether every chunk of every tensor named in the file lies in a
            ``.safetensors`` file of this attempt; otherwise stock readers must not see it.
    """
    safe_part = re.sub(r"[^a-z0-9.]+", ".", part.lower()).strip(".")[:40] or "part"
    suffix = ".safetensors" if is_complete else ".safetensors.part"
    return f"shard-{rank + 1:05d}-{safe_part}-{number:05d}-of-{count:05d}{suffix}"


def is_relative_key(key: str) -> bool:
    """Whether ``key`` stays below its base: plain lower-case segments, no ``..``, not too long."""
    return (
        0 < len(key) <= MAX_KEY_BYTES
        and all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))
        and ".." not in key
    )
