"""Every error this library raises on purpose.

    DcpResumeError
    ├── ConfigurationError (ValueError)        an option or argument that cannot work
    ├── StorageError (OSError)                 the store refused or failed
    │   ├── KeyNotFound (FileNotFoundError)    nothing lies under the key
    │   ├── KeyExists (FileExistsError)        an exclusive create found the key taken
    │   ├── OutcomeUnknown                     the answer to an exclusive create was lost
    │   ├── StorageDenied (PermissionError)    credentials or rights do not suffice
    │   ├── StorageFull                        no space or quota left
    │   ├── StorageUnavailable                 a transient fault outlived the deadline
    │   ├── ShortRead                          fewer bytes came back than were asked for
    │   └── UnsupportedStore                   the store lacks a primitive that the commit needs
    ├── InvalidCheckpoint (ValueError)         what lies on storage contradicts itself
    │   ├── InvalidDocument                    a log record, manifest, catalog or index is malformed
    │   ├── UnsupportedFormat                  written by a newer or different format
    │   ├── Untrusted                          not signed by whom the policy trusts
    │   ├── CorruptData                        a block's bytes do not have the recorded digest
    │   └── MissingAncestors                   files of ancestor checkpoints are not at hand
    ├── PreflightFailed                        no save would work here yet
    ├── CheckpointNotFound (LookupError)       no committed checkpoint answers the request
    ├── StateError (ValueError)                the state handed in cannot be saved as it is
    │   ├── UnsupportedLeaf                    a leaf of a type or dtype that is never pickled
    │   ├── DuplicateFqn                       two leaves share one name
    │   ├── ReplicaMismatch                    assumed replicas hold different values
    │   └── IncompletePlan                     the ranks' plans do not tile every tensor
    ├── LoadError                              a load did not happen, or not wholly
    │   ├── LoadRefused                        it does not fit the state; nothing was changed
    │   ├── DamageDisputed                     a rank found damage that another does not find
    │   ├── PartialLoad                        some tensors were written before a block failed
    │   └── TensorMismatch                     tensors were loaded that are not those saved
    ├── SaveError                              a save did not commit
    │   ├── RankErrors                         one or more ranks failed; each with its cause
    │   ├── RankSilent                         one or more ranks did not report by the deadline
    │   ├── StoreNotShared                     ranks see different stores under one URL
    │   ├── CommitRefused                      the log holds a record that forbids this commit
    │   │   └── ParentRetired                  a checkpoint that this one refers to was retired
    │   ├── CommitUnknown                      the commit's outcome could not be learned in time
    │   └── SaveInProgress                     a save is running and the policy is to refuse
    ├── InteropError                           a checkpoint of another format, read or written
    │   ├── ForeignFormat                      it is not of the format that was asked for, or none
    │   ├── ForeignDamage                      it contradicts itself, or leads out of its place
    │   ├── Unheld                             the target's format cannot hold part of the state
    │   └── ExportMismatch                     what was exported does not read back as it was
    ├── RetireRefused                          the run or its policy still needs the checkpoint
    ├── Fenced                                 a newer incarnation of the run has opened the log
    ├── RunMismatch                            two different runs share one root
    └── LegFailed                              a training of a proof did not do its part

Each class says what failed, on which object, what was expected and found, and what to do. The
facts are attributes too (``error.key``, ``error.rank``), and survive ``pickle``, because DCP's
collectives carry exceptions between ranks that way.
"""

from __future__ import annotations

from collections.abc import Mapping

from dcp_resume.error_facts import DcpResumeError
from dcp_resume.problems import Problem

__all__ = [
    "CheckpointNotFound",
    "CommitRefused",
    "CommitUnknown",
    "ConfigurationError",
    "CorruptData",
    "DamageDisputed",
    "DcpResumeError",
    "DuplicateFqn",
    "ExportMismatch",
    "Fenced",
    "ForeignDamage",
    "ForeignFormat",
    "IncompletePlan",
    "InteropError",
    "InvalidCheckpoint",
    "InvalidDocument",
    "KeyExists",
    "KeyNotFound",
    "LegFailed",
    "LoadError",
    "LoadRefused",
    "MissingAncestors",
    "OutcomeUnknown",
    "ParentRetired",
    "PartialLoad",
    "PreflightFailed",
    "Problem",
    "RankErrors",
    "RankSilent",
    "ReplicaMismatch",
    "RetireRefused",
    "RunMismatch",
    "SaveError",
    "SaveInProgress",
    "ShortRead",
    "StateError",
    "StorageDenied",
    "StorageError",
    "StorageFull",
    "StorageUnavailable",
    "StoreNotShared",
    "TensorMismatch",
    "Unheld",
    "UnsupportedFormat",
    "UnsupportedLeaf",
    "UnsupportedStore",
    "Untrusted",
]


class ConfigurationError(DcpResumeError, ValueError):
    """An option or argument that cannot work; raised before anything is touched."""

    option: str
    """Name of the option as the caller wrote it."""


class StorageError(DcpResumeError, OSError):
    """The store refused or failed an operation."""

    url: str
    """Root of the store, without credentials."""
    key: str
    """Key under the root; empty where the store as a whole is meant."""


class KeyNotFound(StorageError, FileNotFoundError):
    """Nothing lies under the key."""


class KeyExists(StorageError, FileExistsError):
    """An exclusive create found the key taken."""


class OutcomeUnknown(StorageError):
    """The answer to an exclusive create was lost: the key may or may not have been created.

    Resolve it by repeating the same create with the same bytes until it answers.
    """


class StorageDenied(StorageError, PermissionError):
    """Credentials are missing, wrong or expired, or do not allow the operation."""


class StorageFull(StorageError):
    """No space or quota is left."""


class StorageUnavailable(StorageError):
    """A transient fault (time-out, throttling, reset) outlived the deadline."""

    attempts: int
    """How often the operation was tried."""


class ShortRead(StorageError):
    """Fewer bytes came back than were asked for."""

    expected_bytes: int
    found_bytes: int


class UnsupportedStore(StorageError):
    """The store lacks a primitive that the commit protocol needs, such as an exclusive create."""


class InvalidCheckpoint(DcpResumeError, ValueError):
    """What lies on storage contradicts itself or its digests."""

    problems: tuple[Problem, ...]
    """Every fault found, not only the first."""


class InvalidDocument(InvalidCheckpoint):
    """A log record, manifest, catalog or chunk index is malformed."""


class UnsupportedFormat(InvalidCheckpoint):
    """The document was written by a newer format or needs a feature this reader lacks."""


class Untrusted(InvalidCheckpoint):
    """A document is not signed by a key that the policy trusts; nothing in it was believed."""


class CorruptData(InvalidCheckpoint):
    """A block's bytes do not have the digest that was recorded when they were saved."""


class MissingAncestors(InvalidCheckpoint):
    """The checkpoint refers to files of ancestor checkpoints that are not at hand."""


class PreflightFailed(DcpResumeError):
    """No save would work here yet: the store, the rights, or what the ranks see."""

    problems: tuple[Problem, ...]
    """Every check that failed, with what to do."""


class CheckpointNotFound(DcpResumeError, LookupError):
    """No committed checkpoint answers the request."""

    url: str
    request: str
    """What was asked for: ``latest``, ``best`` or a step."""


class StateError(DcpResumeError, ValueError):
    """The state handed in cannot be saved as it is."""

    problems: tuple[Problem, ...]


class UnsupportedLeaf(StateError):
    """A leaf of a type or dtype that this format never stores, because it would need pickle."""


class DuplicateFqn(StateError):
    """Two leaves share one name."""


class ReplicaMismatch(StateError):
    """Tensors taken for replicas hold different values on different ranks."""


class IncompletePlan(StateError):
    """The ranks' plans do not tile every tensor: a hole, an overlap, or contradicting shapes."""


class LoadError(DcpResumeError):
    """A load did not happen, or not wholly."""


class LoadRefused(LoadError):
    """The checkpoint does not fit the state; nothing was changed."""

    problems: tuple[Problem, ...]


class DamageDisputed(LoadError):
    """A rank found the checkpoint damaged, and another finds it whole: nothing was given up.

    Its host is at fault, or its mount: an older checkpoint would lose steps for nothing.
    """

    step: int
    ranks: tuple[int, ...]
    """Ranks that looked again and found it whole."""
    written_fqns: tuple[str, ...]
    """Tensors whose memory was changed, wholly or in part."""
    problems: tuple[Problem, ...]
    """What was found wrong at first."""


class PartialLoad(LoadError):
    """Some tensors were already written when a block failed, and no older checkpoint helps."""

    written_fqns: tuple[str, ...]
    """Tensors whose memory was changed, wholly or in part."""
    problems: tuple[Problem, ...]


class TensorMismatch(LoadError):
    """Loaded tensors, in the ranks' memory, do not have the digests that were recorded at save."""

    step: int
    problems: tuple[Problem, ...]
    expected: Mapping[str, str]
    """FQN → digest recorded at save, 32 hex digits."""
    found: Mapping[str, str]
    """FQN → digest in memory; not of tensors of which ranks hold different copies."""


class SaveError(DcpResumeError):
    """A save did not commit; the previous checkpoint is still the newest."""

    step: int


class RankErrors(SaveError):
    """One or more ranks failed; the save failed on every rank."""

    errors: Mapping[int, str]
    """Rank → its error, as ``Type: message``."""


class RankSilent(SaveError):
    """One or more ranks did not report by the deadline (dead, hung or cut off)."""

    ranks: tuple[int, ...]
    phase: str
    """The numbered step in which they were missed."""


class StoreNotShared(SaveError):
    """Ranks see different stores under one URL, such as node-local directories."""

    ranks: tuple[int, ...]
    """Ranks whose files the coordinator cannot see."""


class CommitRefused(SaveError):
    """The log holds a record that forbids this commit."""


class ParentRetired(CommitRefused):
    """A checkpoint that this one refers to was retired between planning and commit."""

    parent: int
    """Log number of the retired commit."""


class CommitUnknown(SaveError):
    """The commit's outcome could not be learned before the deadline; its files are kept."""

    attempt: str


class SaveInProgress(SaveError):
    """A save is still running and the policy is to refuse a second one."""

    running_step: int


class InteropError(DcpResumeError):
    """A checkpoint of another format could not be read or written; nothing was committed."""

    url: str
    """The foreign file or directory."""
    problems: tuple[Problem, ...]


class ForeignFormat(InteropError):
    """What lies there is not of the format that was asked for, or of none that is known."""


class ForeignDamage(InteropError):
    """The foreign checkpoint contradicts itself, is cut short, or names what is outside of it."""


class Unheld(InteropError):
    """The target cannot hold part of the state, and the policy is to refuse."""


class ExportMismatch(InteropError):
    """What was exported does not read back bit for bit; it was not published."""


class RetireRefused(DcpResumeError):
    """The run, or its retention policy, still needs the checkpoint: nothing was retired."""

    target: int
    """Log number of its commit."""
    step: int


class Fenced(DcpResumeError):
    """A newer incarnation of the run has opened the log: this process may never commit again."""

    generation: int
    """Our generation."""
    found_generation: int
    """The generation that fenced us."""


class RunMismatch(DcpResumeError):
    """Two different runs share one root."""

    expected: str
    found: str


class LegFailed(DcpResumeError):
    """A training that a proof of a resume ran did not do its part, so nothing is proved."""

    leg: str
    """Which one: ``straight``, ``stopped`` or ``resumed``."""
    returncode: int
    """Exit status of its command; negative for a signal; 0 where it ended well, and yet did not
    save or resume as the proof needs."""
    output: str
    """File that holds all that it said."""
