"""Who signs what a run writes, and whose documents are believed.

A signature is over the purpose of the document (the key of a log record, ``manifest.json``) and
every byte of it. ``docs/explanation/threat-model.md`` says what it proves, and what it does not.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Protocol

from dcp_resume.errors import ConfigurationError, Problem, Untrusted
from dcp_resume.manifest.models import DigestName
from dcp_resume.manifest.seals import Signature, find_seal

__all__ = [
    "ANYONE",
    "UNSIGNED",
    "Anyone",
    "Ed25519Key",
    "Ed25519PublicKey",
    "HmacKey",
    "SignedBy",
    "Signer",
    "Signing",
    "Trust",
    "Unsigned",
    "Verifier",
]

_KEY_ID = re.compile(r"[a-z0-9._-]{1,64}")
_MIN_SECRET_BYTES = 16


class Signer(Protocol):
    """Signs documents."""

    def sign(self, message: bytes) -> Signature | None:
        """The signature of a message; None from ``Unsigned`` alone."""


class Verifier(Protocol):
    """Knows one key's signatures."""

    @property
    def key_id(self) -> str:
        """Name of the key, which signatures carry."""

    @property
    def scheme(self) -> str:
        """Name of the algorithm, which signatures carry."""

    def is_genuine(self, message: bytes, signature: bytes) -> bool:
        """Whether the key's owner signed the message."""


@dataclass(frozen=True, slots=True)
class Unsigned:
    """Documents are written without signatures."""

    def sign(self, message: bytes) -> Signature | None:
        """See ``Signer.sign``."""
        del message
        return None


@dataclass(frozen=True, slots=True)
class HmacKey:
    """A secret that the writers and the readers of a run share; whoever can read can sign.

    Raises:
        ConfigurationError: A key id that is no name, or a secret of fewer than 16 bytes.
    """

    key_id: str
    """Name of the key, 1 to 64 of ``[a-z0-9._-]``."""
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_key_id(self.key_id)
        if len(self.secret) < _MIN_SECRET_BYTES:
            raise ConfigurationError(
                f"the secret of key {self.key_id!r} has {len(self.secret)} bytes; expected at "
                f"least {_MIN_SECRET_BYTES}. Take secrets.token_bytes(32)",
                option="secret",
            )

    @property
    def scheme(self) -> str:
        """See ``Verifier.scheme``."""
        return "hmac-sha256"

    @classmethod
    def generate(cls, key_id: str) -> HmacKey:
        """A new random key."""
        return cls(key_id, secrets.token_bytes(32))

    def sign(self, message: bytes) -> Signature | None:
        """See ``Signer.sign``."""
        return Signature(self.scheme, self.key_id, hmac.digest(self.secret, message, "sha256"))

    def is_genuine(self, message: bytes, signature: bytes) -> bool:
        """See ``Verifier.is_genuine``."""
        return hmac.compare_digest(hmac.digest(self.secret, message, "sha256"), signature)


@dataclass(frozen=True, slots=True)
class Ed25519PublicKey:
    """Proves what the owner of an ``Ed25519Key`` signed, and cannot sign; needs ``cryptography``.

    Raises:
        ConfigurationError: A key id that is no name, other than 32 bytes, or the package is
            missing.
    """

    key_id: str
    """Name of the key, 1 to 64 of ``[a-z0-9._-]``."""
    public_bytes: bytes
    """32 bytes."""

    def __post_init__(self) -> None:
        _check_key_id(self.key_id)
        _check_ed25519(self.key_id, self.public_bytes)

    @property
    def scheme(self) -> str:
        """See ``Verifier.scheme``."""
        return "ed25519"

    def is_genuine(self, message: bytes, signature: bytes) -> bool:
        """See ``Verifier.is_genuine``."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519

        try:
            key = ed25519.Ed25519PublicKey.from_public_bytes(self.public_bytes)
            key.verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class Ed25519Key:
    """Signs for readers who hold only its ``public_key``; needs ``cryptography``.

    Raises:
        ConfigurationError: A key id that is no name, other than 32 bytes, or the package is
            missing.
    """

    key_id: str
    """Name of the key, 1 to 64 of ``[a-z0-9._-]``."""
    private_bytes: bytes = field(repr=False)
    """32 bytes."""

    def __post_init__(self) -> None:
        _check_key_id(self.key_id)
        _check_ed25519(self.key_id, self.private_bytes)

    @classmethod
    def generate(cls, key_id: str) -> Ed25519Key:
        """A new random key."""
        return cls(key_id, secrets.token_bytes(32))

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What readers need."""
        from cryptography.hazmat.primitives.asymmetric import ed25519

        private = ed25519.Ed25519PrivateKey.from_private_bytes(self.private_bytes)
        return Ed25519PublicKey(self.key_id, private.public_key().public_bytes_raw())

    def sign(self, message: bytes) -> Signature | None:
        """See ``Signer.sign``."""
        from cryptography.hazmat.primitives.asymmetric import ed25519

        private = ed25519.Ed25519PrivateKey.from_private_bytes(self.private_bytes)
        return Signature("ed25519", self.key_id, private.sign(message))


class Trust(Protocol):
    """Whose documents are believed."""

    @property
    def is_strict(self) -> bool:
        """Whether a signature is asked for."""

    def check(self, data: bytes, purpose: str, where: str) -> None:
        """Prove the origin of a document, before anything in it is believed or even parsed.

        Args:
            data: The document, with its seal.
            purpose: What it must have been signed as.
            where: Its key, for messages.

        Raises:
            Untrusted: It is not signed as asked.
        """


@dataclass(frozen=True, slots=True)
class Anyone:
    """Documents are believed without a signature: their digests prove against accidents alone."""

    @property
    def is_strict(self) -> bool:
        """See ``Trust.is_strict``."""
        return False

    def check(self, data: bytes, purpose: str, where: str) -> None:
        """See ``Trust.check``; accepts everything."""


@dataclass(frozen=True, slots=True, init=False)
class SignedBy:
    """Documents are believed only if one of these keys signed them.

    Raises:
        ConfigurationError: No key, or two of one id.
    """

    keys: tuple[Verifier, ...]

    def __init__(self, *keys: Verifier) -> None:
        object.__setattr__(self, "keys", keys)
        if not keys or len({key.key_id for key in keys}) < len(keys):
            raise ConfigurationError(
                f"expected at least one key, each with an id of its own, got "
                f"{[key.key_id for key in keys]}",
                option="keys",
            )

    @property
    def is_strict(self) -> bool:
        """See ``Trust.is_strict``."""
        return True

    def check(self, data: bytes, purpose: str, where: str) -> None:
        """See ``Trust.check``.

        Raises:
            Untrusted: It is not signed, or not by one of the keys for this purpose.
        """
        found = find_seal(data)
        signature = found.signature if found else None
        if found is None or signature is None:
            raise _untrusted(where, "unsigned", "it is not signed")
        claimed = (signature.scheme, signature.key_id)
        key = next((key for key in self.keys if (key.scheme, key.key_id) == claimed), None)
        if key is None:
            known = ", ".join(f"{key.scheme}:{key.key_id}" for key in self.keys)
            message = f"expected a signature of {known}, found one of {':'.join(claimed)}"
            raise _untrusted(where, "unknown_key", message)
        if not key.is_genuine(message_of(purpose, found.body), signature.value):
            message = f"the signature of {':'.join(claimed)} is not over these bytes as {purpose!r}"
            raise _untrusted(where, "forged", message)


ANYONE = Anyone()


@dataclass(frozen=True, slots=True)
class Signing:
    """How the documents of a run are signed, and whose are believed."""

    signer: Signer = Unsigned()
    trust: Trust = ANYONE

    @property
    def digest_algorithm(self) -> DigestName:
        """Of all digests in what is written: a signature over weak digests proves nothing."""
        return "xxh3-128" if isinstance(self.signer, Unsigned) else "sha256-128"

    def sign(self, purpose: str, body: bytes) -> Signature | None:
        """Sign a document's bytes as what they are for."""
        return self.signer.sign(message_of(purpose, body))


UNSIGNED = Signing()
"""Nothing is signed, and everyone is believed."""


def message_of(purpose: str, body: bytes) -> bytes:
    """What is signed; the first line keeps signatures of other protocols apart."""
    return b"dcp_resume 1\n%s\n%s" % (purpose.encode(), body)


def _untrusted(where: str, kind: str, message: str) -> Untrusted:
    problem = Problem(where, kind, message)
    return Untrusted(
        f"cannot trust {where}: {message}. Find out who wrote it; load with the key that signed "
        "it, or, if origins do not matter, with trust=Anyone()",
        problems=(problem,),
    )


def _check_key_id(key_id: str) -> None:
    if not _KEY_ID.fullmatch(key_id):
        raise ConfigurationError(
            f"a key id has 1 to 64 of [a-z0-9._-], got {key_id!r:.80}", option="key_id"
        )


def _check_ed25519(key_id: str, data: bytes) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            "Ed25519 keys need the package cryptography; pip install 'dcp-resume[signing]'",
            option="key",
        ) from error
    if len(data) != 32:
        raise ConfigurationError(
            f"expected the 32 raw bytes of Ed25519 key {key_id!r}, got {len(data)}", option="key"
        )
