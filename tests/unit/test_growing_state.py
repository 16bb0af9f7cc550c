"""Objects whose mappings fill while they run load into objects that have not begun."""

from __future__ import annotations

import pytest
import torch

from dcp_resume import CheckpointManager, LoadOptions, SaveMode, Settings, Strictness, errors

BLOCKING = Settings(mode=SaveMode.BLOCKING)


class Reader:
    """A data reader that learns of its files as it meets them."""

    def __init__(self):
        self.positions, self.notes = {}, []

    def state_dict(self):
        return {"positions": self.positions, "notes": self.notes}

    def load_state_dict(self, state):
        self.positions, self.notes = state["positions"], state["notes"]


def saved(root):
    reader = Reader()
    reader.positions = {"a.txt": {"line": 3, "open": True}, "b.txt": {"line": 0, "open": False}}
    reader.notes = [1, (2, 3)]
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(5, {"data": reader, "w": torch.ones(3)})
    return reader


def test_entries_below_an_empty_mapping_are_loaded(tmp_path):
    reader, fresh = saved(tmp_path), Reader()
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        result = checkpoints.resume({"data": fresh, "w": torch.zeros(3)})
    assert (fresh.positions, fresh.notes) == (reader.positions, reader.notes)
    assert not result.report.items


def test_a_mapping_that_is_not_empty_is_compared_name_by_name(tmp_path):
    saved(tmp_path)
    other = Reader()
    other.positions = {"c.txt": {"line": 9, "open": True}}
    state = {"data": other, "w": torch.zeros(3)}
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        with pytest.raises(errors.LoadRefused) as caught:
            checkpoints.load(state)
        assert {p.kind for p in caught.value.problems} == {"missing", "unexpected"}
        assert other.positions == {"c.txt": {"line": 9, "open": True}}
        checkpoints.load(state, options=LoadOptions(strictness=Strictness.WARN))
    assert other.positions == {"c.txt": {"line": 9, "open": True}}
    assert other.notes == [1, (2, 3)]
