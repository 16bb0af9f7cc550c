"""The libraries, each behind the same three verbs, in the ways that their users call them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.payload import State, memory_of
from dcp_resume import CheckpointManager, SaveMode, Settings

__all__ = [
    "Contender",
    "HuggingFaceDcp",
    "Ours",
    "Safetensors",
    "StockDcp",
    "TorchSave",
    "TunedDcp",
    "flat",
    "local",
]


class Contender(Protocol):
    """One library, over one process group."""

    is_async: bool
    """Whether it can save in the background."""
    reshards: bool
    """Whether other ranks can load what it saved."""

    def prepare(self, state: State) -> Any:
        """What its other verbs are given for this state: built once, and not timed."""

    def save(self, prepared: Any, path: Path) -> None:
        """Save durably."""

    def save_async(self, prepared: Any, path: Path) -> Callable[[], object]:
        """Save in the background; the returned call waits until it is durable."""

    def load(self, prepared: Any, path: Path) -> None:
        """Load into the state's own tensors."""

    def close(self) -> None:
        """Give up threads and buffers."""


class Ours:
    """dcp_resume as it comes: digests on, fsync on, commit by the log."""

    is_async = True
    reshards = True

    def __init__(self) -> None:
        self._managers: dict[SaveMode, CheckpointManager] = {}
        self._mode = SaveMode.BLOCKING
        self._step = 0

    def _manager(self, path: Path, mode: SaveMode) -> CheckpointManager:
        self._mode = mode
        if mode not in self._managers:
            self._managers[mode] = CheckpointManager(path / mode.value, Settings(mode=mode))
        return self._managers[mode]

    def prepare(self, state: State) -> State:
        """The state itself."""
        return state

    def save(self, prepared: State, path: Path) -> None:
        """Save durably."""
        self._step += 1
        self._manager(path, SaveMode.BLOCKING).save(self._step, prepared)

    def save_async(self, prepared: State, path: Path) -> Callable[[], object]:
        """Save in the background."""
        self._step += 1
        return self._manager(path, SaveMode.BACKGROUND).save(self._step, prepared).result

    def load(self, prepared: State, path: Path) -> None:
        """Load what was saved last, with every block verified."""
        self._manager(path, self._mode).load(prepared)

    def close(self) -> None:
        """Close every manager."""
        for manager in self._managers.values():
            manager.close()


class StockDcp:
    """torch.distributed.checkpoint with its defaults."""

    is_async = True
    reshards = True

    def prepare(self, state: State) -> State:
        """The state itself."""
        return state

    def save(self, prepared: State, path: Path) -> None:
        """Save; its writer calls fsync."""
        dcp.save(prepared, storage_writer=self._writer(path), planner=self._planner())

    def save_async(self, prepared: State, path: Path) -> Callable[[], object]:
        """Save in a thread."""
        response: Any = dcp.async_save(
            prepared,
            storage_writer=self._writer(path),
            planner=self._planner(),
            async_stager=self._stager(),
        )
        wait: Callable[[], object] = response.result
        return wait

    def load(self, prepared: State, path: Path) -> None:
        """Load in place."""
        dcp.load(prepared, storage_reader=dcp.FileSystemReader(path))

    def close(self) -> None:
        """Nothing is kept."""

    def _writer(self, path: Path) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(path)

    def _planner(self) -> DefaultSavePlanner:
        return DefaultSavePlanner()

    def _stager(self) -> DefaultStager | None:
        return None


class TunedDcp(StockDcp):
    """The same without torch.save's checksum, with its plan cache and kept staging buffers."""

    def __init__(self) -> None:
        self._kept = DefaultStager(StagingOptions(False, False, False, False))

    def save(self, prepared: State, path: Path) -> None:
        """Save without checksums."""
        with _NoChecksum():
            super().save(prepared, path)

    def save_async(self, prepared: State, path: Path) -> Callable[[], object]:
        """Save in a thread, without checksums."""
        unchecked = _NoChecksum()
        unchecked.__enter__()
        wait = super().save_async(prepared, path)

        def result() -> object:
            try:
                return wait()
            finally:
                unchecked.__exit__()

        return result

    def close(self) -> None:
        """Close the stager."""
        self._kept.close()

    def _stager(self) -> DefaultStager:
        return self._kept

    def _planner(self) -> DefaultSavePlanner:
        return DefaultSavePlanner(enable_plan_caching=True)


class _NoChecksum:
    def __enter__(self) -> None:
        self._before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)

    def __exit__(self, *_: object) -> None:
        torch.serialization.set_crc32_options(self._before)


class HuggingFaceDcp(StockDcp):
    """DCP's safetensors writer, one file a rank."""

    is_async = False

    def save(self, prepared: State, path: Path) -> None:
        """Save flat names, as it wants them."""
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(flat(prepared), storage_writer=writer)

    def load(self, prepared: State, path: Path) -> None:
        """Load in place."""
        dcp.load(flat(prepared), storage_reader=HuggingFaceStorageReader(str(path)))


class _FilePerRank:
    """No plan, no metadata, no other rank: what writing a rank's file alone costs."""

    is_async = False
    reshards = False
    suffix = ""

    def prepare(self, state: State) -> State:
        """The state itself."""
        return state

    def save(self, prepared: State, path: Path) -> None:
        """Write and fsync this rank's file."""
        path.mkdir(parents=True, exist_ok=True)
        self._write(local(prepared), self._file(path))
        with self._file(path).open("rb") as file:
            os.fsync(file.fileno())
        dist.barrier()

    def save_async(self, prepared: State, path: Path) -> Callable[[], object]:
        """There is none."""
        raise NotImplementedError

    def load(self, prepared: State, path: Path) -> None:
        """Read, then copy into the state."""
        read = self._read(self._file(path))
        for name, tensor in local(prepared).items():
            tensor.copy_(read[name])

    def close(self) -> None:
        """Nothing is kept."""

    def _file(self, path: Path) -> Path:
        return path / f"{dist.get_rank()}{self.suffix}"

    def _write(self, tensors: dict[str, torch.Tensor], file: Path) -> None:
        raise NotImplementedError

    def _read(self, file: Path) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class TorchSave(_FilePerRank):
    """torch.save, one file a rank."""

    suffix = ".pt"

    def _write(self, tensors: dict[str, torch.Tensor], file: Path) -> None:
        torch.save(tensors, file)

    def _read(self, file: Path) -> dict[str, torch.Tensor]:
        read: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
        return read


class Safetensors(_FilePerRank):
    """safetensors, one file a rank."""

    suffix = ".safetensors"

    def _write(self, tensors: dict[str, torch.Tensor], file: Path) -> None:
        safetensors.torch.save_file(tensors, file)

    def _read(self, file: Path) -> dict[str, torch.Tensor]:
        read: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
        return read


def flat(state: State) -> dict[str, Any]:
    """Its tensors by one dotted name each."""
    found = {f"model.{fqn}": tensor for fqn, tensor in state["model"].items()}
    for fqn, moments in state["optim"]["state"].items():
        found.update((f"optim.{fqn}.{name}", tensor) for name, tensor in moments.items())
    return found


def local(state: State) -> dict[str, torch.Tensor]:
    """This rank's memory by the same names."""
    return dict(zip(flat(state), memory_of(state), strict=True))
