"""What a foreign checkpoint can hand to its reader, one entry point a kind of file.

Each takes the bytes of one file; those beside it are as they should be. What opens is also read.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from dcp_resume import open_store
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.interop.foreign import Source, fill_targets
from dcp_resume.interop.formats import Format
from dcp_resume.interop.inert_pickle import load_inert
from dcp_resume.interop.opening import open_foreign
from dcp_resume.interop.torch_objects import flatten_leaves, plain
from dcp_resume.manifest.boxes import Box
from dcp_resume.session.targets import Target as Wanted
from tests.interop.peers import ckpt_file, llmc_file, optimizer_state, tensors

__all__ = ["FOREIGN"]

MAX_READ_BYTES = 1 << 20
_numbers = itertools.count()


def open_and_read(files: dict[str, bytes], key: str, form: Format) -> None:
    """Open files in memory as a foreign checkpoint; read each tensor that is small."""
    store = open_store(f"memory://fuzz/{next(_numbers)}")
    try:
        for name, data in files.items():
            store.write(name, [memoryview(data)])
        foreign = open_foreign(Source(store, key), form)
        for name, tensor in foreign.tensors.items():
            num_bytes = math.prod(tensor.shape) * ITEMSIZES[tensor.dtype]
            if num_bytes <= MAX_READ_BYTES:
                memory = np.empty(num_bytes, np.uint8).data
                fill_targets(foreign, [Wanted(name, Box.whole(tensor.shape), memory, None, None)])
    finally:
        store.delete(list(files))
        store.close()


def _pickle_bytes() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_torch_file())) as archive:
        return archive.read("archive/data.pkl")


@cache
def _torch_file() -> bytes:
    into = io.BytesIO()
    state = {**tensors(), "window": torch.randn(9)[2:6], "size": torch.Size((1, 2))}
    torch.save({"model": state, "optim": optimizer_state(), "n": {1: {2.0}}}, into)
    return into.getvalue()


def _inert_pickle(data: bytes) -> None:
    try:
        list(flatten_leaves(plain(load_inert(data))))
    except ValueError:
        return  # as both promise; their callers tell of it by a typed error


def _torch_archive(data: bytes) -> None:
    open_and_read({"it.pth": data}, "it.pth", Format.TORCH)


def _torch_pickle(data: bytes) -> None:
    """The index of an archive whose members are as they should be."""
    into = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_torch_file())) as old, zipfile.ZipFile(into, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    _torch_archive(into.getvalue())


@cache
def _hugging_face() -> tuple[dict[str, bytes], bytes]:
    into = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, into)
    index = {"metadata": {}, "weight_map": {"a": "1.bin", "b": "1.bin"}}
    return {"1.bin": into.getvalue()}, json.dumps(index).encode()


def _weight_index(data: bytes) -> None:
    files = {**_hugging_face()[0], "pytorch_model.bin.index.json": data}
    open_and_read(files, "", Format.TORCH)


def _safetensors_file() -> bytes:
    state = tensors()
    del state["tied"]
    return bytes(safetensors.torch.save(state))


def _safetensors(data: bytes) -> None:
    open_and_read({"it.safetensors": data}, "it.safetensors", Format.SAFETENSORS)


@cache
def _dcp_files() -> dict[str, bytes]:
    state = {"model": {"w": torch.randn(4, 5), "b": torch.randn(3)}, "epoch": 3}
    with tempfile.TemporaryDirectory() as directory:
        dcp.save(state, checkpoint_id=directory, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def _dcp_index(data: bytes) -> None:
    open_and_read({**_dcp_files(), ".metadata": data}, "", Format.DCP)


def _dcp_data(data: bytes) -> None:
    open_and_read({**_dcp_files(), "__0_0.distcp": data}, "", Format.DCP)


def _megatron_common(data: bytes) -> None:
    files = {**_dcp_files(), "common.pt": data, "metadata.json": b"{}"}
    open_and_read(files, "", Format.MEGATRON)


def _llmc(data: bytes) -> None:
    open_and_read({"it.bin": data}, "it.bin", Format.LLMC)


def _infinitrain_model(data: bytes) -> None:
    open_and_read({"model.ckpt": data, "trainer_state.json": _TRAINER}, "", Format.INFINITRAIN)


def _infinitrain_trainer(data: bytes) -> None:
    files = {"model.ckpt": _ckpt_file(), "trainer_state.json": data}
    open_and_read(files, "", Format.INFINITRAIN)


def _ckpt_file() -> bytes:
    return ckpt_file({"wte.weight": torch.randn(5, 3), "h.0.bias": torch.randn(4).bfloat16()})


_TRAINER = b'{"n_layer": 2, "vocab_size": 5\n "global_step": 40, "last_lr": 0.001, "ddp_size": 1}'

FOREIGN = {
    "foreign-pickle": (_inert_pickle, lambda: (_pickle_bytes(), _dcp_files()[".metadata"])),
    "torch-archive": (_torch_archive, lambda: (_torch_file(),)),
    "torch-pickle": (_torch_pickle, lambda: (_pickle_bytes(),)),
    "weight-index": (_weight_index, lambda: (_hugging_face()[1],)),
    "safetensors": (_safetensors, lambda: (_safetensors_file(),)),
    "dcp-index": (_dcp_index, lambda: (_dcp_files()[".metadata"],)),
    "dcp-data": (_dcp_data, lambda: (_dcp_files()["__0_0.distcp"],)),
    "megatron-common": (_megatron_common, lambda: (_torch_file(),)),
    "llmc": (_llmc, lambda: (llmc_file(torch.float32, 3)[0],)),
    "infinitrain-model": (_infinitrain_model, lambda: (_ckpt_file(),)),
    "infinitrain-trainer": (_infinitrain_trainer, lambda: (_TRAINER,)),
}
"""Name → what is fed, and what makes well-formed inputs."""
