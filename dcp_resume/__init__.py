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
    from dcp_resume.manager.pending import PendingSave
    from dcp_resume.manager.preflight import preflight
    from dcp_resume.manager.rng import RngState
    from dcp_resume.manager.settings import SaveMode, Settings, WhenBusy
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
    from dcp_resume.storage.opening import open_store
    from dcp_resume.storage.retry import RetryPolicy
else:
    import importlib

    _HOMES = {
        "Anyone": "dcp_resume.manifest.signing",
        "Apply": "dcp_resume.session.targets",
        "CheckpointManager": "dcp_resume.manager.checkpoint_manager",
        "Declarations": "dcp_resume.planning.declarations",
        "Ed25519Key": "dcp_resume.manifest.signing",
        "Ed25519PublicKey": "dcp_resume.manifest.signing",
        "Flat": "dcp_resume.planning.declared",
        "HmacKey": "dcp_resume.manifest.signing",
        "LoadOptions": "dcp_resume.session.load",
        "LoadPlanner": "dcp_resume.planning.load_planner",
        "LoadReport": "dcp_resume.session.compare",
        "LoadResult": "dcp_resume.session.load",
        "Manifest": "dcp_resume.manifest.models",
        "Member": "dcp_resume.planning.declared",
        "MeshPlace": "dcp_resume.planning.mesh_place",
        "OptimizerState": "dcp_resume.manager.stateful",
        "Padding": "dcp_resume.planning.declared",
        "PendingSave": "dcp_resume.manager.pending",
        "PreflightReport": "dcp_resume.session.preflight",
        "Reader": "dcp_resume.session.dcp_reader",
        "ReportItem": "dcp_resume.manifest.report",
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
        "TrainerState": "dcp_resume.manager.trainer_state",
        "WhenBusy": "dcp_resume.manager.settings",
        "Writer": "dcp_resume.session.dcp_writer",
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
    "CheckpointManager",
    "Declarations",
    "Ed25519Key",
    "Ed25519PublicKey",
    "Flat",
    "HmacKey",
    "LoadOptions",
    "LoadPlanner",
    "LoadReport",
    "LoadResult",
    "Manifest",
    "Member",
    "MeshPlace",
    "OptimizerState",
    "Padding",
    "PendingSave",
    "PreflightReport",
    "Reader",
    "ReportItem",
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
    "TrainerState",
    "WhenBusy",
    "Writer",
    "errors",
    "events",
    "open_store",
    "preflight",
    "register_enum",
]
