"""Atomic, verified, reshardable checkpoints for PyTorch training jobs that get preempted.

Public names are resolved on first use, so that ``import dcp_resume`` and
``import dcp_resume.manifest`` load neither torch nor a storage library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcp_resume import errors, events
    from dcp_resume.format.leaves import register_enum
    from dcp_resume.manager.checkpoint_manager import CheckpointManager
    from dcp_resume.manager.grace import WhenShort
    from dcp_resume.manager.notices import Notice
    from dcp_resume.manager.pending import PendingSave
    from dcp_resume.manager.policies import (
        Candidate,
        KeepAll,
        KeepBest,
        KeepEvery,
        KeepLast,
        KeepOnePer,
        KeepTagged,
        KeepYounger,
        RetentionPolicy,
    )
    from dcp_resume.manager.preemption import Preemption
    from dcp_resume.manager.preemption_settings import PreemptionSettings
    from dcp_resume.manager.preflight import preflight
    from dcp_resume.manager.rng import RngState
    from dcp_resume.manager.settings import SaveMode, Settings, WhenBusy
    from dcp_resume.manager.state_digests import digest_tensors
    from dcp_resume.manager.stateful import OptimizerState
    from dcp_resume.manager.trainer_state import TrainerState
    from dcp_resume.manifest.models import Manifest
    from dcp_resume.manifest.report import ReportItem, Severity
    from dcp_resume.manifest.signing import (
        Anyone,
        Ed25519Key,
        Ed25519PublicKey,
        HmacKey,
        SignedBy,
        Signing,
    )
    from dcp_resume.planning.declarations import Declarations
    from dcp_resume.planning.declared import Flat, Member, Padding, Segment, Split
    from dcp_resume.planning.load_planner import LoadPlanner
    from dcp_resume.planning.mesh_place import MeshPlace
    from dcp_resume.planning.save_planner import SavePlanner
    from dcp_resume.session.compare import LoadReport, Strictness
    from dcp_resume.session.dcp_reader import Reader
    from dcp_resume.session.dcp_writer import Writer
    from dcp_resume.session.load import LoadOptions, LoadResult
    from dcp_resume.session.preflight import PreflightReport
    from dcp_resume.session.save import SaveResult
    from dcp_resume.session.targets import Apply
    from dcp_resume.session.tensor_digests import Prove, TensorDigests
    from dcp_resume.session.unchanged import Unchanged
    from dcp_resume.storage.opening import open_store
    from dcp_resume.storage.retry import RetryPolicy
else:
    import importlib

    _HOMES = {
        "Anyone": "dcp_resume.manifest.signing",
        "Apply": "dcp_resume.session.targets",
        "Candidate": "dcp_resume.manager.policies",
        "CheckpointManager": "dcp_resume.manager.checkpoint_manager",
        "Declarations": "dcp_resume.planning.declarations",
        "Ed25519Key": "dcp_resume.manifest.signing",
        "Ed25519PublicKey": "dcp_resume.manifest.signing",
        "Flat": "dcp_resume.planning.declared",
        "HmacKey": "dcp_resume.manifest.signing",
        "KeepAll": "dcp_resume.manager.policies",
        "KeepBest": "dcp_resume.manager.policies",
        "KeepEvery": "dcp_resume.manager.policies",
        "KeepLast": "dcp_resume.manager.policies",
        "KeepOnePer": "dcp_resume.manager.policies",
        "KeepTagged": "dcp_resume.manager.policies",
        "KeepYounger": "dcp_resume.manager.policies",
        "LoadOptions": "dcp_resume.session.load",
        "LoadPlanner": "dcp_resume.planning.load_planner",
        "LoadReport": "dcp_resume.session.compare",
        "LoadResult": "dcp_resume.session.load",
        "Manifest": "dcp_resume.manifest.models",
        "Member": "dcp_resume.planning.declared",
        "MeshPlace": "dcp_resume.planning.mesh_place",
        "Notice": "dcp_resume.manager.notices",
        "OptimizerState": "dcp_resume.manager.stateful",
        "Padding": "dcp_resume.planning.declared",
        "PendingSave": "dcp_resume.manager.pending",
        "Preemption": "dcp_resume.manager.preemption",
        "PreemptionSettings": "dcp_resume.manager.preemption_settings",
        "PreflightReport": "dcp_resume.session.preflight",
        "Prove": "dcp_resume.session.tensor_digests",
        "Reader": "dcp_resume.session.dcp_reader",
        "ReportItem": "dcp_resume.manifest.report",
        "RetentionPolicy": "dcp_resume.manager.policies",
        "RetryPolicy": "dcp_resume.storage.retry",
        "RngState": "dcp_resume.manager.rng",
        "SaveMode": "dcp_resume.manager.settings",
        "SavePlanner": "dcp_resume.planning.save_planner",
        "SaveResult": "dcp_resume.session.save",
        "Segment": "dcp_resume.planning.declared",
        "Settings": "dcp_resume.manager.settings",
        "Severity": "dcp_resume.manifest.report",
        "SignedBy": "dcp_resume.manifest.signing",
        "Signing": "dcp_resume.manifest.signing",
        "Split": "dcp_resume.planning.declared",
        "Strictness": "dcp_resume.session.compare",
        "TensorDigests": "dcp_resume.session.tensor_digests",
        "TrainerState": "dcp_resume.manager.trainer_state",
        "Unchanged": "dcp_resume.session.unchanged",
        "WhenBusy": "dcp_resume.manager.settings",
        "WhenShort": "dcp_resume.manager.grace",
        "Writer": "dcp_resume.session.dcp_writer",
        "digest_tensors": "dcp_resume.manager.state_digests",
        "errors": "dcp_resume.errors",
        "events": "dcp_resume.events",
        "open_store": "dcp_resume.storage.opening",
        "preflight": "dcp_resume.manager.preflight",
        "register_enum": "dcp_resume.format.leaves",
    }

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'dcp_resume' has no attribute {name!r}")
        module = importlib.import_module(home)
        return module if home == f"{__name__}.{name}" else getattr(module, name)


__all__ = [
    "Anyone",
    "Apply",
    "Candidate",
    "CheckpointManager",
    "Declarations",
    "Ed25519Key",
    "Ed25519PublicKey",
    "Flat",
    "HmacKey",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepOnePer",
    "KeepTagged",
    "KeepYounger",
    "LoadOptions",
    "LoadPlanner",
    "LoadReport",
    "LoadResult",
    "Manifest",
    "Member",
    "MeshPlace",
    "Notice",
    "OptimizerState",
    "Padding",
    "PendingSave",
    "Preemption",
    "PreemptionSettings",
    "PreflightReport",
    "Prove",
    "Reader",
    "ReportItem",
    "RetentionPolicy",
    "RetryPolicy",
    "RngState",
    "SaveMode",
    "SavePlanner",
    "SaveResult",
    "Segment",
    "Settings",
    "Severity",
    "SignedBy",
    "Signing",
    "Split",
    "Strictness",
    "TensorDigests",
    "TrainerState",
    "Unchanged",
    "WhenBusy",
    "WhenShort",
    "Writer",
    "digest_tensors",
    "errors",
    "events",
    "open_store",
    "preflight",
    "register_enum",
]
