"""What is remembered between saves never hides a change."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from dcp_resume.errors import UnsupportedLeaf
from dcp_resume.format.digests import DigestAlgorithm, block_bounds, digest_blocks
from dcp_resume.format.leaves import LeafPacker, pack_leaves
from dcp_resume.manager.parameter_names import named_state
from dcp_resume.planning.value_memory import NamedValue, ValueMemory
from dcp_resume.session.staging import StagedFile
from dcp_resume.session.writing import StagedRank, write_rank
from dcp_resume.storage import open_store

VALUES: list[list[object]] = [
    [1, (0.9, 0.999), [1], "a"],
    [1, (0.9, 0.999), [1], "a"],
    [True, (0.9, 1), [1], "b"],
    [1.0, (0.9, 1.0), [2], "b"],
    [-0.0, (0.0,), [], None],
    [0.0, (-0.0,), [], math.inf],
]


def named(count: int) -> list[NamedValue]:
    return [NamedValue(n, ("optim", f"v{n}"), f"optim.v{n}") for n in range(count)]


def test_values_are_encoded_as_without_a_memory_whatever_changed_between_two_saves():
    names, packer = named(4), LeafPacker()
    memory = ValueMemory(names)
    for values in (*VALUES, *reversed(VALUES)):
        fresh = ValueMemory(names).encode(values)
        found = memory.encode(values)
        assert json.dumps(found) == json.dumps(fresh)
        assert packer.pack(found) == pack_leaves(fresh)


def test_a_list_that_was_changed_in_place_is_encoded_again():
    memory, held = ValueMemory(named(2)), [1]
    before = memory.encode([held, (held, 2)])
    held.append(3)
    after = memory.encode([held, (held, 2)])
    assert before["optim.v0"] != after["optim.v0"]
    assert before["optim.v1"] != after["optim.v1"]


def test_a_value_that_cannot_be_stored_is_refused_beside_remembered_ones_and_not_remembered():
    memory = ValueMemory(named(2))
    memory.encode([1, 2])
    for _ in range(2):
        with pytest.raises(UnsupportedLeaf) as caught:
            memory.encode([1, object()])
        assert [problem.where for problem in caught.value.problems] == ["optim.v1"]
    assert memory.encode([1, 2])["optim.v1"] == (("optim", "v1"), 2)


class WithExtras(nn.Module):
    """A buffer that is not stored, one that is, extra state, and a part called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        del state


class OwnStateDict(nn.Module):
    """Knows none of torch's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"w": self.inner.weight}


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_a_models_state_has_the_names_and_memory_that_torch_gives_it(alone):
    compiled = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    for model in (
        WithExtras(),
        DistributedDataParallel(WithExtras()),
        DistributedDataParallel(compiled),
        torch.compile(WithExtras(), backend="eager"),
    ):
        expected, found = get_model_state_dict(model), named_state(model)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert found[name].data_ptr() == value.data_ptr()
            else:
                assert found[name] == value
    assert list(named_state(OwnStateDict())) == ["w"]


@pytest.mark.parametrize("url", ["posix", "memory://unchanged-states"])
def test_windows_digested_as_they_are_written_give_the_digests_of_the_whole(tmp_path, url):
    store = open_store(str(tmp_path) if url == "posix" else url)
    data = np.random.default_rng(1).integers(0, 256, 1_700_001, np.uint8)
    lengths = [1_100_000, 0, 3, 599_998]
    buffers = [part.data for part in np.split(data, np.cumsum(lengths)[:-1])]
    header = b"h" * 64
    staged = StagedRank(["f"], ["p"], [header], [StagedFile(buffers, lengths)], [[]])
    report = write_rank(staged, store, "a/", 2**16, DigestAlgorithm.SHA256)
    bounds = block_bounds(64, np.asarray(lengths, np.int64), 2**16)
    whole = [header, data.data]
    assert report.digests.tobytes() == digest_blocks(bounds, whole, DigestAlgorithm.SHA256)
    assert store.read("a/f", max_bytes=2**21) == b"".join(whole)
