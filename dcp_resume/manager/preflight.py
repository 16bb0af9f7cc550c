"""Ask, before the first step, whether the run could be saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import torch

from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manager.policies import KeepLast
from dcp_resume.manager.settings import Settings
from dcp_resume.manager.stateful import (
    bind_state,
    choose_state,
    declarations_of,
    optimizers_of,
    without_optimizers,
)
from dcp_resume.planning.state import describe_state
from dcp_resume.session.preflight import Need, PreflightReport, run_preflight
from dcp_resume.session.ranks import Ranks
from dcp_resume.storage import open_store

__all__ = ["preflight"]


def preflight(
    url: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    state: Mapping[str, Any] = MappingProxyType({}),
) -> PreflightReport:
    """Ask whether the run could be saved: rights, exclusive create, bytes, clock, space, ranks.

    Call it on every rank alike, before training begins. It opens no run and leaves no object
    behind; on a file system the root itself is made. Whatever storage refuses is in the report.

        >>> import tempfile
        >>> preflight(tempfile.mkdtemp()).require().is_ready
        True

    Args:
        url: Root of the run, as for ``CheckpointManager``.
        settings: Those of the run.
        state: What will be saved, for the size; an optimizer that has not stepped yet is taken to
            hold two tensors for each parameter.

    Returns:
        The report, the same on every rank; its ``require`` raises if a check failed.

    Raises:
        ConfigurationError: The URL or an option cannot work.
        StateError: The state cannot be saved as it is.
        RankErrors: A rank failed otherwise than by its storage.
        RankSilent: A rank did not answer by the deadline.
    """
    settings = settings or Settings()
    store = open_store(
        os.fspath(url), storage_options=settings.storage_options, retry=settings.retry
    )
    try:
        votes = Ranks().votes(step=0, deadline_s=settings.deadline_s)
        return run_preflight(store, votes, _need(settings, state), settings.signing)
    finally:
        store.close()


def _need(settings: Settings, state: Mapping[str, Any]) -> Need:
    chosen = choose_state(state, settings.save_optimizer_state) if state else {}
    sizes = dict(_leaf_sizes(settings, without_optimizers(chosen)))
    for key, optimizers in optimizers_of(chosen).items():
        sizes[key] = sum(map(_optimizer_bytes, optimizers))
    policy = settings.retention_policy
    return Need(
        checkpoint_bytes=sum(sizes.values()),
        num_kept=policy.count if isinstance(policy, KeepLast) else 0,
        names_digest=sha256("\0".join(sorted(sizes)).encode()).hexdigest(),
    )


def _leaf_sizes(settings: Settings, state: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """FQN → bytes of the whole tensor."""
    declarations = declarations_of(settings.declarations, state)
    for held in describe_state(bind_state(state).state_dict(), declarations).distinct_tensors():
        entry = held.entry
        yield entry.fqn, torch.Size(entry.global_shape).numel() * ITEMSIZES[entry.dtype]


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = [value for state in optimizer.state.values() for value in state.values()]
    tensors = held or 2 * parameters
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
