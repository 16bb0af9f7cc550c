"""Foreign files are hostile: nothing runs, nothing leads out, and every refusal is typed."""

from __future__ import annotations

import json
import os
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_resume import open_store
from dcp_resume.errors import ConfigurationError, CorruptData, ForeignDamage, ForeignFormat, Unheld
from dcp_resume.interop import Format, Leftovers, torch_objects
from dcp_resume.interop.inert_pickle import Called, Named, Persistent, load_inert
from tests.interop.peers import give_out, load_run, save_run, take_in, tensors


class Bomb:
    """Unpickling it would make the directory."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_an_object_in_a_torch_file_is_not_executed_but_refused_or_left(tmp_path):
    weight = torch.randn(3)
    torch.save({"model": {"a": weight}, "x": {"y": Bomb(tmp_path / "ran")}}, tmp_path / "it.pth")
    with pytest.raises(Unheld, match=r"x\.y.*mkdir"):
        take_in(tmp_path / "it.pth", tmp_path / "run")
    assert not (tmp_path / "run" / "log").exists()
    result = take_in(tmp_path / "it.pth", tmp_path / "run", leftovers=Leftovers.DROP)
    assert [problem.where for problem in result.left] == ["x.y"]
    found = load_run(tmp_path / "run", {"model": {"a": weight}})
    assert torch.equal(found["model"]["a"], weight)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_dcp_s_index_is_not_executed(tmp_path):
    place = tmp_path / "it"
    dcp.save({"a": torch.randn(3)}, checkpoint_id=place, no_dist=True)
    (place / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ForeignDamage):
        take_in(place, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "absent.distcp"])
def test_dcp_s_index_cannot_lead_out_of_its_directory(tmp_path, name):
    place = tmp_path / "it"
    dcp.save({"a": torch.randn(3)}, checkpoint_id=place, no_dist=True)
    index = pickle.loads((place / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = name
    (place / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ForeignDamage, match="no file of this directory"):
        take_in(place, tmp_path / "run")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("form", [Format.TORCH, Format.SAFETENSORS, Format.DCP])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_what_is_cut_short_is_refused_and_leaves_nothing(tmp_path, form, share):
    save_run(tmp_path / "run", {"model": tensors()})
    names = {Format.TORCH: "it.pth", Format.SAFETENSORS: "it.safetensors", Format.DCP: "it"}
    target = tmp_path / names[form]
    give_out(tmp_path / "run", target, form, parts=("model",))
    file = target / "__0_0.distcp" if target.is_dir() else target
    cut(file, int(file.stat().st_size * share))
    with pytest.raises((ForeignDamage, ForeignFormat)):
        take_in(target, tmp_path / "new")
    assert not (tmp_path / "new" / "log").exists()


def test_a_safetensors_header_that_lies_is_refused_with_every_problem(tmp_path):
    header = {
        "far": {"dtype": "F32", "shape": [4], "data_offsets": [4096, 4112]},
        "huge": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**62 - 1]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "it.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ForeignDamage, match="huge"):
        take_in(path, tmp_path / "run")
    path.write_bytes((2**40).to_bytes(8, "little") + b"{" + bytes(16))
    with pytest.raises(ForeignDamage, match="header of"):
        take_in(path, tmp_path / "run")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x94.",  # a memo of nothing
        b"\x80\x02h\x07.",  # what was never put
        b"\x80\x02r\xff\xff\xff\xff.",  # a place in the memo that would take gigabytes
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of exabytes
        b"\x80\x02(i" + b"os\nsystem\n.",  # the call of protocol 0
        b"\x80\x02\x82\x01.",  # the registry of extensions
        b"",
    ],
)
def test_malformed_pickles_are_value_errors(data):
    with pytest.raises(ValueError, match=r"."):
        load_inert(data)


FLOATS = Persistent(("storage", Named("torch", "FloatStorage"), "0", "cpu", 1))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("torch._utils._rebuild_tensor_v2", (FLOATS,)),
        ("torch._utils._rebuild_tensor_v2", (FLOATS, 0, (1,))),
        ("torch._utils._rebuild_tensor_v2", (0, 0, (1,), (1,))),
        ("torch.Size", ({},)),
        ("builtins.set", ([[]],)),
        ("builtins.complex", (1.0, 2.0, 3.0)),
    ],
)
def test_objects_of_torch_with_wrong_arguments_are_value_errors(name, args):
    with pytest.raises(ValueError, match=r"."):
        torch_objects.plain(Called(Named(*name.rsplit(".", 1)), args))


def test_a_small_pickle_of_a_billion_nodes_is_refused(monkeypatch):
    monkeypatch.setattr(torch_objects, "MAX_NODES", 10_000)
    nested = b"\x80\x02]q\x00" + b"".join(
        b"](" + b"h" + bytes([n]) + (b"h" + bytes([n])) * 9 + b"eq" + bytes([n + 1])
        for n in range(20)
    )
    with pytest.raises(ValueError, match="nodes"):
        torch_objects.plain(load_inert(nested + b"."))


def test_the_old_text_opcodes_are_read():
    assert load_inert(b"(lp0\nI1\na.") == [1]


def test_other_formats_are_told_what_they_are(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ForeignFormat, match="hello"):
        take_in(tmp_path / "notes.txt", tmp_path / "run")
    save_run(tmp_path / "ours", {"model": {"a": torch.ones(2)}})
    with pytest.raises(ForeignFormat, match="a run of dcp_resume"):
        take_in(tmp_path / "ours", tmp_path / "run")
    torch.save({"a": torch.ones(2)}, tmp_path / "it.pth")
    with pytest.raises(ForeignFormat, match="llmc"):
        take_in(tmp_path / "it.pth", tmp_path / "run", format=Format.LLMC)
    torch.save({}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ForeignFormat, match=r"before 1\.6"):
        take_in(tmp_path / "old.pth", tmp_path / "run")


def test_an_export_is_refused_before_a_byte_is_written(tmp_path):
    save_run(tmp_path / "run", {"model": {"wide": torch.ones(2, dtype=torch.complex128)}})
    with pytest.raises(Unheld, match="complex128"):
        give_out(tmp_path / "run", tmp_path / "it.safetensors", Format.SAFETENSORS)
    with pytest.raises(Unheld, match="wte"):
        give_out(tmp_path / "run", tmp_path / "it.bin", Format.LLMC, parts=("model",))
    with pytest.raises(ConfigurationError, match="no part 'optim'"):
        give_out(tmp_path / "run", tmp_path / "it.pth", Format.TORCH, parts=("optim",))
    (tmp_path / "it.pth").write_text("mine")
    with pytest.raises(ConfigurationError, match="replaces nothing"):
        give_out(tmp_path / "run", tmp_path / "it.pth", Format.TORCH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.pth", "run"]


def test_an_export_of_a_damaged_checkpoint_leaves_nothing(tmp_path):
    save_run(tmp_path / "run", {"model": tensors()})
    (file,) = (tmp_path / "run").glob("step-*/*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptData):
        give_out(tmp_path / "run", tmp_path / "it", Format.DCP)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_on_an_object_store_an_export_appears_with_its_last_file(tmp_path):
    save_run(tmp_path / "run", {"model": tensors()})
    url = "memory://interop/it"
    give_out(tmp_path / "run", url, Format.DCP, parts=("model",))
    assert {info.key for info in open_store(url).list("")} == {".metadata", "__0_0.distcp"}
    take_in(url, tmp_path / "back")
    with pytest.raises(ConfigurationError, match="replaces nothing"):
        give_out(tmp_path / "run", url, Format.DCP, parts=("model",))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "one.bin"}, "b: it lies in one.bin, the index leaves it out"),
        ({"a": "one.bin", "b": "one.bin", "c": "one.bin"}, "c: the index says 'one.bin'"),
        ({"a": "one.bin", "b": "two.bin"}, "two.bin: the index names it"),
        ({"a": "one.bin", "b": "../one.bin"}, "more than files of this directory"),
        ({"a": "one.bin", "b": ["one.bin"]}, "malformed"),
        (["a"], "malformed"),
    ],
)
def test_an_index_of_shards_that_lies_is_refused(tmp_path, weight_map, said):
    place = tmp_path / "hf"
    place.mkdir()
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, place / "one.bin")
    (place / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ForeignDamage, match=re.escape(said)):
        take_in(place, tmp_path / "run")


def test_shards_are_refused_where_they_overlap_are_old_or_would_run(tmp_path):
    place = tmp_path / "hf"
    place.mkdir()
    (place / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "1.bin", "b": "2.bin"}}'
    )
    torch.save({"a": torch.ones(2)}, place / "1.bin")
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, place / "2.bin")
    with pytest.raises(ForeignDamage, match=r"a: it lies in 1\.bin and in 2\.bin"):
        take_in(place, tmp_path / "run")
    torch.save({"b": torch.ones(3)}, place / "2.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ForeignFormat, match=r"before 1\.6"):
        take_in(place, tmp_path / "run")
    torch.save({"b": torch.ones(3), "x": Bomb(tmp_path / "ran")}, place / "2.bin")
    with pytest.raises(Unheld, match="mkdir"):
        take_in(place, tmp_path / "run")
    assert not (tmp_path / "ran").exists()
