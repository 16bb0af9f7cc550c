"""A signed run of several ranks: one algorithm for all, one refusal for all, at every door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcp_resume import (
    CheckpointManager,
    HmacKey,
    Reader,
    SaveMode,
    Settings,
    SignedBy,
    Signing,
    Writer,
    open_store,
)
from dcp_resume.errors import DcpResumeError, Untrusted
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.incarnation import forget_incarnations
from dcp_resume.session.verify import verify_checkpoint

pytestmark = pytest.mark.ranks

KEY = HmacKey("team", bytes(range(32)))
OTHER = HmacKey("team", bytes(32))
SIGNING = Signing(KEY, SignedBy(KEY))


def state(value: float) -> dict[str, Any]:
    return {"model": {f"layers.{dist.get_rank()}.w": torch.full((300, 100), value)}}


def settings(signing: Signing) -> Settings:
    return Settings(mode=SaveMode.BLOCKING, signing=signing, deadline_s=40)


def save_at_every_door(root: str) -> list[Any]:
    # Rank 1 was not told of the key: its blocks are digested as the coordinator says.
    own = SIGNING if dist.get_rank() == 0 else Signing()
    with CheckpointManager(f"{root}/manager", settings(own)) as checkpoints:
        checkpoints.save(1, state(1.0))
    writer = Writer(f"{root}/dcp", step=1, signing=SIGNING)
    dcp.save(state(1.0), storage_writer=writer)
    writer = Writer(f"{root}/store", step=1, votes="store", signing=SIGNING, deadline_s=40)
    dcp.save(state(1.0), storage_writer=writer, no_dist=True)
    dist.barrier()
    found: list[Any] = []
    for name in ("manager", "dcp", "store"):
        loaded = state(0.0)
        with CheckpointManager(f"{root}/{name}", settings(SIGNING)) as checkpoints:
            checkpoints.load(loaded)
        found.append(bool((next(iter(loaded["model"].values())) == 1).all()))
        with CheckpointManager(
            f"{root}/{name}", settings(Signing(trust=SignedBy(OTHER)))
        ) as checkpoints:
            try:
                checkpoints.load(loaded)
            except DcpResumeError as error:
                found.append(error)
    forget_incarnations()
    try:
        dcp.load(
            state(0.0),
            storage_reader=Reader(f"{root}/dcp", signing=Signing(OTHER, SignedBy(OTHER))),
        )
    except dcp.CheckpointException as error:
        found.append("Untrusted" in str(error))
    forget_incarnations()
    return found


def test_signed_at_every_door_and_refused_alike(ranks, tmp_path):
    for found in ranks.run(save_at_every_door, 2, str(tmp_path)):
        assert found[:6:2] == [True, True, True]
        assert all(isinstance(error, Untrusted) for error in found[1:6:2])
        assert found[6] is True
    for name in ("manager", "dcp", "store"):
        store = open_store(str(tmp_path / name))
        (located,) = find_checkpoints(store, "latest", SignedBy(KEY))
        assert verify_checkpoint(store, located, trust=SignedBy(KEY)).is_whole
