"""Each thing that would stop a run is found before it, said with its remedy, and leaves nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dcp_resume import CheckpointManager, RetryPolicy, Settings, open_store, preflight
from dcp_resume.cli.main import main
from dcp_resume.errors import PreflightFailed, StorageDenied
from dcp_resume.session.preflight import Need, PreflightReport, Verdict, run_preflight
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.storage.posix_store import PosixStore
from tests.support.damage import flip, small_files
from tests.support.free_ports import free_ports

NAMES = ["reach", "log", "create", "read back", "clock", "space", "ranks", "versions", "delete"]
HOUR_S = 3600.0
SMALL = Need()
AN_HOUR_BEHIND = "the store's clock is 3600 s behind"


class Overwriting(PosixStore):
    """Like an S3 server that ignores ``If-None-Match``."""

    def create(self, key, data):
        self.write(key, [memoryview(data)])


class Undeletable(PosixStore):
    """A store whose policy lacks one right."""

    def delete(self, keys):
        raise StorageDenied("no right to delete", url=self.url, key=next(iter(keys)))


class Sticky(PosixStore):
    """A store that says yes to a delete, and keeps the objects."""

    def delete(self, keys):
        list(keys)


class Early(PosixStore):
    """A store whose clock is an hour behind."""

    def list(self, prefix, *, start_after=""):
        for info in super().list(prefix, start_after=start_after):
            yield dataclasses.replace(info, modified_s=info.modified_s - HOUR_S)


def ask(store, need=SMALL):
    report = run_preflight(store, LonelyVotes(), need)
    assert [check.name for check in report.checks] == NAMES
    return {check.name: check for check in report.checks}


def verdicts(checks, verdict):
    return [name for name, check in checks.items() if check.verdict is verdict]


def files(root):
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_good_directory_is_ready_and_left_as_it_was(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    checks = ask(PosixStore(tmp_path))
    assert verdicts(checks, Verdict.OK) == NAMES
    assert not any(check.remedy for check in checks.values())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_exists_is_described_and_not_opened(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(7, {"model": {"w": torch.ones(2)}}).result()
    before = sorted(files(tmp_path))
    checks = ask(PosixStore(tmp_path))
    assert checks["log"].found == "1 checkpoint(s), the newest of step 7, generation 1"
    assert sorted(files(tmp_path)) == before


def test_a_damaged_log_is_found(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(7, {"model": {"w": torch.ones(2)}}).result()
    flip(tmp_path / "log" / "000000000002.json", 40)
    checks = ask(PosixStore(tmp_path))
    assert verdicts(checks, Verdict.FAIL) == ["log"]
    assert "000000000002.json" in checks["log"].found


def test_a_store_without_exclusive_create_is_refused_and_left_clean(tmp_path):
    checks = ask(Overwriting(tmp_path))
    assert verdicts(checks, Verdict.FAIL) == ["create"]
    assert verdicts(checks, Verdict.NOT_TRIED) == ["read back", "clock", "ranks"]
    assert "If-None-Match" in checks["create"].remedy
    assert files(tmp_path) == []


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    checks = ask(PosixStore(tmp_path / "file" / "run"))
    assert verdicts(checks, Verdict.FAIL)[0] == "create"


def test_a_disk_that_refuses_larger_files(tmp_path):
    with small_files(100_000):
        checks = ask(PosixStore(tmp_path))
    assert verdicts(checks, Verdict.FAIL) == ["read back"]
    assert files(tmp_path) == []


@pytest.mark.parametrize("kind", [Undeletable, Sticky])
def test_a_store_that_keeps_what_was_deleted(tmp_path, kind):
    checks = ask(kind(tmp_path))
    assert verdicts(checks, Verdict.FAIL) == ["delete"]
    assert "probe/" in checks["delete"].found + checks["delete"].remedy


def test_a_store_whose_clock_is_wrong_is_a_warning(tmp_path):
    checks = ask(Early(tmp_path))
    assert verdicts(checks, Verdict.WARN) == ["clock"]
    assert checks["clock"].found in ("the store's clock is 3599 s behind", AN_HOUR_BEHIND)


def test_space_is_compared_with_what_the_run_keeps(tmp_path):
    store = PosixStore(tmp_path)
    free = store.free_bytes()
    assert verdicts(ask(store, Need(2 * free)), Verdict.FAIL) == ["space"]
    crowded = ask(store, Need(free // 3, num_kept=5))
    assert verdicts(crowded, Verdict.WARN) == ["space"]
    assert "needs 6 at a time" in crowded["space"].found
    assert verdicts(ask(store, Need(free // 1000, num_kept=5)), Verdict.OK) == NAMES


def test_the_state_says_how_large_a_checkpoint_will_be(tmp_path):
    model = torch.nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        report = preflight(tmp_path, state={"model": model, "optim": optimizer, "epoch": 1})
        (space,) = [check for check in report.checks if check.name == "space"]
        assert "about 3.0 MiB" in space.found
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()


def test_require_raises_what_failed_with_its_remedy(tmp_path):
    report = run_preflight(Overwriting(tmp_path), LonelyVotes(), Need())
    assert not report.is_ready
    with pytest.raises(PreflightFailed, match="1 check") as caught:
        report.require()
    (problem,) = caught.value.problems
    assert problem.where == "create"
    assert "Grant the rights" in problem.message
    assert PreflightReport.from_bytes(report.to_bytes()) == report


def test_what_a_broken_off_preflight_made_is_removed(tmp_path):
    class Interrupted(PosixStore):
        def write(self, key, buffers, *, size=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_preflight(Interrupted(tmp_path), LonelyVotes(), Need())
    assert files(tmp_path) == []


def test_doctor_prints_a_table_json_and_an_exit_code(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "run"), "--size", "1.5KiB", "--keep", "2"]) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines()[1:-1]] == NAMES
    assert out.endswith("is ready\n")
    assert main(["doctor", str(tmp_path / "run"), "--size", "999999TiB", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["is_ready"] is False
    assert [c["name"] for c in document["checks"] if c["verdict"] == "fail"] == ["space"]
    assert main(["doctor", str(tmp_path / "run"), "--size", "999999TiB"]) == 1
    assert "NOT ready\n  - space: Free space" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path), "--size", "many"]) == 2


@pytest.mark.s3
def test_a_bucket_is_ready_and_left_empty(s3_server, bucket):
    store = open_store(f"s3://{bucket}/run", storage_options=s3_server.storage_options)
    checks = ask(store)
    assert verdicts(checks, Verdict.OK) == NAMES
    assert "tells no limit" in checks["space"].found
    assert "Contents" not in s3_server.client().list_objects_v2(Bucket=bucket)
    store.close()


@pytest.mark.s3
def test_wrong_credentials_bucket_or_endpoint_are_told_apart(s3_server, bucket):
    right = s3_server.storage_options
    (nobody,) = free_ports(1)
    nowhere = {**right, "endpoint_url": f"http://127.0.0.1:{nobody}"}
    for url, options, patience_s, expected in (
        (f"s3://{bucket}/run", {**right, "secret": "wrong"}, 60, "credentials"),
        ("s3://no-such-bucket/run", right, 60, "Create the bucket"),
        (f"s3://{bucket}/run", nowhere, 0.5, "reachable"),
    ):
        settings = Settings(storage_options=options, retry=RetryPolicy(deadline_s=patience_s))
        report = preflight(url, settings)
        checks = {check.name: check for check in report.checks}
        assert verdicts(checks, Verdict.FAIL) == ["reach"]
        assert expected in checks["reach"].found
        assert len(verdicts(checks, Verdict.NOT_TRIED)) == 6


def test_a_store_that_lies_about_its_bytes_is_found(tmp_path):
    class Lying(PosixStore):
        def read_into(self, key, reads):
            super().read_into(key, reads)
            reads[0].into[0] ^= 1

    checks = ask(Lying(tmp_path))
    assert verdicts(checks, Verdict.FAIL) == ["read back"]
