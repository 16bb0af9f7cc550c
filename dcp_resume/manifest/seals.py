"""The last line of a document that nothing else vouches for: its own checksum.

Log records and manifests end like this, so that one wrong bit anywhere in them is found:

    …
    ,"checksum":"sha256:<64 hex digits>"}

The checksum is over every byte before its line. Catalog and index need none: the manifest holds
their digests.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

__all__ = ["Seal", "find_seal", "seal"]

_SEAL = re.compile(rb',\n"checksum":"sha256:([0-9a-f]{64})"\}\n\Z')
_SEAL_BYTES = len(b',\n"checksum":"sha256:"}\n') + 64


@dataclass(frozen=True, slots=True)
class Seal:
    """What the end of a document says."""

    checksum: str
    """As it stands there."""
    expected: str
    """Of the bytes before it."""
    content: bytes
    """The document without its seal."""

    @property
    def is_whole(self) -> bool:
        """Whether the bytes are those that were sealed."""
        return self.checksum == self.expected


def seal(content: bytes) -> bytes:
    """Put a checksum at the end of a JSON object, which ends in a brace and a newline."""
    body = content[:-2].rstrip()
    return b'%s,\n"checksum":"%s"}\n' % (body, _checksum(body).encode())


def find_seal(data: bytes) -> Seal | None:
    """Read the end of a document; None where there is no checksum."""
    match = _SEAL.search(data, max(0, len(data) - _SEAL_BYTES))
    if match is None:
        return None
    body = data[: match.start()]
    return Seal(f"sha256:{match[1].decode()}", _checksum(body), body + b"}\n")


def _checksum(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"
