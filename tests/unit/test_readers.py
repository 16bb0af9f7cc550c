"""Who reads: as many as a rank has cores, and more once the store makes one wait."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_resume import Apply, CheckpointManager
from dcp_resume.errors import StorageUnavailable
from dcp_resume.manifest.boxes import Box
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.own_cores import own_cores
from dcp_resume.session.reading import NUM_READERS, RUN_BYTES, read_targets
from dcp_resume.session.targets import target_of
from dcp_resume.storage import ObjectStore, open_store
from tests.unit.test_edges import BLOCKING, LARGE, filled

ALL = len(os.sched_getaffinity(0))


def tensors_that_fill_a_run_each() -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.full((RUN_BYTES // 4,), float(n)) for n in range(4 * NUM_READERS)}


def saved(root: Path, state: dict[str, torch.Tensor]) -> tuple[ObjectStore, OpenedCheckpoint]:
    """A checkpoint of the state: the store of its directory, and its documents."""
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, state)
    (directory,) = (root / "step-00000001").iterdir()
    store = open_store(str(directory))
    return store, open_checkpoint(store, "", None)


def targets_in(state: dict[str, torch.Tensor]) -> list[Any]:
    return [
        target_of(name, Box.whole(tuple(tensor.shape)), tensor, Apply.IN_PLACE)
        for name, tensor in state.items()
    ]


def test_readers_stop_when_the_store_fails(tmp_path):
    state = {f"w{n}": filled(n, LARGE) for n in range(12)}
    store, opened = saved(tmp_path, state)
    targets = targets_in(state)
    failing = Failing(store)

    with pytest.raises(StorageUnavailable):
        read_targets(failing, opened, targets)

    assert failing.num_reads <= 2 * NUM_READERS


def test_readers_stop_when_a_fault_is_found(tmp_path):
    state = tensors_that_fill_a_run_each()
    store, opened = saved(tmp_path, state)
    targets = targets_in(state)
    emptied = Emptied(store)

    outcome = read_targets(emptied, opened, targets)

    assert {problem.kind for problem in outcome.problems} == {"read"}
    assert emptied.num_reads <= NUM_READERS


def test_a_store_that_makes_a_reader_wait_gets_all_readers(tmp_path):
    state = tensors_that_fill_a_run_each()
    store, opened = saved(tmp_path, state)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    targets = targets_in(found)
    gathering = Gathering(store)

    outcome = read_targets(gathering, opened, targets)

    assert outcome.problems == []
    assert len(gathering.readers) == NUM_READERS
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("told", "cores"), [("", ALL), ("1", ALL), (str(ALL), 1), (str(4 * ALL), 1), ("some", ALL)]
)
def test_a_rank_counts_on_its_share_of_the_hosts_cores(monkeypatch, told, cores):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    assert own_cores() == cores


class Gathering:
    """A store that lets each reader wait: a moment at first, later until all readers are there."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._are_all_here = threading.Event()
        self._lock = threading.Lock()
        self.readers: set[int] = set()
        self.read_bytes = RUN_BYTES

    def read_into(self, key: str, reads: Any) -> None:
        with self._lock:
            is_first = threading.get_ident() not in self.readers
            self.readers.add(threading.get_ident())
            if len(self.readers) == NUM_READERS:
                self._are_all_here.set()
        is_gathered = self._are_all_here.wait(0.01 if is_first else 60)
        assert is_first or is_gathered, f"{len(self.readers)} readers came"
        self._store.read_into(key, reads)


class Emptied:
    """A store whose files are gone."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.num_reads = 0
        self.read_bytes = store.read_bytes

    def read_each(self, key: str, reads: Any) -> None:
        self.num_reads += 1
        self._store.read_each(f"{key}-gone", reads)


class Failing:
    """A store whose reads end at their deadline."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.num_reads = 0
        self.read_bytes = store.read_bytes

    def read_into(self, key: str, reads: Any) -> None:
        self.num_reads += 1
        time.sleep(0.02)
        raise StorageUnavailable("no answer", url="x://", key=key, attempts=1)
