"""States to exchange, and both directions in one line each."""

from __future__ import annotations

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
