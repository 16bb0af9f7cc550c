"""Saves and resumes of a real job against a real S3 server, with faults on the wire.

Each ends in success or in a typed error by the retry deadline, with the checkpoint before it whole
and nothing left that no rule collects; `docs/explanation/faults.md` has the table.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from dcp_resume import CheckpointManager, RetryPolicy, SaveMode, Settings
from dcp_resume.errors import (
    CommitUnknown,
    DcpResumeError,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from dcp_resume.events import StorageRetried, subscribe
from dcp_resume.storage import open_store
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.inspection import Found, look_at
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.s3

ALWAYS = 10_000
DATA, LOG = "model-", "log/"
SMALL, LARGE = 1000, 5_000_000
"""Elements: one PUT, or two parts."""
DEADLINE_S = 120.0
TRIES = 5
"""After so many faults the deadline has passed by the policy's clock, on any machine."""


class Job:
    """A run on S3, reached through a proxy that does harm."""

    def __init__(self, server: S3Server, bucket: str, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self.bucket = bucket
        self._url = f"s3://{bucket}/{uuid.uuid4().hex}"
        self._server = server

    def manager(self, read_timeout_s: float = 0.5) -> CheckpointManager:
        options = self._server.storage_options_at(self.proxy.endpoint)
        options["config_kwargs"] = {"read_timeout": read_timeout_s}
        retry = RetryPolicy(DEADLINE_S, first_delay_s=0.01, max_delay_s=0.1, clock=self._clock)
        settings = Settings(mode=SaveMode.BLOCKING, retry=retry, storage_options=options)
        return CheckpointManager(self._url, settings)

    def _clock(self) -> float:
        return time.monotonic() + DEADLINE_S * (self.proxy.num_harmed // TRIES)

    def look(self) -> Found:
        with closing(open_store(self._url, storage_options=self._server.storage_options)) as store:
            return look_at(store)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    name = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(name)
    return name


@pytest.fixture
def job(s3_server: S3Server, bucket: str) -> Iterator[Job]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield Job(s3_server, bucket, proxy)


@pytest.fixture
def retried() -> Iterator[list[StorageRetried]]:
    seen: list[StorageRetried] = []
    unsubscribe = subscribe(lambda e: seen.append(e) if isinstance(e, StorageRetried) else None)
    yield seen
    unsubscribe()


def state_at(step: int, size: int = SMALL) -> dict[str, Any]:
    return {"model": {"w": torch.full((size,), float(step))}, "step": step}


def is_at(state: dict[str, Any], step: int) -> bool:
    return bool((state["model"]["w"] == step).all()) and state["step"] == step


PASSING = {
    "500": ("PUT", DATA, Fault.INTERNAL_ERROR, 3),
    "503 SlowDown": ("PUT", DATA, Fault.SLOW_DOWN, 3),
    "409 Conflict": ("PUT", LOG, Fault.CONFLICT, 1),
    "reset": ("PUT", DATA, Fault.RESET, 2),
    "no answer in time": ("PUT", DATA, Fault.STALL, 1),
    "answer lost after the write": ("PUT", DATA, Fault.DROP_ANSWER, 1),
    "answer lost after the commit": ("PUT", LOG, Fault.DROP_ANSWER, 1),
    "commit throttled": ("PUT", LOG, Fault.SLOW_DOWN, 3),
    "bytes changed on the way up": ("PUT", DATA, Fault.CORRUPT, 1),
    "listing cut short": ("GET", "list-type", Fault.TRUNCATE, 1),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_save_outlives(job, retried, name):
    method, part, fault, times = PASSING[name]
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1))
        job.proxy.inject(method, part, fault, times=times)
        checkpoints.save(2, state_at(2))

    assert retried or name == "answer lost after the commit"  # its repetition is an answer
    assert job.look() == Found((1, 2), (), (), ())


def test_a_save_outlives_a_slow_server(job):
    with job.manager(read_timeout_s=30.0) as checkpoints:
        checkpoints.save(1, state_at(1))
        job.proxy.inject("PUT", "step-", Fault.SLOW, times=TRIES - 1)
        checkpoints.save(2, state_at(2))
    assert job.look() == Found((1, 2), (), (), ())


FAILING = {
    "500 for ever": ("PUT", DATA, Fault.INTERNAL_ERROR, StorageUnavailable),
    "503 SlowDown for ever": ("PUT", DATA, Fault.SLOW_DOWN, StorageUnavailable),
    "resets for ever": ("PUT", DATA, Fault.RESET, StorageUnavailable),
    "silence for ever": ("PUT", DATA, Fault.STALL, StorageUnavailable),
    "listing fails for ever": ("GET", "list-type", Fault.INTERNAL_ERROR, StorageUnavailable),
    "denied": ("PUT", DATA, Fault.DENIED, StorageDenied),
    "expired credentials": ("PUT", DATA, Fault.EXPIRED, StorageDenied),
    "clock skew": ("PUT", DATA, Fault.SKEWED, StorageDenied),
    "bucket gone": ("PUT", DATA, Fault.NO_BUCKET, StorageError),
    "commit denied": ("PUT", LOG, Fault.DENIED, StorageDenied),
    "commit reset for ever": ("PUT", LOG, Fault.RESET, CommitUnknown),
    "commit throttled for ever": ("PUT", LOG, Fault.SLOW_DOWN, CommitUnknown),
    "commit without an answer for ever": ("PUT", LOG, Fault.DROP_ANSWER, CommitUnknown),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_save_fails_typed_and_training_goes_on(job, name):
    method, part, fault, kind = FAILING[name]
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1))
        job.proxy.inject(method, part, fault, times=ALWAYS)
        with pytest.raises(DcpResumeError) as caught:
            checkpoints.save(2, state_at(2))
        job.proxy.heal()
        during = job.look()
        checkpoints.save(3, state_at(3))

    assert isinstance(caught.value, kind)
    assert (during.problems, during.strays, during.unfinished) == ((), (), ())
    if kind is CommitUnknown:
        # The next append first settles the one whose outcome was unknown: it is there.
        assert job.look() == Found((1, 2, 3), (), (), ())
    else:
        assert during.steps == (1,)
        assert job.look() == Found((1, 3), (), (), ())


PARTS = {
    "a part throttled": ("PUT", "partNumber=2", Fault.SLOW_DOWN, 2, None),
    "a part changed on the way up": ("PUT", "partNumber=1", Fault.CORRUPT, 1, None),
    "completion without an answer": ("POST", "uploadId=", Fault.DROP_ANSWER, 1, None),
    "wrong ETag of a part": ("PUT", "partNumber=2", Fault.WRONG_ETAG, ALWAYS, StorageError),
    "a part denied": ("PUT", "partNumber=2", Fault.DENIED, ALWAYS, StorageDenied),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_save_in_parts(job, name):
    method, part, fault, times, kind = PARTS[name]
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1))
        job.proxy.inject(method, part, fault, times=times)
        error = None
        try:
            checkpoints.save(2, state_at(2, LARGE))
        except StorageError as failure:
            error = failure

    assert type(error) is (kind or type(None))
    assert job.look() == Found((1,) if kind else (1, 2), (), (), ())


LOADS = {
    "500": ("GET", DATA, Fault.INTERNAL_ERROR, 3),
    "503 SlowDown": ("GET", "", Fault.SLOW_DOWN, 3),
    "reset": ("GET", DATA, Fault.RESET, 1),
    "no answer in time": ("GET", DATA, Fault.STALL, 1),
    "body cut short": ("GET", DATA, Fault.TRUNCATE, 2),
    "document cut short": ("GET", "manifest.json", Fault.TRUNCATE, 1),
    "bytes changed on the way down": ("GET", DATA, Fault.CORRUPT, 1),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_resume_outlives(job, retried, name):
    method, part, fault, times = LOADS[name]
    state = state_at(0)
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.save(2, state_at(2))
    with job.manager() as checkpoints:
        job.proxy.inject(method, part, fault, times=times)
        result = checkpoints.resume(state)

    assert result.step == 2
    assert is_at(state, 2)
    assert retried


DOWN = {
    "500 for ever": (DATA, Fault.INTERNAL_ERROR, StorageUnavailable),
    "503 SlowDown for ever": (DATA, Fault.SLOW_DOWN, StorageUnavailable),
    "silence for ever": (DATA, Fault.STALL, StorageUnavailable),
    "cut short for ever": (DATA, Fault.TRUNCATE, StorageUnavailable),
    "a document fails for ever": ("manifest.json", Fault.INTERNAL_ERROR, StorageUnavailable),
    "denied": (DATA, Fault.DENIED, StorageDenied),
    "expired credentials": ("catalog.json", Fault.EXPIRED, StorageDenied),
    "bucket gone": (DATA, Fault.NO_BUCKET, StorageError),
}


@pytest.mark.parametrize("name", DOWN)
def test_a_store_that_fails_is_never_a_reason_to_fall_back(job, name):
    part, fault, kind = DOWN[name]
    state = state_at(0)
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.save(2, state_at(2))
    job.proxy.inject("GET", part, fault, times=ALWAYS)
    with job.manager() as checkpoints:
        with pytest.raises(kind):
            checkpoints.resume(state)
        job.proxy.heal()
        assert job.look() == Found((1, 2), (), (), ())
        result = checkpoints.resume(state)

    assert result.step == 2
    assert is_at(state, 2)


def test_a_bucket_that_vanishes_and_comes_back(job, s3_server):
    client = s3_server.client()
    bucket = f"gone-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    lonely = Job(s3_server, bucket, job.proxy)
    with lonely.manager() as checkpoints:
        checkpoints.save(1, state_at(1))
        for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=entry["Key"])
        client.delete_bucket(Bucket=bucket)
        with pytest.raises(StorageError):
            checkpoints.save(2, state_at(2))
