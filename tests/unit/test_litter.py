"""What belongs to no checkpoint goes; what may still become one stays, or is given up first."""

from __future__ import annotations

import os
import uuid

import pytest

from dcp_resume.errors import CommitRefused, InvalidDocument, KeyNotFound
from dcp_resume.manifest.keys import PROBE_PREFIX, attempt_prefix
from dcp_resume.manifest.models import DocumentRef, TrainerFacts
from dcp_resume.session.commit import commit
from dcp_resume.session.litter import find_litter, grace_limit, remove_litter
from dcp_resume.session.sweep import sweep
from dcp_resume.storage import open_store, read_clock
from dcp_resume.storage.posix_store import PosixStore
from tests.support.built_run import SHARD, BuiltRun

HOUR_S = 3600.0


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def run(request, tmp_path):
    if request.param == "local":
        yield BuiltRun(PosixStore(tmp_path / "run"))
        return
    url = f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}"
    options = request.getfixturevalue("s3_server").storage_options
    store = open_store(url, storage_options=options)
    yield BuiltRun(store)
    store.close()


def find(run, grace_s=0.0):
    # A store tells times in whole seconds or finer: -1 makes all of the past old enough.
    return find_litter(run.store, run.log, until_s=grace_limit(run.store, grace_s or -1.0))


def test_the_storages_clock_tells_the_age(run):
    before = read_clock(run.store, PROBE_PREFIX)
    run.attempt(10)
    [info] = run.store.list("step-")
    assert before <= info.modified_s <= read_clock(run.store, PROBE_PREFIX)
    assert list(run.store.list(PROBE_PREFIX)) == []


def test_litter_goes_and_checkpoints_stay(run):
    run.save(10, 20)
    attempt = run.attempt(30)
    run.store.write("probe/x/probe-1", [memoryview(b"x")])
    kept = [key for key in run.attempt_keys() if not key.startswith("step-00000030/")]
    litter = find(run)
    assert list(litter.attempts) == [attempt]
    assert litter.num_objects == 2
    assert find(run, HOUR_S).num_objects == 0
    swept = remove_litter(run.store, run.log, litter)
    assert (swept.num_files, swept.num_bytes) == (2, 5)
    assert run.attempt_keys() == kept
    assert list(run.store.list(PROBE_PREFIX)) == []
    assert find(run).num_objects == 0


def test_one_young_file_keeps_a_whole_attempt(tmp_path):
    run = BuiltRun(PosixStore(tmp_path / "run"))
    run.attempt(30)
    old = tmp_path / "run" / next(iter(run.attempt_keys()))
    os.utime(old, (1.0, 1.0))
    young = old.with_name("shard-00002-model-00001-of-00001.safetensors")
    young.write_bytes(b"x")
    assert find(run, HOUR_S).attempts == {}
    os.utime(young, (1.0, 1.0))
    assert len(find(run, HOUR_S).attempts) == 1


def commit_of(run, step, attempt):
    return commit(
        run.log,
        generation=run.generation,
        step=step,
        attempt=attempt,
        manifest=DocumentRef(
            key=attempt_prefix(step, attempt) + "manifest.json", size=1, digest=""
        ),
        parent=None,
        references=(),
        planned_at=run.log.last_seq,
        num_bytes=1,
        trainer=TrainerFacts(step=step),
    )


def test_a_save_whose_attempt_was_collected_is_refused_not_half_there(run):
    run.save(10)
    attempt = run.attempt(20)
    remove_litter(run.store, run.log, find(run))
    with pytest.raises(CommitRefused, match="gave its attempt"):
        commit_of(run, 20, attempt)
    assert run.log.history.newest().record.step == 10


def test_what_was_given_up_but_not_deleted_goes_the_next_time(run):
    attempt = run.attempt(20)
    litter = find(run)
    remove_litter(run.store, run.log, litter)
    last_seq = run.log.last_seq
    run.store.write(attempt_prefix(20, attempt) + SHARD, [memoryview(b"late")])  # a slow rank
    again = find(run)
    assert list(again.attempts) == [attempt]
    remove_litter(run.store, run.log, again)
    assert run.attempt_keys() == []
    assert run.log.last_seq == last_seq, "it was given up already"


def test_many_attempts_are_given_up_in_records_that_readers_accept(tmp_path, monkeypatch):
    run = BuiltRun(PosixStore(tmp_path / "run"))
    for number in range(1001):
        path = tmp_path / "run" / f"step-{number:08d}" / f"{number:032d}" / SHARD
        path.parent.mkdir(parents=True)
        path.touch()
    before = run.log.last_seq
    remove_litter(run.store, run.log, find(run))
    assert run.log.last_seq == before + 2
    assert run.attempt_keys() == []


def test_keys_that_are_no_attempts_are_left_alone(run):
    run.save(10)
    for key in ("step-1/x", "step-00000001.txt", "notes/step-00000001/a/b", "model.safetensors"):
        run.store.write(key, [memoryview(b"mine")])
    before = {info.key for info in run.store.list("")}
    litter = find(run)
    assert litter.num_objects == 0
    remove_litter(run.store, run.log, litter)
    assert {info.key for info in run.store.list("")} == before


def test_temporary_files_of_dead_writers(tmp_path):
    run = BuiltRun(PosixStore(tmp_path / "run"))
    run.save(10)
    [manifest] = (tmp_path / "run").glob("step-00000010/*/manifest.json")
    temps = [
        manifest.with_name(".tmp-0123456789abcdef"),
        tmp_path / "run/log/.tmp-0123456789abcde0",
    ]
    for temp in temps:
        temp.write_bytes(b"half")
    litter = find(run)
    assert len(litter.unfinished) == 2
    assert find(run, HOUR_S).unfinished == ()
    remove_litter(run.store, run.log, litter)
    assert not any(temp.exists() for temp in temps)
    assert manifest.exists()


@pytest.mark.s3
def test_unfinished_uploads_of_dead_writers(s3_server, bucket):
    store = open_store(f"s3://{bucket}/run", storage_options=s3_server.storage_options)
    run = BuiltRun(store)
    run.save(10)
    client = s3_server.client()
    ours = f"run/step-00000020/a9/{SHARD}"
    others = f"run-of-others/step-00000020/a9/{SHARD}"
    for key in (ours, others):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    assert find(run, HOUR_S).unfinished == ()
    litter = find(run)
    assert len(litter.unfinished) == 1
    remove_litter(store, run.log, litter)
    uploads = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in uploads] == [others]
    store.close()


def test_only_retired_checkpoints_are_swept(run):
    run.save(10, 20)
    seq = run.find(10).seq
    with pytest.raises(ValueError, match="not retired"):
        sweep(run.store, run.log.history, seq)
    assert len(run.attempt_keys()) == 8


def test_a_record_that_names_another_place_deletes_nothing(run):
    """A hostile commit record cannot aim a sweep at another directory."""
    attempt = run.attempt(5)
    run.save(10)
    commit(
        run.log,
        generation=1,
        step=20,
        attempt="b",
        manifest=DocumentRef(key=attempt_prefix(10, "a2") + "manifest.json", size=1, digest=""),
        parent=None,
        references=(),
        planned_at=run.log.last_seq,
        num_bytes=1,
        trainer=TrainerFacts(step=20),
    )
    run.save(30)
    run.retire(20)
    before = run.attempt_keys()
    with pytest.raises(InvalidDocument, match="outside its own directory"):
        sweep(run.store, run.log.history, max(run.log.history.retired))
    assert run.attempt_keys() == before
    assert list(find(run).attempts) == [attempt]


def test_a_store_whose_listing_hides_what_was_written_has_no_clock(tmp_path):
    class Hiding(PosixStore):
        def list(self, prefix, *, start_after=""):
            return iter(())

    with pytest.raises(KeyNotFound, match="does not list"):
        read_clock(Hiding(tmp_path), PROBE_PREFIX)
