"""Keys from a file: whose documents a verb believes, and how it signs its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.signing import (
    UNSIGNED,
    Ed25519Key,
    Ed25519PublicKey,
    HmacKey,
    SignedBy,
    Signing,
    Unsigned,
    Verifier,
)

__all__ = ["read_signing"]

Key: TypeAlias = HmacKey | Ed25519Key | Ed25519PublicKey
_KINDS: dict[str, Callable[[str, bytes], Key]] = {
    "hmac-sha256": HmacKey,
    "ed25519": Ed25519Key,
    "ed25519-public": Ed25519PublicKey,
}


def read_signing(arguments: argparse.Namespace) -> Signing:
    """What ``--keys`` asks for; without it nothing is signed, and everyone is believed.

    Each line of the file is ``KIND KEY-ID HEX``. All keys are believed; the first that can sign
    signs what the verb writes.

    Raises:
        ConfigurationError: The file cannot be read, or holds something else than keys.
    """
    if arguments.keys is None:
        return UNSIGNED
    try:
        lines = Path(arguments.keys).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read the keys in {arguments.keys!r}: {error}", option="keys"
        ) from error
    keys = [_read_key(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    signers = [key for key in keys if not isinstance(key, Ed25519PublicKey)]
    trust = SignedBy(*map(_verifier, keys))
    return Signing(signers[0] if signers else Unsigned(), trust)


def _read_key(number: int, line: str) -> Key:
    try:
        kind, key_id, digits = line.split()
        return _KINDS[kind](key_id, bytes.fromhex(digits))
    except (ValueError, KeyError) as error:
        if isinstance(error, ConfigurationError):
            raise
        # The line itself is not shown: it may be a secret.
        raise ConfigurationError(
            f"line {number} of the keys is none; expected KIND KEY-ID HEX, where KIND is one of "
            f"{', '.join(_KINDS)}",
            option="keys",
        ) from None


def _verifier(key: Key) -> Verifier:
    return key.public_key if isinstance(key, Ed25519Key) else key
