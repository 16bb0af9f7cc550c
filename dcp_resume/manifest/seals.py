"""The last lines of a document that nothing else vouches for: who signed it, and its checksum.

Log records and manifests end like this, the first line only where they are signed:

    …
    ,"signature":"ed25519:<key id>:<hex digits>"
    ,"checksum":"sha256:<64 hex digits>"}

Each is over every byte before its line. Catalog and index need none: the manifest holds their
digests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["SEAL_FIELDS", "Seal", "Signature", "find_seal", "not_signed", "seal"]

SEAL_FIELDS = frozenset({"checksum", "signature"})

_CHECKSUM = re.compile(rb',\n"checksum":"sha256:([0-9a-f]{64})"\}\n\Z')
_CHECKSUM_BYTES = len(b',\n"checksum":"sha256:"}\n') + 64
_SIGNATURE = re.compile(
    rb',\n"signature":"([a-z0-9-]{1,32}):([a-z0-9._-]{1,64}):((?:[0-9a-f]{2}){1,128})"\Z'
)
_SIGNATURE_BYTES = len(b',\n"signature":"::"') + 32 + 64 + 256


@dataclass(frozen=True, slots=True)
class Signature:
    """Who says that a document is theirs."""

    scheme: str
    key_id: str
    value: bytes

    def __str__(self) -> str:
        return f"{self.scheme}:{self.key_id}:{self.value.hex()}"


@dataclass(frozen=True, slots=True)
class Seal:
    """What the end of a document says."""

    checksum: str
    """As it stands there."""
    expected: str
    """Of the bytes before it."""
    signature: Signature | None
    """None of a document that is not signed."""
    body: bytes
    """What is signed: every byte before the seal."""

    @property
    def is_whole(self) -> bool:
        """Whether the bytes are those that were sealed."""
        return self.checksum == self.expected

    @property
    def content(self) -> bytes:
        """The document without its seal."""
        return self.body + b"}\n"


def not_signed(body: bytes) -> Signature | None:
    """Sign nothing."""
    del body
    return None


def seal(content: bytes, sign: Callable[[bytes], Signature | None] = not_signed) -> bytes:
    """Put a seal at the end of a JSON object, which ends in a brace and a newline.

    Args:
        content: The document.
        sign: Signs every byte before the seal.
    """
    body = content[:-2].rstrip()
    signature = sign(body)
    if signature is not None:
        body += b',\n"signature":"%s"' % str(signature).encode()
    return b'%s,\n"checksum":"%s"}\n' % (body, _checksum(body).encode())


def find_seal(data: bytes) -> Seal | None:
    """Read the end of a document; None where there is no checksum."""
    match = _CHECKSUM.search(data, max(0, len(data) - _CHECKSUM_BYTES))
    if match is None:
        return None
    before = data[: match.start()]
    checksum, expected = f"sha256:{match[1].decode()}", _checksum(before)
    signed = _SIGNATURE.search(before, max(0, len(before) - _SIGNATURE_BYTES))
    if signed is None:
        return Seal(checksum, expected, None, before)
    scheme, key_id, value = (group.decode() for group in signed.groups())
    signature = Signature(scheme, key_id, bytes.fromhex(value))
    return Seal(checksum, expected, signature, before[: signed.start()])


def _checksum(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"
