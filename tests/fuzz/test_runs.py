"""Whole runs whose documents lie, with every digest right: each door answers with our errors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume import CheckpointManager, LoadOptions, Reader, Strictness, open_store
from dcp_resume.cli.main import main
from dcp_resume.errors import DcpResumeError
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.incarnation import forget_incarnations
from dcp_resume.session.verify import verify_checkpoint
from tests.support.damage import DamagedRun, little_memory

from .mutations import mutated_json, settings_of
from .targets import documents, make_run, objects_at, state_at

SETTINGS = settings_of(50)
LENIENT = LoadOptions(strictness=Strictness.IGNORE)


@pytest.fixture
def run(tmp_path):
    return DamagedRun(tmp_path / "run", make_run)


@contextlib.contextmanager
def restored(root: Path) -> Iterator[None]:
    """Afterwards the directory is as it was."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    try:
        yield
    finally:
        for path in [path for path in root.rglob("*") if path.is_file() and path not in before]:
            path.unlink()
        for path, data in before.items():
            if path.read_bytes() != data:
                path.write_bytes(data)


def replaced(document: Any) -> Any:
    """An edit that puts another document in the place of what was there."""

    def edit(found: dict[str, Any]) -> None:
        found.clear()
        found.update(document)

    return edit


def try_every_door(root: Path) -> None:
    with little_memory():
        with contextlib.suppress(DcpResumeError), CheckpointManager(root) as checkpoints:
            checkpoints.load(objects_at(0), options=LENIENT)
        with contextlib.suppress(DcpResumeError):
            store = open_store(str(root))
            for located in find_checkpoints(store, "all"):
                verify_checkpoint(store, located)
        with contextlib.suppress(DcpResumeError), CheckpointManager(root) as checkpoints:
            checkpoints.resume(objects_at(0))
        with contextlib.suppress(dcp.CheckpointException):
            dcp.load(state_at(0), storage_reader=Reader(str(root)), no_dist=True)
        forget_incarnations()
        for arguments in (["ls", "--all"], ["inspect", "--tensors", "--json"], ["inspect"]):
            assert main([*arguments, str(root)]) in range(5)


@pytest.mark.parametrize("name", ["manifest", "catalog", "record"])
def test_a_document_that_lies(run, name, capsys):
    edit = getattr(run, f"edit_{name}")
    seed = documents().records[-1] if name == "record" else getattr(documents(), name)

    @SETTINGS
    @given(mutated_json(seed))
    def check(document):
        with restored(run.root):
            edit(replaced(of_this_run(document, run)))
            try_every_door(run.root)
        capsys.readouterr()

    check()


def of_this_run(document: Any, run: DamagedRun) -> Any:
    """The document with the run and attempt of the one on disk, so that more than these differ."""
    record = json.loads(run.commit_record().read_bytes())
    theirs = json.loads(documents().records[-1])
    text = json.dumps(document)
    for name in ("run", "attempt"):
        text = text.replace(theirs[name], record[name])
    text = text.replace(theirs["manifest"]["digest"], record["manifest"]["digest"])
    return json.loads(text)


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, float, int]:
    """A column of the index, a place in it, and what to put there."""
    columns = [field.name for field in dataclasses.fields(ChunkIndex)]
    values = st.sampled_from([0, 1, 2, 7, 2**8 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
    return draw(st.sampled_from(columns)), draw(st.floats(0, 0.999)), draw(values)


def changed(index: ChunkIndex, change: tuple[str, float, int]) -> ChunkIndex:
    column, place, value = change
    array = np.array(getattr(index, column))
    flat = array.reshape(-1)
    if len(flat):
        flat[int(place * len(flat))] = value & int(np.iinfo(array.dtype).max)
    return dataclasses.replace(index, **{column: array})


def test_an_index_that_lies(run, capsys):
    @SETTINGS
    @given(st.lists(changes(), min_size=1, max_size=3))
    def check(edits):
        with restored(run.root):
            run.edit_index(lambda index: functools.reduce(changed, edits, index))
            try_every_door(run.root)
        capsys.readouterr()

    check()
