"""Load one located checkpoint into what a trainer holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from dcp_resume.manager.arrangement import arrangement_differences
from dcp_resume.manager.choosing import uncovered
from dcp_resume.manager.drift import fact_differences
from dcp_resume.manager.optimizers import StoredPart
from dcp_resume.manager.settings import Settings
from dcp_resume.manager.stateful import (
    Bound,
    OptimizerState,
    bind_state,
    declarations_of,
    without_optimizers,
)
from dcp_resume.manifest.models import PathKey, TensorEntry
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.state import LocalState, describe_state
from dcp_resume.planning.ties import Ties
from dcp_resume.session.documents import Facts
from dcp_resume.session.load import LoadOptions, LoadResult, LoadSession
from dcp_resume.session.located import Located
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.plan_memory import PlanMemory
from dcp_resume.session.votes import Votes
from dcp_resume.storage import ObjectStore

__all__ = ["load_located"]


def load_located(
    store: ObjectStore,
    votes: Votes,
    located: Located,
    state: Mapping[str, Any],
    options: LoadOptions,
    settings: Settings,
    facts: Facts,
    memory: PlanMemory,
    changed: Collection[str] = (),
) -> LoadResult:
    """Open, compare, read, and hand the values to the trainer's objects.

    Args:
        store: Root of the run.
        votes: This load's rounds.
        located: The checkpoint.
        state: What the trainer holds.
        options: How strictly to load.
        settings: Of the manager.
        facts: What the trainer says of itself now.
        memory: Of the manager's plans.
        changed: Tensors that a damaged checkpoint changed; this one must hold them.

    Raises:
        LoadRefused: It does not fit the state; nothing changed.
        InvalidCheckpoint: It is damaged, and no tensor changed.
        PartialLoad: It is damaged, and tensors had changed.
        TensorMismatch: Asked to prove tensors, and some are not as they were saved.
        RankErrors: A rank's state cannot be described.
        RankSilent: A rank did not answer by the deadline.
        StorageError: The store failed.
    """
    session = LoadSession(store, votes, located, options, settings.signing.trust)
    session.open()
    opened = session.opened
    lost = set(changed) - set(opened.tensor_ids)
    if lost:
        raise uncovered(lost, f"step {opened.manifest.step}, which is whole, does not hold them")
    wanted = state
    if settings.load_optimizer_state is OptimizerState.LEFT_OUT:
        wanted = without_optimizers(state)
        session.options = _without_parts(options, opened, set(opened.manifest.optimizer))
    bounds: list[Bound] = []

    def describe() -> LocalState:
        bound = bind_state(wanted, options.parts)
        bounds.append(bound)
        declarations = declarations_of(settings.declarations, wanted)
        targets = bound.targets(_stored(session, declarations))
        return describe_state(targets, declarations, memory.outline)

    def differences(opened: OpenedCheckpoint, values: Mapping[str, object]) -> Iterable[ReportItem]:
        yield from bounds[0].differences(values, _paths(session.state))
        yield from fact_differences(opened.manifest, facts)
        yield from arrangement_differences(
            opened.manifest.topology,
            _layers(opened.catalog.tensors),
            session.state.meshes,
            _layers(held.entry for held in session.state.tensors),
            facts.virtual_stages if votes.world_size > 1 else 1,
        )
        if settings.load_optimizer_state is OptimizerState.REQUIRED:
            yield from _absent_optimizers(opened, wanted)

    try:
        report = session.compare(describe, differences)
        result = session.read(report)
    except Exception:
        for bound in bounds:
            bound.undo()
        raise
    derived = {item.where for item in report.items if item.kind == "rng"}
    bounds[0].apply(result.values, _paths(session.state), derived=derived, step=result.step)
    return result


def _layers(tensors: Iterable[TensorEntry]) -> set[int]:
    return {entry.layer for entry in tensors if entry.layer is not None}


def _paths(state: LocalState) -> dict[str, Any]:
    leaves = {**state.values, **state.per_rank_values}
    return {fqn: path for fqn, (path, _) in leaves.items()}


def _stored(session: LoadSession, declarations: Declarations) -> Callable[[str], StoredPart]:
    """What the checkpoint holds below a key, for those who make room for it.

    What is stored under one of several tied names is there under each of them.
    """
    tensors = session.opened.catalog.tensors
    ties = Ties(declarations.ties, [entry.fqn for entry in tensors])

    def below(key: str) -> StoredPart:
        own = {e.path[1:]: e for e in tensors if e.path[0] == key and e.path[1:]}
        values = [tuple(p[1:]) for p, _ in session.values.values() if p[0] == key and p[1:]]
        shapes = {
            str(path[0]): e.global_shape
            for e in tensors
            if e.path[0] != key and len(e.path) == 2
            for path in _tied_paths(str(e.path[0]), e.path[1:], ties)
        }
        tied = {path: e for p, e in own.items() for path in _tied_paths(key, p, ties)}
        return StoredPart(
            tensors={**tied, **own},
            values=[path for p in values for path in _tied_paths(key, p, ties)],
            shapes=shapes,
        )

    return below


def _tied_paths(key: str, path: tuple[PathKey, ...], ties: Ties) -> list[tuple[PathKey, ...]]:
    """Every key path below ``key`` under which a leaf may be asked for."""
    head, *rest = path
    if not isinstance(head, str):
        return [path]
    return [(name.removeprefix(f"{key}."), *rest) for name in ties.names(f"{key}.{head}")]


def _without_parts(
    options: LoadOptions, opened: OpenedCheckpoint, parts: Collection[str]
) -> LoadOptions:
    asked = options.parts if options.parts is not None else tuple(opened.manifest.parts)
    return replace(options, parts=tuple(part for part in asked if part not in parts))


def _absent_optimizers(opened: OpenedCheckpoint, state: Mapping[str, Any]) -> Iterable[ReportItem]:
    """Optimizer state that was required and is not there, on either side."""
    if len(without_optimizers(state)) == len(state):
        message = "load_optimizer_state is REQUIRED, and the state has no optimizer; put it in"
        yield ReportItem(Severity.REFUSE, "missing", "optimizer", message)
    elif not opened.manifest.optimizer:
        message = (
            "load_optimizer_state is REQUIRED, and the checkpoint was saved without an optimizer; "
            "set it to LEFT_OUT to begin with fresh moments"
        )
        yield ReportItem(Severity.REFUSE, "missing", "optimizer", message)
