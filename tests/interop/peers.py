"""States to exchange, and both directions in one line each."""

from __future__ import annotations

import struct

import torch

from dcp_resume import CheckpointManager, LoadOptions, SaveMode, Settings, open_store
from dcp_resume.interop import (
    ExportOptions,
    ImportOptions,
    export_checkpoint,
    import_checkpoint,
    locate_source,
)
from dcp_resume.session.finding import find_checkpoints

STEP = 7
WIDTH, LAYERS, VOCAB, BLOCK = 8, 2, 130, 4
CODES = {torch.float32: 11, torch.bfloat16: 9, torch.int64: 8}


def tensors() -> dict[str, torch.Tensor]:
    """Every kind that safetensors holds; the tie is one memory."""
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    return {
        "h.0.weight": weight,
        "h.1.weight": torch.randn(40, 30).bfloat16(),
        "tied": weight,
        "half": torch.randn(3, 2, 4).half(),
        "double": torch.randn(3).double(),
        "counts": torch.arange(9).reshape(3, 3),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


def save_run(root, state) -> None:
    with CheckpointManager(root, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.save(STEP, state)


def take_in(source, run, **options):
    return import_checkpoint(
        locate_source(str(source), open_store), open_store(str(run)), ImportOptions(**options)
    )


def give_out(run, target, form, **options):
    store = open_store(str(run))
    (located,) = find_checkpoints(store, "latest")
    return export_checkpoint(store, located, str(target), form, ExportOptions(**options))


def load_run(root, like) -> dict:
    """What the run holds, in fresh memory of the shape of ``like``."""
    blank = {
        part: {name: torch.full_like(t.float(), 9).to(t.dtype) for name, t in inner.items()}
        for part, inner in like.items()
    }
    with CheckpointManager(root) as checkpoints:
        checkpoints.load(blank, options=LoadOptions(parts=tuple(like)))
    return blank


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_equal(found, expected) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert as_bytes(found[name]) == as_bytes(tensor), name


def optimizer_state():
    """Lists, integer keys, and values that are no tensors."""
    moments = {"exp_avg": torch.randn(3), "step": torch.tensor(4.0)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "names": ["a"], "fused": None}]
    return {"state": {0: moments, 1: {"exp_avg": torch.randn(2, 2)}}, "param_groups": groups}


def llmc_file(dtype, version) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A file, and the state in it; by the description of the format, written by hand."""
    names = {
        "transformer.wte.weight": (VOCAB, WIDTH),
        "transformer.wpe.weight": (BLOCK, WIDTH),
    }
    kinds = {
        "ln_1.weight": (WIDTH,),
        "ln_1.bias": (WIDTH,),
        "attn.c_attn.weight": (3 * WIDTH, WIDTH),
        "attn.c_attn.bias": (3 * WIDTH,),
        "attn.c_proj.weight": (WIDTH, WIDTH),
        "attn.c_proj.bias": (WIDTH,),
        "ln_2.weight": (WIDTH,),
        "ln_2.bias": (WIDTH,),
        "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
        "mlp.c_fc.bias": (4 * WIDTH,),
        "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        "mlp.c_proj.bias": (WIDTH,),
    }
    for kind, shape in kinds.items():
        names.update((f"transformer.h.{layer}.{kind}", shape) for layer in range(LAYERS))
    names |= {"transformer.ln_f.weight": (WIDTH,), "transformer.ln_f.bias": (WIDTH,)}
    state = {name: torch.randn(shape).to(dtype) for name, shape in names.items()}
    numbers = [20240326, version, BLOCK, VOCAB, LAYERS, 2, WIDTH, 256] + [0] * 248
    data = struct.pack("<256i", *numbers)
    for name, tensor in state.items():
        data += tensor.view(torch.uint8).numpy().tobytes()
        if name == "transformer.wte.weight":
            data += bytes((256 - VOCAB) * WIDTH * tensor.itemsize)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return data, state


def ckpt_file(state) -> bytes:
    """A file of InfiniTrain, likewise."""
    data = struct.pack("<III", 0x54504B43, 1, len(state))
    for name, tensor in state.items():
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data += struct.pack("<I", len(name)) + name.encode()
        data += struct.pack("<bI", CODES[tensor.dtype], tensor.ndim)
        data += struct.pack(f"<{tensor.ndim}qQ", *tensor.shape, len(content)) + content
    return data
