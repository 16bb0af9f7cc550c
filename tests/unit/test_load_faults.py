"""Damaged checkpoints: refused by name before anything changes, or told exactly what did."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from dcp_resume import Apply, CheckpointManager, LoadOptions, SaveMode, Settings
from dcp_resume.errors import (
    CorruptData,
    DcpResumeError,
    InvalidCheckpoint,
    InvalidDocument,
    LoadRefused,
    PartialLoad,
    UnsupportedFormat,
)
from dcp_resume.events import CheckpointSkipped, subscribe
from tests.support.damage import (
    NEWER,
    NUM_PARTS,
    OLDER,
    DamagedRun,
    changed_parts,
    flip,
    flips,
    state_at,
)

BLOCKING = Settings(mode=SaveMode.BLOCKING)
LAST = NUM_PARTS - 1
BEFORE = 0
"""Step of the state that loads must leave alone."""


@pytest.fixture
def run(tmp_path):
    return DamagedRun(tmp_path)


@pytest.fixture
def skipped():
    seen: list[CheckpointSkipped] = []
    unsubscribe = subscribe(lambda e: seen.append(e) if isinstance(e, CheckpointSkipped) else None)
    yield seen
    unsubscribe()


def load(run, apply=Apply.IN_PLACE):
    """The error of a load of the newer checkpoint, and the state after it."""
    state = state_at(BEFORE)
    with CheckpointManager(run.root, BLOCKING) as checkpoints:
        try:
            checkpoints.load(state, NEWER, options=LoadOptions(apply=apply))
        except DcpResumeError as error:
            return error, state
    return None, state


def resume(run):
    """What a resume returns, the state after it, and the steps that are left."""
    state = state_at(BEFORE)
    with CheckpointManager(run.root, BLOCKING) as checkpoints:
        result = checkpoints.resume(state)
        return result, state, checkpoints.steps()


def kinds(error):
    return {problem.kind for problem in error.problems}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def unlink(run, name):
    (run.attempt() / name).unlink()


def with_box(index, old, new):
    """Exchange one box of the first tensor; ``old`` and ``new`` are offsets and sizes."""
    values = index.box_values.copy()
    found = [i for i in range(0, len(values), 4) if values[i : i + 4].tolist() == old]
    values[found[0] : found[0] + 4] = new
    return dataclasses.replace(index, box_values=values)


def set_format(name, value):
    def edit(document):
        document["format"][name] = value

    return edit


def set_file(name, value):
    def edit(document):
        document["files"][1][name] = value

    return edit


def set_count(name, value):
    def edit(document):
        document["counts"][name] = value

    return edit


DAMAGES = {
    "manifest byte": (lambda r: flip(r.attempt() / "manifest.json", 40), CorruptData, "digest"),
    "catalog byte": (lambda r: flip(r.attempt() / "catalog.json", 40), CorruptData, "digest"),
    "index byte": (lambda r: flip(r.attempt() / "chunk-index", -1), CorruptData, "digest"),
    "manifest gone": (
        lambda r: unlink(r, "manifest.json"),
        InvalidDocument,
        "missing",
    ),
    "catalog gone": (lambda r: unlink(r, "catalog.json"), InvalidDocument, "missing"),
    "index gone": (lambda r: unlink(r, "chunk-index"), InvalidDocument, "missing"),
    "manifest cut": (lambda r: truncate(r.attempt() / "manifest.json"), CorruptData, "digest"),
    "data cut": (lambda r: truncate(r.data_file(3)), InvalidCheckpoint, "size"),
    "data gone": (lambda r: r.data_file(3).unlink(), InvalidCheckpoint, "missing"),
    "path escape": (
        lambda r: r.edit_catalog(set_file("key", "../../secret")),
        InvalidDocument,
        "path_escape",
    ),
    "base escape": (lambda r: r.edit_catalog(set_file("base", "../..")), InvalidDocument, "base"),
    "two files in one": (
        lambda r: r.edit_catalog(lambda c: c["files"][1].update(key=c["files"][0]["key"])),
        InvalidDocument,
        "duplicate",
    ),
    "chunk too small": (
        lambda r: r.edit_index(lambda i: with_box(i, [0, 0, 6, 10], [0, 0, 5, 10])),
        InvalidDocument,
        "size",
    ),
    "out of bounds": (
        lambda r: r.edit_index(lambda i: with_box(i, [0, 0, 6, 10], [1, 0, 6, 10])),
        InvalidDocument,
        "bounds",
    ),
    "huge box": (
        lambda r: r.edit_index(lambda i: with_box(i, [0, 0, 6, 10], [0, 0, 2**62, 2**62])),
        InvalidCheckpoint,
        "bounds",
    ),
    "huge counts": (
        lambda r: r.edit_manifest(set_count("chunks", 2**62)),
        InvalidDocument,
        "count",
    ),
    "huge header": (
        lambda r: r.write_index(
            (r.attempt() / "chunk-index").read_bytes()[:8] + b"\xff" * 8 + b"\0" * 64
        ),
        InvalidDocument,
        "header",
    ),
    "one digest less": (
        lambda r: r.edit_index(
            lambda i: dataclasses.replace(i, block_digest=i.block_digest[:-1].copy())
        ),
        InvalidDocument,
        "count",
    ),
    "newer major of the manifest": (
        lambda r: r.edit_manifest(set_format("major", 2)),
        UnsupportedFormat,
        "major",
    ),
    "newer major of the catalog": (
        lambda r: r.edit_catalog(set_format("major", 2)),
        UnsupportedFormat,
        "major",
    ),
    "unknown feature": (
        lambda r: r.edit_manifest(set_format("requires", ["teleport"])),
        UnsupportedFormat,
        "feature",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_41_damage_is_refused_by_name_and_nothing_changes(run, name):
    damage, kind_of_error, kind = DAMAGES[name]
    damage(run)

    error, state = load(run)

    assert isinstance(error, kind_of_error)
    assert kind in kinds(error)
    assert error.problems
    assert changed_parts(state, BEFORE) == set()
    assert state["data"] == state_at(BEFORE)["data"]


@pytest.mark.parametrize("name", [n for n, d in DAMAGES.items() if d[1] is not UnsupportedFormat])
def test_42_resume_falls_back_to_the_older_checkpoint(run, skipped, name):
    DAMAGES[name][0](run)

    result, state, steps = resume(run)

    assert result.step == OLDER
    assert changed_parts(state, OLDER) == set()
    assert state["data"] == state_at(OLDER)["data"]
    assert steps == [OLDER]
    assert [event.step for event in skipped] == [NEWER]


def test_a_newer_format_is_not_taken_for_damage(run):
    """An older version of the library that starts by accident must not drop good checkpoints."""
    run.edit_manifest(set_format("major", 2))

    with pytest.raises(UnsupportedFormat):
        resume(run)

    with CheckpointManager(run.root) as checkpoints:
        assert checkpoints.steps() == [OLDER, NEWER]


def test_a_value_that_cannot_be_decoded_is_refused_before_anything_changes(run):
    def edit(manifest):
        (leaf,) = [leaf for leaf in manifest["leaves"] if leaf["fqn"] == "data.path"]
        leaf["value"] = {"$enum": ["no.such.Class", "MEMBER"]}

    run.edit_manifest(edit)

    error, state = load(run)

    assert isinstance(error, LoadRefused)
    assert [(p.where, p.kind) for p in error.problems] == [("data.path", "leaf")]
    assert changed_parts(state, BEFORE) == set()


def test_all_faults_are_listed_at_once(run):
    for part in (2, 5):
        truncate(run.data_file(part))
    run.data_file(7).unlink()

    error, _ = load(run)

    assert sorted(problem.kind for problem in error.problems) == ["missing", "size", "size"]
    assert {problem.where.rpartition("/")[2][:15] for problem in error.problems} == {
        "shard-00001-p02",
        "shard-00001-p05",
        "shard-00001-p07",
    }


def test_damaged_data_in_place(run):
    """What the damaged file's read did not reach first is told, exactly."""
    flip(run.data_file(LAST), -1)

    error, state = load(run)

    assert isinstance(error, PartialLoad)
    assert set(error.written_fqns) == changed_parts(state, BEFORE)
    assert f"p{LAST}.w" not in error.written_fqns
    (problem,) = error.problems
    assert problem.kind == "digest"
    assert f"p{LAST}.w" in problem.message


def test_damaged_data_atomically(run):
    flip(run.data_file(LAST), -1)

    error, state = load(run, Apply.ATOMIC)

    assert isinstance(error, CorruptData)
    assert changed_parts(state, BEFORE) == set()


def test_damaged_data_falls_back(run, skipped, caplog):
    flip(run.data_file(LAST), -1)

    with caplog.at_level(logging.WARNING, "dcp_resume"):
        result, state, steps = resume(run)

    assert result.step == OLDER
    assert changed_parts(state, OLDER) == set()
    assert steps == [OLDER]
    assert [event.step for event in skipped] == [NEWER]
    assert f"p{LAST}.w" in skipped[0].reason
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    with CheckpointManager(run.root, BLOCKING) as checkpoints:
        assert checkpoints.latest() == OLDER
        assert checkpoints.load(state_at(BEFORE)).step == OLDER


def test_nothing_is_whole(run):
    """The older checkpoint does not even open: what the newer one wrote is not hidden."""
    flip(run.data_file(LAST), -1)
    flip(run.attempt(OLDER) / "manifest.json", 40)
    state = state_at(BEFORE)

    with CheckpointManager(run.root, BLOCKING) as checkpoints:
        with pytest.raises(PartialLoad) as caught:
            checkpoints.resume(state)
        assert checkpoints.steps() == []

    assert set(caught.value.written_fqns) == changed_parts(state, BEFORE)


def test_an_asked_step_is_not_replaced_by_another(run):
    flip(run.attempt() / "catalog.json", 40)

    with CheckpointManager(run.root, BLOCKING) as checkpoints:
        with pytest.raises(CorruptData):
            checkpoints.resume(state_at(BEFORE), NEWER)
        assert checkpoints.steps() == [OLDER, NEWER]


def test_any_bit_of_a_data_file_is_noticed(run):
    """Header included: only bytes that no tensor of ours needs may be wrong without a word."""
    path = run.data_file(0)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")

    for position in flips(path, 5):
        error, _ = load(run)
        assert isinstance(error, (PartialLoad, CorruptData)) or position < header


def test_any_bit_of_the_log_is_noticed_or_harmless(run):
    for position in flips(run.commit_record(), 3):
        error, state = load(run)
        assert error is not None or changed_parts(state, NEWER) == set(), position


@pytest.mark.parametrize("name", ["manifest.json", "catalog.json", "chunk-index"])
def test_any_bit_of_a_document_is_noticed(run, name):
    for position in flips(run.attempt() / name, 97):
        error, state = load(run)
        assert isinstance(error, InvalidCheckpoint), position
        assert changed_parts(state, BEFORE) == set()


def test_overlapping_boxes(run):
    """As many elements as the tensor has, but one row twice and one never."""
    run.edit_index(_split_first_tensor)
    counts = {"chunks": NUM_PARTS + 1, "boxes": 3}
    run.edit_manifest(lambda manifest: manifest["counts"].update(counts))

    error, state = load(run)

    assert isinstance(error, InvalidDocument)
    assert kinds(error) == {"overlap"}
    assert changed_parts(state, BEFORE) == set()


def _split_first_tensor(index):
    """Six rows as two boxes of three that share a row."""
    counts = index.file_chunk_count.copy()
    counts[0] += 1
    values = np.concatenate([index.box_values, [0, 0, 3, 10, 2, 0, 3, 10]]).astype(np.uint64)
    ndim = np.append(index.box_ndim, [2, 2]).astype(np.uint8)
    first = len(index.box_ndim)
    return dataclasses.replace(
        index,
        file_chunk_count=counts,
        chunk_tensor=np.insert(index.chunk_tensor, 0, index.chunk_tensor[0]),
        chunk_box=np.append([first, first + 1], index.chunk_box[1:]).astype(np.uint32),
        box_ndim=ndim,
        box_values=values,
    )
