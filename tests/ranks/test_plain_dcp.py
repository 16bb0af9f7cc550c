"""DCP's own door: plain ``dcp.save``, ``dcp.async_save`` and ``dcp.load`` with our parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_resume import LoadPlanner, Reader, SavePlanner, Writer, errors
from dcp_resume.session.incarnation import forget_incarnations

pytestmark = pytest.mark.ranks

SHAPES = {"w": (12, 10), "odd": (7, 3), "wide": (4, 16)}
PLANNERS = {
    "stock": (dcp.DefaultSavePlanner, dcp.DefaultLoadPlanner),
    "ours": (SavePlanner, LoadPlanner),
}


def whole(name: str) -> torch.Tensor:
    shape = SHAPES[name]
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape) + len(name)


def sharded_state(dim: int, *, is_blank: bool = False) -> dict:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    tensors = {
        name: distribute_tensor(
            torch.full(SHAPES[name], -1.0) if is_blank else whole(name),
            mesh,
            [Replicate() if name == "wide" else Shard(dim)],
        )
        for name in SHAPES
    }
    value = 0 if is_blank else 7
    return {"model": tensors, "extra": {"step": value, "pair": (value, "x"), "f": value * 0.5}}


def mismatches(state: dict) -> list[str]:
    wrong = [
        name
        for name, tensor in state["model"].items()
        if not torch.equal(
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, whole(name)
        )
    ]
    if state["extra"] != {"step": 7, "pair": (7, "x"), "f": 3.5}:
        wrong.append(f"extra: {state['extra']}")
    return wrong


def save(url: str, planner: str, votes: str) -> None:
    writer = Writer(url, step=7, votes=votes, deadline_s=60)
    is_alone = votes == "store"
    dcp.save(
        sharded_state(0), storage_writer=writer, planner=PLANNERS[planner][0](), no_dist=is_alone
    )
    forget_incarnations()


def load(url: str, planner: str, dim: int) -> list[str]:
    state = sharded_state(dim, is_blank=True)
    dcp.load(state, storage_reader=Reader(url), planner=PLANNERS[planner][1]())
    forget_incarnations()
    return mismatches(state)


@pytest.mark.parametrize("votes", ["dcp", "store"])
@pytest.mark.parametrize("saver", PLANNERS)
def test_any_planner_loads_what_any_planner_saved(ranks, tmp_path, saver, votes):
    ranks.run(save, 4, str(tmp_path), saver, votes)
    for loader in PLANNERS:
        for world_size, dim in ((2, 1), (4, 0), (1, 0)):
            assert ranks.run(load, world_size, str(tmp_path), loader, dim) == [[]] * world_size


def test_nothing_pickled_reaches_storage(ranks, tmp_path):
    ranks.run(save, 2, str(tmp_path), "stock", "dcp")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        data = path.read_bytes()
        assert b"PK\x03\x04" not in data
        assert not data.startswith(b"\x80")


def save_in_background(url: str) -> list[str]:
    state = sharded_state(0)
    writer = Writer(url, step=7, votes="store", deadline_s=60)
    future = dcp.async_save(state, storage_writer=writer, no_dist=True)
    for tensor in state["model"].values():
        tensor.to_local().fill_(99.0)  # the trainer goes on at once
    everywhere = torch.zeros(1)
    while not everywhere.item():  # the trainer's collectives, while the save runs behind them
        everywhere.fill_(float(future.done()))
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    future.result()
    forget_incarnations()
    return [] if writer.result and writer.result.step == 7 else ["no result"]


def test_async_save_leaves_the_trainers_group_alone(ranks, tmp_path):
    assert ranks.run(save_in_background, 2, str(tmp_path)) == [[], []]
    assert ranks.run(load, 2, str(tmp_path), "stock", 1) == [[], []]


def save_over_a_group_of_its_own(url: str) -> None:
    state = sharded_state(0)
    group = dist.new_group(backend="gloo")
    writer = Writer(url, step=7, own_group=True)
    future = dcp.async_save(state, storage_writer=writer, process_group=group)
    for tensor in state["model"].values():
        tensor.to_local().fill_(99.0)
    future.result()
    forget_incarnations()


def test_async_save_over_a_group_of_its_own_copies_the_state(ranks, tmp_path):
    ranks.run(save_over_a_group_of_its_own, 2, str(tmp_path))
    assert ranks.run(load, 2, str(tmp_path), "stock", 0) == [[], []]


def refuse_async(url: str) -> str:
    try:
        dcp.async_save(sharded_state(0), storage_writer=Writer(url, step=7))
    except errors.ConfigurationError as error:
        return str(error)
    return "accepted"


def test_async_save_over_the_trainers_group_is_refused(ranks, tmp_path):
    for answer in ranks.run(refuse_async, 2, str(tmp_path)):
        assert "votes='store'" in answer
        assert "own_group=True" in answer


def save_alone_by_mistake(url: str) -> str:
    try:
        dcp.save(sharded_state(0), storage_writer=Writer(url, step=7), no_dist=True)
    except dcp.CheckpointException as error:
        return str(error)
    except errors.ConfigurationError as error:
        return str(error)
    return "accepted"


def test_a_save_that_would_lose_other_ranks_is_refused(ranks, tmp_path):
    answers = ranks.run(save_alone_by_mistake, 2, str(tmp_path))
    assert "accepted" not in answers
    assert not list(tmp_path.rglob("manifest.json"))


def load_with_hugging_face(directory: str, dim: int) -> list[str]:
    state = sharded_state(dim, is_blank=True)["model"]
    flat = {f"model.{name}": tensor for name, tensor in state.items()}
    dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(directory))
    return [n for n in SHAPES if not torch.equal(flat[f"model.{n}"].full_tensor(), whole(n))]


@pytest.mark.parametrize("saver", PLANNERS)
def test_stock_hugging_face_reader_loads_and_reshards(ranks, tmp_path, saver):
    ranks.run(save, 4, str(tmp_path), saver, "dcp")
    (manifest,) = tmp_path.rglob("manifest.json")
    assert ranks.run(load_with_hugging_face, 2, str(manifest.parent), 1) == [[], []]


def save_with_ours_elsewhere(directory: str, writer: str) -> list[str]:
    storage = {"pickle": dcp.FileSystemWriter, "hf": dcp.HuggingFaceStorageWriter}[writer]
    options = {"save_distributed": True} if writer == "hf" else {}
    state = sharded_state(0)
    if writer == "hf":
        state = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    dcp.save(state, storage_writer=storage(directory, **options), planner=SavePlanner())
    back = sharded_state(1, is_blank=True)
    if writer == "hf":
        flat = {f"model.{name}": tensor for name, tensor in back["model"].items()}
        reader = dcp.HuggingFaceStorageReader(directory)
        dcp.load(flat, storage_reader=reader, planner=LoadPlanner())
        back["extra"] = {"step": 7, "pair": (7, "x"), "f": 3.5}
    else:
        tensors = {"model": back["model"]}
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(directory), planner=LoadPlanner())
        back["extra"] = {"step": 7, "pair": (7, "x"), "f": 3.5}
    return mismatches(back)


@pytest.mark.parametrize("writer", ["pickle", "hf"])
def test_our_planners_work_with_stock_storage(ranks, tmp_path, writer):
    assert ranks.run(save_with_ours_elsewhere, 2, str(tmp_path), writer) == [[], []]


def load_different_steps(url: str) -> str:
    reader = Reader(url, step=(7, 8)[dist.get_rank()])
    try:
        dcp.load(sharded_state(0, is_blank=True), storage_reader=reader)
    except dcp.CheckpointException as error:
        return str(error)
    return "accepted"


def save_two(url: str) -> None:
    for step in (7, 8):
        dcp.save(sharded_state(0), storage_writer=Writer(url, step=step))
    forget_incarnations()


def test_ranks_that_read_different_checkpoints_are_refused(ranks, tmp_path):
    ranks.run(save_two, 2, str(tmp_path))
    for answer in ranks.run(load_different_steps, 2, str(tmp_path)):
        assert "LoadRefused" in answer
        assert "reads step 8" in answer
    assert len(list(Path(tmp_path).rglob("manifest.json"))) == 2
