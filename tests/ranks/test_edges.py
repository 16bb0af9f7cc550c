"""Corners of several ranks: what one rank lacks, empty shards, a rank that leaves, both doors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_resume import (
    CheckpointManager,
    Declarations,
    LoadOptions,
    SaveMode,
    Settings,
    Strictness,
    Writer,
)
from dcp_resume.errors import IncompletePlan, LoadRefused, RankErrors
from dcp_resume.session.incarnation import forget_incarnations
from dcp_resume.session.ranks import Ranks

pytestmark = pytest.mark.ranks

DEADLINE_S = 40.0


def settings(**options: Any) -> Settings:
    return Settings(mode=SaveMode.BLOCKING, deadline_s=DEADLINE_S, **options)


def raised(action: Callable[[], object]) -> BaseException | None:
    """What an action raises; fails if it took until the deadline."""
    started = time.monotonic()
    try:
        action()
    except BaseException as error:
        assert time.monotonic() - started < DEADLINE_S / 2
        return error
    return None


def shard_what_is_empty(root: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    empty = distribute_tensor(torch.empty(4, 0), mesh, [Shard(0)])
    with CheckpointManager(root, settings()) as checkpoints:
        checkpoints.save(1, {"m": {"empty": empty, "w": torch.ones(2)}})
        found = {"m": {"empty": empty, "w": torch.zeros(2)}}
        return [checkpoints.load(found).step, found["m"]["w"].tolist()]


def test_an_empty_tensor_that_is_sharded(ranks, tmp_path):
    assert ranks.run(shard_what_is_empty, 2, str(tmp_path)) == [[1, [1.0, 1.0]]] * 2


def tie_with_an_empty_shard(root: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (4,))
    embed = distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)])
    with CheckpointManager(root, settings()) as checkpoints:
        checkpoints.save(1, {"m": {"embed": embed, "head": embed}})
        expected = embed.full_tensor()
        embed.to_local().zero_()
        report = checkpoints.load({"m": {"embed": embed, "head": embed}}).report
        return [torch.equal(embed.full_tensor(), expected), len(report.items)]


def test_tied_weights_are_stored_once_though_a_rank_has_nothing_of_them(ranks, tmp_path):
    assert ranks.run(tie_with_an_empty_shard, 4, str(tmp_path)) == [[True, 0]] * 4

    (catalog,) = tmp_path.glob("step-*/*/catalog.json")
    entries = {entry["fqn"]: entry for entry in json.loads(catalog.read_bytes())["tensors"]}
    assert entries["m.head"]["alias_of"] == "m.embed"
    assert entries["m.embed"]["alias_of"] is None


def save_contradictory_shards(root: str) -> BaseException | None:
    """Rank 0 holds the upper rows, rank 1 the right columns: as many elements as the tensor has."""
    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    local = torch.ones(2, 4) if rank == 0 else torch.ones(4, 2)
    tensor = DTensor.from_local(local, mesh, [Shard(rank)], run_check=False)
    with CheckpointManager(root, settings()) as checkpoints:
        error = raised(lambda: checkpoints.save(1, {"m": {"w": tensor}}))
        assert checkpoints.steps() == []
        return error


def test_shards_that_no_reader_could_put_together_are_not_committed(ranks, tmp_path):
    for error in ranks.run(save_contradictory_shards, 2, str(tmp_path)):
        assert isinstance(error, IncompletePlan)
        assert {problem.where for problem in error.problems} == {"m.w"}


def load_what_rank_1_did_not_save(root: str, strictness: Strictness) -> Any:
    declarations = Declarations(per_rank=("a.x",))
    options = settings(declarations=declarations, load=LoadOptions(strictness=strictness))
    with CheckpointManager(root, options) as checkpoints:
        own = {"x": torch.ones(2)} if dist.get_rank() == 0 else {"y": torch.ones(2)}
        checkpoints.save(1, {"a": own})
        state = {"a": {"x": torch.zeros(2), "y": torch.zeros(2)}}
        error = raised(lambda: checkpoints.load(state))
        return [error, state["a"]["x"].tolist(), state["a"]["y"].tolist()]


def test_a_per_rank_tensor_that_this_rank_never_saved_is_missing(ranks, tmp_path):
    found = ranks.run(load_what_rank_1_did_not_save, 2, str(tmp_path / "a"), Strictness.RAISE)
    for error, x, y in found:
        assert isinstance(error, LoadRefused)
        assert [(p.where, p.kind) for p in error.problems] == [("a.x", "missing")]
        assert x == y == [0.0, 0.0]

    found = ranks.run(load_what_rank_1_did_not_save, 2, str(tmp_path / "b"), Strictness.WARN)
    assert found == [[None, [1.0, 1.0], [1.0, 1.0]], [None, [0.0, 0.0], [1.0, 1.0]]]


def save_from_a_rank_that_lacks_it(root: str) -> BaseException | None:
    declared = settings(declarations=Declarations(from_rank={"a.x": 1}))
    with CheckpointManager(root, declared) as checkpoints:
        own = {"x": 5} if dist.get_rank() == 0 else {"y": 6}
        return raised(lambda: checkpoints.save(1, {"a": own, "w": torch.ones(2)}))


def test_from_rank_of_a_rank_that_lacks_the_value(ranks, tmp_path):
    for error in ranks.run(save_from_a_rank_that_lacks_it, 2, str(tmp_path)):
        assert isinstance(error, IncompletePlan)
        assert [problem.where for problem in error.problems] == ["a.x"]


class Leaving:
    """A Stateful during which one rank is told to go."""

    def __init__(self, rank: int, error: type[BaseException]) -> None:
        self.rank, self.error = rank, error

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == self.rank:
            raise self.error("told to go")
        return {"a": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        del state_dict


def leave_in_a_save(root: str, rank: int, error: type[BaseException]) -> str:
    with CheckpointManager(root, settings()) as checkpoints:
        state = {"leaving": Leaving(rank, error), "w": torch.ones(2)}
        found = raised(lambda: checkpoints.save(1, state))
    return f"{type(found).__name__}: {found}"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_rank_that_leaves_is_named_at_once(ranks, tmp_path, rank, error):
    found = ranks.run(leave_in_a_save, 2, str(tmp_path), rank, error)

    assert found[rank] == f"{error.__name__}: told to go"
    assert found[1 - rank].startswith("RankErrors: ")
    assert f"rank {rank}: {error.__name__}: told to go" in found[1 - rank]


class Surrogate:
    """A Stateful whose error has no UTF-8, as file names may."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise OSError("cannot read 'a\udc80'")
        return {"a": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        del state_dict


def fail_without_utf8(root: str) -> BaseException | None:
    with CheckpointManager(root, settings()) as checkpoints:
        return raised(lambda: checkpoints.save(1, {"s": Surrogate()}))


def test_an_error_that_has_no_utf8_reaches_all_ranks(ranks, tmp_path):
    for error in ranks.run(fail_without_utf8, 2, str(tmp_path)):
        assert isinstance(error, RankErrors)
        assert error.errors == {1: "OSError: cannot read 'a\\udc80'"}


def save_through_both_doors_of_dcp(root: str) -> list[int]:
    forget_incarnations()
    state = {"w": torch.ones(2)}
    dcp.save(state, storage_writer=Writer(root, step=1))
    for step in (2, 3):
        writer = Writer(root, step=step, votes="store", deadline_s=DEADLINE_S)
        dcp.async_save(state, no_dist=True, storage_writer=writer).result()
    dcp.save(state, storage_writer=Writer(root, step=4))
    forget_incarnations()
    with CheckpointManager(root, settings()) as checkpoints:
        return checkpoints.steps()


def test_votes_by_store_after_votes_by_dcp(ranks, tmp_path):
    assert ranks.run(save_through_both_doors_of_dcp, 2, str(tmp_path)) == [[1, 2, 3, 4]] * 2


def make_ranks_anew(port: int) -> list[bool]:
    first = Ranks()
    before = first.are_current
    dist.destroy_process_group()
    after = first.are_current
    rank = first.rank
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=DEADLINE_S))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return [before, after, first.are_current, Ranks().are_current]


def test_ranks_of_a_group_that_was_destroyed_are_not_current(ranks):
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )

    assert ranks.run(make_ranks_anew, 2, store.port) == [[True, False, False, True]] * 2
