"""Each peer both ways, bit for bit, by the peer's own code; the table of the how-to names these."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict

from dcp_resume import CheckpointManager, LoadOptions, errors
from dcp_resume.interop import Format, Leftovers
from tests.interop.peers import (
    STEP,
    assert_equal,
    ckpt_file,
    give_out,
    llmc_file,
    load_run,
    optimizer_state,
    save_run,
    take_in,
    tensors,
)


@pytest.fixture
def run(tmp_path):
    save_run(tmp_path / "run", {"model": tensors()})
    return tmp_path / "run"


def blank(state):
    return {name: torch.zeros_like(t.float()).to(t.dtype) for name, t in state.items()}


# torch.save


def test_torch_save_to_us(tmp_path):
    state = {**tensors(), "transposed": torch.randn(5, 7).t(), "window": torch.randn(9)[2:6]}
    torch.save({"model": state, "optim": optimizer_state()}, tmp_path / "it.pth")
    result = take_in(tmp_path / "it.pth", tmp_path / "run", step=3)
    assert (result.format, result.step, result.ties) == (Format.TORCH, 3, ("model.tied",))
    assert_equal(load_run(tmp_path / "run", {"model": state})["model"], state)
    give_out(tmp_path / "run", tmp_path / "again.pth", Format.TORCH)
    first, again = (torch.load(tmp_path / n, weights_only=True) for n in ("it.pth", "again.pth"))
    assert_equal(again["model"], first["model"])
    assert again["optim"]["param_groups"] == first["optim"]["param_groups"]
    assert_equal(again["optim"]["state"][0], first["optim"]["state"][0])


@pytest.mark.parametrize("is_mapped", [False, True])
def test_us_to_torch_load(run, tmp_path, is_mapped):
    result = give_out(run, tmp_path / "it.pth", Format.TORCH, parts=("model",))
    assert result.step == STEP
    found = torch.load(tmp_path / "it.pth", weights_only=True, mmap=is_mapped)
    assert_equal(found, tensors())
    assert found["tied"].data_ptr() == found["h.0.weight"].data_ptr()


def save_shards(place, state, shards):
    """Files of torch.save, and their index, as transformers writes them."""
    place.mkdir()
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({name: state[name] for name in names}, place / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"args": print}, place / "training_args.bin")


def test_hugging_face_bin_files_to_us(tmp_path):
    state = tensors()
    names = list(state)
    save_shards(tmp_path / "hf", state, [names[:4], names[4:]])
    result = take_in(tmp_path / "hf", tmp_path / "run")
    assert (result.format, result.ties) == (Format.TORCH, ("tied",))
    assert_equal(load_run(tmp_path / "run", {"model": state})["model"], state)
    (tmp_path / "one").mkdir()
    torch.save(state, tmp_path / "one" / "pytorch_model.bin")
    assert take_in(tmp_path / "one", tmp_path / "again").ties == ("tied",)
    assert_equal(load_run(tmp_path / "again", {"model": state})["model"], state)


# safetensors


def test_safetensors_to_us(tmp_path):
    state = tensors()
    del state["tied"]
    safetensors.torch.save_file(state, tmp_path / "it.safetensors")
    assert take_in(tmp_path / "it.safetensors", tmp_path / "run").format is Format.SAFETENSORS
    assert_equal(load_run(tmp_path / "run", {"model": state})["model"], state)


def test_us_to_safetensors(run, tmp_path):
    give_out(run, tmp_path / "it.safetensors", Format.SAFETENSORS, parts=("model",))
    expected = tensors()
    del expected["tied"]
    assert_equal(safetensors.torch.load_file(tmp_path / "it.safetensors"), expected)
    take_in(tmp_path / "it.safetensors", tmp_path / "back")
    assert_equal(load_run(tmp_path / "back", {"model": tensors()})["model"], tensors())


def test_us_to_safetensors_sharded_with_an_index_and_back(run, tmp_path):
    result = give_out(run, tmp_path / "hf", Format.SAFETENSORS, parts=("model",), shard_bytes=2000)
    index = json.loads((tmp_path / "hf" / result.files[-1]).read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        found |= safetensors.torch.load_file(tmp_path / "hf" / file)
    expected = tensors()
    del expected["tied"]
    assert len(result.files) > 2
    assert_equal(found, expected)
    take_in(tmp_path / "hf", tmp_path / "back")
    assert_equal(load_run(tmp_path / "back", {"model": tensors()})["model"], tensors())


def test_us_to_the_hugging_face_reader_of_dcp(run, tmp_path):
    give_out(run, tmp_path / "hf", Format.SAFETENSORS, parts=("model",))
    expected = tensors()
    del expected["tied"]
    found = blank(expected)
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "hf")), no_dist=True)
    assert_equal(found, expected)


# DCP


def test_dcp_to_us(tmp_path):
    state = {"model": tensors(), "optim": optimizer_state(), "epoch": {"n": 4, "name": "x"}}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    result = take_in(tmp_path / "dcp", tmp_path / "run")
    assert result.format is Format.DCP
    assert_equal(load_run(tmp_path / "run", {"model": state["model"]})["model"], state["model"])
    back = {"epoch": {"n": 0, "name": ""}}
    with CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.load(back, options=LoadOptions(parts=("epoch",)))
    assert back["epoch"] == {"n": 4, "name": "x"}


def test_us_to_dcp_load(tmp_path):
    values = {"n": 4, "name": "x", "betas": (0.9, 0.95), "list": [1, None, True]}
    save_run(tmp_path / "run", {"model": tensors(), "epoch": values})
    give_out(tmp_path / "run", tmp_path / "dcp", Format.DCP, shard_bytes=4000)
    found = {"model": blank(tensors()), "epoch": dict.fromkeys(values)}
    dcp.load(
        found,
        checkpoint_id=tmp_path / "dcp",
        planner=DefaultLoadPlanner(allow_partial_load=False),
        no_dist=True,
    )
    assert_equal(found["model"], tensors())
    assert found["epoch"] == values


def titan_state(*, is_blank: bool = False) -> dict:
    """As torchtitan lays a checkpoint out: the model's names at the top, other parts nested."""
    moments = {"state.w.exp_avg": torch.ones(3), "param_groups.w.betas": (0.9, 0.95)}
    state = {"w": torch.arange(3.0), "optimizer": moments, "train_state": {"step": 7}}
    return (
        state
        if not is_blank
        else {
            "w": torch.zeros(3),
            "optimizer": {"state.w.exp_avg": torch.zeros(3), "param_groups.w.betas": None},
            "train_state": {"step": 0},
        }
    )


def test_names_that_are_not_nested_go_into_the_part_that_is_named_and_out_again(tmp_path):
    expected = titan_state()
    dcp.save(expected, checkpoint_id=tmp_path / "step-7", no_dist=True)
    take_in(tmp_path / "step-7", tmp_path / "run", loose="model", step=7)
    blanks = titan_state(is_blank=True)
    found = {"model": {"w": blanks.pop("w")}, **blanks}
    with CheckpointManager(tmp_path / "run") as checkpoints:
        assert checkpoints.load(found).step == 7
    assert_same({"w": found.pop("model")["w"], **found}, expected)
    give_out(tmp_path / "run", tmp_path / "back", Format.DCP, loose="model")
    back = titan_state(is_blank=True)
    dcp.load(back, checkpoint_id=tmp_path / "back", no_dist=True)
    assert_same(back, expected)


def assert_same(found: dict, expected: dict) -> None:
    assert torch.equal(found["w"], expected["w"])
    moments, others = found["optimizer"], expected["optimizer"]
    assert torch.equal(moments["state.w.exp_avg"], others["state.w.exp_avg"])
    assert moments["param_groups.w.betas"] == others["param_groups.w.betas"]
    assert found["train_state"] == expected["train_state"]


def test_an_optimizer_that_was_saved_by_groups_is_loaded_into_an_optimizer(tmp_path):
    def trainer():
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}]
        return model, torch.optim.AdamW(groups)

    model, optimizer = trainer()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    take_in(tmp_path / "dcp", tmp_path / "run")
    again, fresh = trainer()
    fresh.param_groups[0]["lr"] = fresh.param_groups[1]["lr"] = 9.0
    with CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.load({"model": again, "optim": fresh})
    assert [group["lr"] for group in fresh.param_groups] == [0.5, 0.25]
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert_equal(fresh.state[ours], optimizer.state[theirs])


def test_a_part_that_would_give_a_name_twice_is_refused_both_ways(tmp_path):
    state = {"w": torch.ones(2), "model": {"w": torch.zeros(2)}}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(errors.ConfigurationError, match=r"'model\.w' would be there twice"):
        take_in(tmp_path / "dcp", tmp_path / "run", loose="model")
    save_run(tmp_path / "own", {"a": {"b.w": torch.ones(2)}, "b": {"w": torch.zeros(2)}})
    with pytest.raises(errors.ConfigurationError, match=r"'b\.w' would be there twice"):
        give_out(tmp_path / "own", tmp_path / "out", Format.DCP, loose="a")
    assert not (tmp_path / "out").exists()


# Megatron torch_dist: a DCP directory, and common.pt. Its own reader: see the how-to.


def test_megatron_to_us_and_back(tmp_path):
    dcp.save({"decoder.weight": torch.randn(4, 4)}, checkpoint_id=tmp_path / "it", no_dist=True)
    torch.save({"iteration": 12, "args": {"lr": 0.5}}, tmp_path / "it" / "common.pt")
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (tmp_path / "it" / "metadata.json").write_text(json.dumps(config))
    result = take_in(tmp_path / "it", tmp_path / "run")
    assert (result.format, result.num_tensors, result.num_values) == (Format.MEGATRON, 1, 2)
    give_out(tmp_path / "run", tmp_path / "again", Format.MEGATRON, parts=("model",))
    common = torch.load(tmp_path / "again" / "common.pt", weights_only=True)
    assert common == {"iteration": 12, "args": {"lr": 0.5}}
    first, again = ({"decoder.weight": torch.zeros(4, 4)} for _ in range(2))
    dcp.load(first, checkpoint_id=tmp_path / "it", no_dist=True)
    dcp.load(again, checkpoint_id=tmp_path / "again", no_dist=True)
    assert_equal(again, first)


# llm.c: its file by its own description, written by hand.


@pytest.mark.parametrize(("dtype", "version"), [(torch.float32, 3), (torch.bfloat16, 5)])
def test_llmc_to_us_and_back_gives_the_same_bytes(tmp_path, dtype, version):
    data, state = llmc_file(dtype, version)
    (tmp_path / "it.bin").write_bytes(data)
    result = take_in(tmp_path / "it.bin", tmp_path / "run")
    assert (result.format, result.ties) == (Format.LLMC, ("lm_head.weight",))
    assert_equal(load_run(tmp_path / "run", {"model": state})["model"], state)
    give_out(tmp_path / "run", tmp_path / "again.bin", Format.LLMC, parts=("model",))
    assert (tmp_path / "again.bin").read_bytes() == data


# InfiniTrain: its files by their description, written by hand.


def test_infinitrain_to_us_and_back_gives_the_same_bytes(tmp_path):
    model = {"wte.weight": torch.randn(5, 3), "h.0.bias": torch.randn(4).bfloat16()}
    optim = {"adam.m.0": torch.randn(5, 3), "adam.t": torch.tensor([7])}
    place = tmp_path / "checkpoint_step_000040"
    place.mkdir()
    (place / "model.ckpt").write_bytes(ckpt_file(model))
    (place / "optimizer.ckpt").write_bytes(ckpt_file(optim))
    # As the published version writes it: no comma behind vocab_size.
    text = '{\n "n_layer": 2,\n "vocab_size": 5\n "global_step": 40,\n "last_lr": 0.001\n}'
    (place / "trainer_state.json").write_text(text)
    result = take_in(place, tmp_path / "run")
    assert (result.format, result.step) == (Format.INFINITRAIN, 40)
    found = load_run(tmp_path / "run", {"model": model, "optim": optim})
    assert_equal(found["model"], model)
    assert_equal(found["optim"], optim)
    give_out(tmp_path / "run", tmp_path / "again", Format.INFINITRAIN)
    for name in ("model.ckpt", "optimizer.ckpt"):
        assert (tmp_path / "again" / name).read_bytes() == (place / name).read_bytes()
    again = json.loads((tmp_path / "again" / "trainer_state.json").read_text())
    assert (again["global_step"], again["n_layer"], again["last_lr"]) == (40, 2, 0.001)


def test_what_a_format_cannot_hold_is_dropped_by_policy_alone(tmp_path):
    save_run(tmp_path / "run", {"model": tensors(), "epoch": {"n": 1}})
    result = give_out(
        tmp_path / "run", tmp_path / "all", Format.SAFETENSORS, leftovers=Leftovers.DROP
    )
    assert [problem.where for problem in result.dropped] == ["epoch.n"]
