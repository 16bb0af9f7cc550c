"""Loads into device memory: whole, exact, proved first, and in bounded host memory."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from dcp_resume import Apply, CheckpointManager, LoadOptions
from dcp_resume.errors import CorruptData, PartialLoad
from dcp_resume.session.device_loads import WINDOW_BYTES
from tests.device.busy import keep_busy
from tests.support.damage import flip

DTYPES = [torch.float64, torch.bfloat16, torch.uint8, torch.bool, torch.complex64]


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (0, 3), (7,), (33, 5), (3, 1, 1000), (90_001,)]
    return {
        f"{dtype}-{shape}".replace("torch.", ""): torch.randint(
            0, 2, shape, generator=generator
        ).to(dtype)
        for dtype in DTYPES
        for shape in shapes
    }


def on(device: torch.device, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in state.items()}


@pytest.mark.parametrize("apply", list(Apply), ids=lambda apply: apply.value)
def test_every_dtype_and_shape_arrives_through_the_windows(tmp_path, device, apply):
    saved = values(1)
    saved["wide"] = torch.randn(900, 1111)
    saved["large"] = torch.arange(5 * WINDOW_BYTES // 16).view(-1, 1024)  # more than two windows
    loaded = on(device, {name: torch.zeros_like(tensor) for name, tensor in saved.items()})
    strided = torch.zeros(1111, 900, device=device)
    loaded["wide"] = strided.t()
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, on(device, saved)).result()
        keep_busy(device, 15)  # longer than it takes to read three windows
        for tensor in loaded.values():
            tensor.fill_(1)  # queued before the load, and done before it
        checkpoints.load(loaded, 1, options=LoadOptions(apply=apply))
    for name, tensor in saved.items():
        assert torch.equal(loaded[name].cpu(), tensor), name


def test_when_a_load_returns_all_is_on_the_device(tmp_path, device):
    saved = values(2)
    loaded = on(device, {name: torch.zeros_like(tensor) for name, tensor in saved.items()})
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, on(device, saved)).result()
        keep_busy(device, 20)  # longer than all else of a load
        checkpoints.load(loaded, 1)
        with torch.Stream(device=device):  # which waits for no other
            found = {name: tensor.cpu() for name, tensor in loaded.items()}
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name


def test_damage_is_found_before_its_bytes_reach_the_device(tmp_path, device):
    size = 2 * WINDOW_BYTES
    state = {"w": torch.ones(size, dtype=torch.uint8, device=device)}
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
        (data,) = Path(tmp_path).rglob("*.safetensors")
        flip(data, data.stat().st_size - 1)
        for apply, error in ((Apply.IN_PLACE, PartialLoad), (Apply.ATOMIC, CorruptData)):
            state["w"].zero_()
            with pytest.raises(error):
                checkpoints.load(state, 1, options=LoadOptions(apply=apply))
            assert not state["w"][size - (1 << 20) :].any()
            assert bool(state["w"][0]) is (apply is Apply.IN_PLACE)


def test_a_load_takes_two_windows_of_host_memory_and_not_the_states(tmp_path, device):
    state = {"w": torch.ones(6 * WINDOW_BYTES, dtype=torch.uint8, device=device)}
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, state).result()
    gc.collect()
    with CheckpointManager(tmp_path) as checkpoints:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        checkpoints.load(state, 1)
    assert resident("VmHWM") - before < 3 * WINDOW_BYTES


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
