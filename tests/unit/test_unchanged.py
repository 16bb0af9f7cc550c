"""A save of what changed alone: what is written, what is referred to, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from dcp_resume import (
    CheckpointManager,
    HmacKey,
    LoadOptions,
    Prove,
    SaveMode,
    Settings,
    SignedBy,
    Signing,
    TensorDigests,
    Unchanged,
    open_store,
)
from dcp_resume.cli.exit_codes import ExitCode
from dcp_resume.cli.main import main
from dcp_resume.errors import ConfigurationError, MissingAncestors, ParentRetired
from dcp_resume.events import ChangesWritten, Event, ParentUnread, StepReached, subscribe
from dcp_resume.manager.policies import KeepLast
from dcp_resume.manager.retention import prune
from dcp_resume.session import marks
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.load import Located
from dcp_resume.session.materialize import materialize
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.rewriting import RewriteOptions
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.sweep import read_needs
from dcp_resume.session.verify import verify_checkpoint
from tests.support.damage import flip

KEY = HmacKey("team", bytes(range(32)))


def settings(**changes: Any) -> Settings:
    return Settings(mode=SaveMode.BLOCKING, unchanged=Unchanged.REFER, **changes)


def fresh() -> dict[str, Any]:
    """Two blocks and a bit of frozen numbers, an adapter, a small frozen tensor and a counter."""
    model = {
        "frozen": torch.arange(40_000.0),
        "adapter": torch.zeros(2_000),
        "small": torch.ones(9),
    }
    return {"model": model, "trainer": {"step": 0}}


def at(step: int) -> dict[str, Any]:
    state = fresh()
    state["model"]["adapter"].fill_(step)
    state["trainer"]["step"] = step
    return state


def save(checkpoints: CheckpointManager, *steps: int) -> list[ChangesWritten]:
    """Save steps, and say what each wrote; of a save in full there is nothing to say."""
    seen: list[ChangesWritten] = []

    def note(event: Event) -> None:
        if isinstance(event, ChangesWritten):
            seen.append(event)

    unsubscribe = subscribe(note)
    for step in steps:
        checkpoints.save(step, at(step))
    unsubscribe()
    return seen


def open_step(root: Path, step: int | str = "latest") -> OpenedCheckpoint:
    store = open_store(str(root))
    (located,) = find_checkpoints(store, step)
    return open_checkpoint(store, located.prefix, located.manifest)


def bases(opened: OpenedCheckpoint) -> set[str]:
    return {file.base for file in opened.catalog.files}


def is_whole(root: Path, step: int | str = "latest") -> bool:
    store = open_store(str(root))
    (located,) = find_checkpoints(store, step)
    return not verify_checkpoint(store, located).problems


def assert_loads(root: Path, step: int, **changes: Any) -> None:
    state, expected = fresh(), at(step)
    for tensor in state["model"].values():
        tensor.fill_(-7)
    with CheckpointManager(str(root), settings(**changes)) as checkpoints:
        checkpoints.load(state, step)
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, expected["model"][name]), name
    assert state["trainer"] == expected["trainer"]


def test_only_changed_chunks_are_written_and_each_elder_is_named_directly(tmp_path):
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        written = save(checkpoints, 1, 2, 3)
        commits = checkpoints.history().commits
    assert [(w.step, w.referenced_bytes) for w in written] == [(2, 160_036), (3, 160_036)]
    assert all(8_000 <= w.written_bytes <= 8_000 + 512 for w in written)
    first = f"step-00000001/{commits[2].attempt}"
    assert [bases(open_step(tmp_path, step)) for step in (1, 2, 3)] == [
        {"self"},
        {"self", first},
        {"self", first},
    ]
    assert [commits[seq].references for seq in (2, 3, 4)] == [(), (2,), (2,)]
    keys = [file.key for file in open_step(tmp_path).catalog.files if file.base == "self"]
    assert all(key.endswith(".part") for key in keys)
    for step in (1, 2, 3):
        assert is_whole(tmp_path, step)
        assert_loads(tmp_path, step)


def test_without_a_change_there_is_no_data_file_at_all(tmp_path):
    state = at(1)
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(2, state)
    opened = open_step(tmp_path)
    assert "self" not in bases(opened)
    assert {path.name for path in (tmp_path / opened.prefix).iterdir()} == {
        "manifest.json",
        "catalog.json",
        "chunk-index",
    }
    assert is_whole(tmp_path)


def test_by_default_everything_is_written(tmp_path):
    with CheckpointManager(str(tmp_path), Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        assert save(checkpoints, 1, 2) == []
    assert bases(open_step(tmp_path)) == {"self"}


def test_a_file_of_which_little_is_needed_is_not_kept_for_it(tmp_path):
    """What did not change is written once more, to a file that later saves keep whole."""

    def state(step: int) -> dict[str, Any]:
        return {"model": {"ema": torch.arange(1_000.0), "w": torch.full((3_000,), float(step))}}

    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state(step))
        attempts = {seq: record.attempt for seq, record in checkpoints.history().commits.items()}
    assert bases(open_step(tmp_path, 2)) == {"self"}
    for step in (3, 4):
        assert bases(open_step(tmp_path, step)) == {"self", f"step-00000002/{attempts[3]}"}
        assert is_whole(tmp_path, step)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.update(frozen=model["frozen"].double()),
        lambda model: model.update(frozen=model["frozen"].reshape(200, 200)),
        lambda model: model.update(frosty=model.pop("frozen")),
        lambda model: model["frozen"][-1].add_(1),
        lambda model: model["frozen"].view(torch.int32).bitwise_xor_(1),
    ],
    ids=["dtype", "shape", "name", "one element", "last bits"],
)
def test_any_change_of_a_chunk_is_written(tmp_path, change):
    state = at(1)
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        checkpoints.save(1, state)
        change(state["model"])
        checkpoints.save(2, state)
    opened = open_step(tmp_path)
    (name,) = {"frozen", "frosty"} & state["model"].keys()
    (chunk,) = opened.index.chunks_of(opened.tensor_ids[f"model.{name}"]).tolist()
    assert opened.catalog.files[opened.index.chunk_file[chunk]].base == "self"
    loaded = {"model": {key: torch.zeros_like(t) for key, t in state["model"].items()}}
    loaded["trainer"] = {"step": 0}
    with CheckpointManager(str(tmp_path)) as checkpoints:
        checkpoints.load(loaded)
    for key, tensor in loaded["model"].items():
        assert torch.equal(tensor, state["model"][key])


def test_after_a_resume_the_index_tells_what_is_unchanged(tmp_path):
    """Of chunks of at least a block. Smaller ones are written, and once more apart from others."""
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        save(checkpoints, 1, 2)
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        checkpoints.resume(fresh())
        written = save(checkpoints, 3, 4, 5)
    assert [w.referenced_bytes for w in written] == [160_000, 160_000, 160_036]
    assert_loads(tmp_path, 5)


def test_signed_checkpoints_compare_what_their_signature_rests_on(tmp_path):
    signing = Signing(KEY, SignedBy(KEY))
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        save(checkpoints, 1)
    with CheckpointManager(str(tmp_path), settings(signing=Signing(KEY))) as checkpoints:
        checkpoints.resume(fresh())
        assert [w.referenced_bytes for w in save(checkpoints, 2, 3)] == [0, 160_036]
    store = open_store(str(tmp_path))
    (located,) = find_checkpoints(store, 3)
    opened = open_checkpoint(store, located.prefix, located.manifest, trust=signing.trust)
    assert opened.manifest.digest.algorithm == "sha256-128"
    assert_loads(tmp_path, 3)


def test_tensor_digests_cover_what_is_referred_to(tmp_path):
    record = settings(tensor_digests=TensorDigests.RECORD)
    with CheckpointManager(str(tmp_path), record) as checkpoints:
        save(checkpoints, 1, 2)
    assert_loads(tmp_path, 2, load=LoadOptions(prove=Prove.TENSORS))


def test_pruning_keeps_exactly_the_keys_that_are_needed(tmp_path):
    with CheckpointManager(str(tmp_path), settings(retention=KeepLast(1))) as checkpoints:
        save(checkpoints, 1, 2, 3)
        checkpoints.wait()
        history = checkpoints.history()
    assert sorted(history.retired) == [2, 3]
    store = open_store(str(tmp_path))
    newest = history.newest()
    assert newest is not None
    needed = read_needs(store, newest.record)
    assert {info.key for info in store.list("step-")} == needed
    assert len({key.split("/")[0] for key in needed}) == 2
    assert is_whole(tmp_path)
    assert_loads(tmp_path, 3)


def test_a_retire_of_what_is_referred_to_refuses_the_commit_and_the_next_save_is_in_full(tmp_path):
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        save(checkpoints, 1, 2)
        store = open_store(str(tmp_path))
        log = RunLog(store)

        def retire_the_elder(event: Event) -> None:
            if isinstance(event, StepReached) and (event.number, event.step) == (4, 3):
                log.refresh()
                marks.retire(log, 2)

        unsubscribe = subscribe(retire_the_elder)
        with pytest.raises(ParentRetired, match="Save it in full"):
            checkpoints.save(3, at(3))
        unsubscribe()
        assert save(checkpoints, 4) == []
        assert bases(open_step(tmp_path, 4)) == {"self"}
        assert [w.referenced_bytes for w in save(checkpoints, 5)] == [160_036]
    assert_loads(tmp_path, 5)


@pytest.mark.parametrize("target", [2, 3], ids=["elder", "parent"])
def test_nothing_of_a_quarantined_checkpoint_is_referred_to(tmp_path, target):
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        save(checkpoints, 1, 2)
        marks.quarantine(RunLog(open_store(str(tmp_path))), target)
        save(checkpoints, 3)
        damaged = checkpoints.history().commits[target].attempt
    assert all(damaged not in base for base in bases(open_step(tmp_path, 3)))
    assert_loads(tmp_path, 3)


def test_a_parent_that_cannot_be_read_costs_a_full_save_and_a_warning(tmp_path):
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        save(checkpoints, 1)
    index = tmp_path / open_step(tmp_path).prefix / "chunk-index"
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        checkpoints.resume(fresh())
        flip(index, -1)
        unsubscribe = subscribe(seen.append)
        checkpoints.save(2, at(2))
        unsubscribe()
    assert [event.step for event in seen if isinstance(event, ParentUnread)] == [2]
    assert bases(open_step(tmp_path, 2)) == {"self"}
    assert_loads(tmp_path, 2)


def test_another_block_size_writes_everything_once(tmp_path):
    """Above 64 MiB blocks are larger, and the parent's digests are of no use."""
    state = {"model": {"w": torch.arange(1_000_000.0)}}
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        checkpoints.save(1, state)
        state["model"]["more"] = torch.zeros(17_000_000)
        checkpoints.save(2, state)
        checkpoints.save(3, state)
    assert bases(open_step(tmp_path, 2)) == {"self"}
    assert "self" not in bases(open_step(tmp_path, 3))
    assert is_whole(tmp_path, 3)


def test_a_stock_reader_misses_tensors_and_never_loads_a_part(tmp_path):
    with CheckpointManager(str(tmp_path), settings()) as checkpoints:
        save(checkpoints, 1, 2)
    directory = tmp_path / open_step(tmp_path).prefix
    target = {"model.adapter": torch.zeros(2_000)}
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    assert not target["model.adapter"].any()


class TestMaterialize:
    """A checkpoint that needs no other."""

    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "run"
        recorded = settings(tensor_digests=TensorDigests.RECORD)
        with CheckpointManager(str(root), recorded) as checkpoints:
            save(checkpoints, 1, 2, 3)
        return root

    def test_a_directory_alone_is_refused_with_the_files_it_lacks_and_the_remedy(self, root):
        opened = open_step(root)
        with pytest.raises(MissingAncestors) as caught:
            open_checkpoint(open_store(str(root / opened.prefix)), "", None)
        message = str(caught.value)
        assert "dcp-resume materialize RUN --step 3" in message
        assert [p.where for p in caught.value.problems] == [
            opened.file_key(number)
            for number, file in enumerate(opened.catalog.files)
            if file.base != "self"
        ]

    def test_afterwards_its_elders_can_be_pruned(self, root):
        store = open_store(str(root))
        (located,) = find_checkpoints(store, 3)
        result = materialize(store, located, store, RewriteOptions())
        assert result.step == 3
        log = RunLog(store)
        assert [one.entry.seq for one in prune(store, log, KeepLast(1))] == [2, 3, 4]
        assert {info.key.rpartition("/")[0] + "/" for info in store.list("step-")} == {
            result.prefix
        }
        alone = open_store(str(root / result.prefix))
        opened = open_checkpoint(alone, "", None)
        assert bases(opened) == {"self"}
        assert all(file.key.endswith(".safetensors") for file in opened.catalog.files)
        assert not verify_checkpoint(alone, Located(0, "", None), prove=Prove.TENSORS).problems
        assert_loads(root, 3)

    def test_the_verb_says_what_it_wrote(self, root, capsys):
        assert main(["materialize", str(root), "--json"]) == ExitCode.OK
        document = json.loads(capsys.readouterr().out)
        assert (document["step"], document["num_files"]) == (3, 1)
        assert document["num_bytes"] == open_step(root).manifest.counts.num_bytes
        assert main(["materialize", str(root), "--step", "2"]) == ExitCode.USAGE
        assert "not the newest" in capsys.readouterr().err
        other = f"{root}-2"
        assert main(["materialize", str(root), "--step", "2", "--into", other]) == ExitCode.OK
        assert_loads(Path(other), 2)
        for verb in (["inspect", str(root)], ["diff", str(root), str(root), "--step", "2"]):
            assert main(verb) in (ExitCode.OK, ExitCode.PROBLEM)
        alone = root / open_step(root).prefix
        assert main(["materialize", str(alone)]) == ExitCode.USAGE

    def test_what_is_not_the_newest_can_only_go_to_another_run(self, root, tmp_path):
        store, other = open_store(str(root)), open_store(str(tmp_path / "other"))
        (located,) = find_checkpoints(store, 2)
        before = RunLog(store).refresh().last_seq
        with pytest.raises(ConfigurationError, match="not the newest"):
            materialize(store, located, store, RewriteOptions())
        assert RunLog(store).refresh().last_seq == before
        materialize(store, located, other, RewriteOptions())
        assert_loads(tmp_path / "other", 2)
