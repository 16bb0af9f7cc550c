"""Who may read and write: the umask rules files; a bucket's policy can be as narrow as we say."""

from __future__ import annotations

import json
import os
import re
import stat
import uuid
from pathlib import Path

import pytest
import torch

from dcp_resume import CheckpointManager, SaveMode, Settings, events, open_store, preflight
from dcp_resume.errors import StorageDenied

PAGE = Path(__file__).parents[2] / "docs/how-to/store-on-s3.md"


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True, ids=oct)
def test_files_and_directories_have_the_modes_that_the_umask_leaves(umask, tmp_path):
    root = tmp_path / "made" / "run"
    with CheckpointManager(root, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.ones(8)}})
    paths = [root.parent, root, *root.rglob("*")]
    modes = {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in paths}
    assert modes == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}


def policy_of_page(bucket: str) -> dict:
    """The policy of the page, for a bucket, with everybody as its principal."""
    (text,) = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    policy = json.loads(text.replace("arn:aws:s3:::training", f"arn:aws:s3:::{bucket}"))
    return {**policy, "Statement": [{**s, "Principal": "*"} for s in policy["Statement"]]}


@pytest.mark.s3
def test_the_policy_of_the_page_is_enough_and_holds_the_job_to_its_run(s3_server):
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    admin, options = s3_server.client(), s3_server.job_options
    settings = Settings(storage_options=options, mode=SaveMode.BLOCKING, max_checkpoint_keep=1)
    url = f"s3://{bucket}/llama-7b/run-17"
    report = preflight(url, settings)
    assert [check.name for check in report.checks if check.verdict.value == "fail"] == ["reach"]

    policy = policy_of_page(bucket)
    admin.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    preflight(url, settings).require()
    seen: list[events.Event] = []
    stop = events.subscribe(seen.append)
    large = torch.arange(5 << 20, dtype=torch.float32)  # 20 MiB: a multipart upload
    with CheckpointManager(url, settings) as checkpoints:
        checkpoints.save(1, {"model": {"w": large}})
        checkpoints.save(2, {"model": {"w": large + 1}})
        found = {"model": {"w": torch.zeros_like(large)}}
        assert checkpoints.load(found).step == 2
    stop()
    assert torch.equal(found["model"]["w"], large + 1)
    failures = [event for event in seen if isinstance(event, events.RetentionFailed)]
    assert [event.step for event in failures] == [1]  # the policy lets nobody delete a checkpoint
    keys = {o["Key"] for o in admin.list_objects_v2(Bucket=bucket)["Contents"]}
    assert all(key.startswith("llama-7b/run-17/") for key in keys)
    assert any("/step-00000001/" in key for key in keys)
    assert not any("/probe/" in key for key in keys)

    with pytest.raises(StorageDenied):
        open_store(f"s3://{bucket}/llama-7b/run-18", storage_options=options).write(
            "data", [memoryview(b"x")]
        )

    policy["Statement"][-1]["Resource"] = f"arn:aws:s3:::{bucket}/llama-7b/run-17/*"
    admin.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    seen.clear()
    stop = events.subscribe(seen.append)
    with CheckpointManager(url, settings) as checkpoints:
        checkpoints.resume(found)
        checkpoints.save(3, found)
    stop()
    assert not [event for event in seen if isinstance(event, events.RetentionFailed)]
