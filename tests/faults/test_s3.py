"""Saves and resumes of a real job against a real S3 server, with faults on the wire.

Each ends in success or in a typed error by the retry deadline, with the checkpoint before it whole
and nothing left that no rule collects; `docs/explanation/faults.md` has the table.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from dcp_resume import CheckpointManager, RetryPolicy, SaveMode, Settings
from dcp_resume.errors import (
    CommitUnknown,
    DcpResumeError,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from dcp_resume.events import StorageRetried, subscribe
from dcp_resume.session.litter import find_litter, remove_litter
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.inspection import Found, look_at
from tests.support.s3_server import S3Server
from tests.support.small_state import is_at, state_at

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
        """After a cleaning: a create that nobody waited for any more may have come late."""
        with closing(open_store(self._url, storage_options=self._server.storage_options)) as store:
            log = RunLog(store)
            remove_litter(store, log, find_litter(store, log, until_s=math.inf))
            return look_at(store)


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


def may_be_silent(cases: dict[str, Any]) -> set[str]:
    """Faults that the HTTP client may repeat by itself, on a connection that it had used before."""
    return {name for name, case in cases.items() if case[2] in (Fault.RESET, Fault.DROP_ANSWER)}


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


def test_a_save_outlives(job, retried):
    num_retried = {}
    with job.manager() as checkpoints:
        for step, (name, (method, part, fault, times)) in enumerate(PASSING.items()):
            retried.clear()
            job.proxy.inject(method, part, fault, times=times)
            checkpoints.save(step, state_at(step, SMALL))
            job.proxy.heal()
            num_retried[name] = len(retried)

    unseen = {name for name, number in num_retried.items() if not number}
    assert unseen <= may_be_silent(PASSING)
    assert job.look() == Found(tuple(range(len(PASSING))), (), (), ())


def test_a_save_outlives_a_slow_server(job):
    with job.manager(read_timeout_s=30.0) as checkpoints:
        checkpoints.save(1, state_at(1, SMALL))
        job.proxy.inject("PUT", "step-", Fault.SLOW, times=TRIES - 1)
        checkpoints.save(2, state_at(2, SMALL))
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


def test_a_save_fails_typed_and_training_goes_on(job):
    found = {}
    committed = []
    with job.manager() as checkpoints:
        for number, (name, (method, part, fault, kind)) in enumerate(FAILING.items()):
            step = 10 * number
            checkpoints.save(step, state_at(step, SMALL))
            job.proxy.inject(method, part, fault, times=ALWAYS)
            with pytest.raises(DcpResumeError) as caught:
                checkpoints.save(step + 1, state_at(step + 1, SMALL))
            job.proxy.heal()
            found[name] = type(caught.value)
            # What is unknown, the next append settles: it is there.
            committed += [step, step + 1] if kind is CommitUnknown else [step]
        checkpoints.save(1000, state_at(1000, SMALL))

    assert found == {name: kind for name, (_, _, _, kind) in FAILING.items()}
    assert job.look() == Found((*committed, 1000), (), (), ())


PARTS = {
    "a part throttled": ("PUT", "partNumber=2", Fault.SLOW_DOWN, 2, None),
    "a part changed on the way up": ("PUT", "partNumber=1", Fault.CORRUPT, 1, None),
    "completion without an answer": ("POST", "uploadId=", Fault.DROP_ANSWER, 1, None),
    "wrong ETag of a part": ("PUT", "partNumber=2", Fault.WRONG_ETAG, ALWAYS, StorageError),
    "a part denied": ("PUT", "partNumber=2", Fault.DENIED, ALWAYS, StorageDenied),
}


def test_a_save_in_parts(job):
    found: dict[str, object] = {}
    with job.manager() as checkpoints:
        for step, (name, (method, part, fault, times, _)) in enumerate(PARTS.items()):
            job.proxy.inject(method, part, fault, times=times)
            try:
                checkpoints.save(step, state_at(step, LARGE))
                found[name] = None
            except StorageError as error:
                found[name] = type(error)
            job.proxy.heal()

    assert found == {name: case[-1] for name, case in PARTS.items()}
    whole = [step for step, case in enumerate(PARTS.values()) if case[-1] is None]
    assert job.look() == Found(tuple(whole), (), (), ())


LOADS = {
    "500": ("GET", DATA, Fault.INTERNAL_ERROR, 3),
    "503 SlowDown": ("GET", "", Fault.SLOW_DOWN, 3),
    "reset": ("GET", DATA, Fault.RESET, 1),
    "no answer in time": ("GET", DATA, Fault.STALL, 1),
    "body cut short": ("GET", DATA, Fault.TRUNCATE, 2),
    "document cut short": ("GET", "manifest.json", Fault.TRUNCATE, 1),
    "bytes changed on the way down": ("GET", DATA, Fault.CORRUPT, 1),
}


def test_a_resume_outlives(job, retried):
    found = {}
    unseen = set()
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1, SMALL))
        checkpoints.save(2, state_at(2, SMALL))
        for name, (method, part, fault, times) in LOADS.items():
            state = state_at(0, SMALL)
            retried.clear()
            job.proxy.inject(method, part, fault, times=times)
            result = checkpoints.resume(state)
            job.proxy.heal()
            found[name] = (result.step, is_at(state, 2))
            if not retried:
                unseen.add(name)

    assert found == dict.fromkeys(LOADS, (2, True))
    assert unseen <= may_be_silent(LOADS)


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


def test_a_store_that_fails_is_never_a_reason_to_fall_back(job):
    found = {}
    state = state_at(0, SMALL)
    with job.manager() as checkpoints:
        checkpoints.save(1, state_at(1, SMALL))
        checkpoints.save(2, state_at(2, SMALL))
        for name, (part, fault, _) in DOWN.items():
            job.proxy.inject("GET", part, fault, times=ALWAYS)
            with pytest.raises(DcpResumeError) as caught:
                checkpoints.resume(state)
            job.proxy.heal()
            found[name] = type(caught.value)
        result = checkpoints.resume(state)

    assert found == {name: kind for name, (_, _, kind) in DOWN.items()}
    assert result.step == 2
    assert is_at(state, 2)
    assert job.look() == Found((1, 2), (), (), ())


def test_a_bucket_that_vanishes(job, s3_server):
    client = s3_server.client()
    bucket = f"gone-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    lonely = Job(s3_server, bucket, job.proxy)
    with lonely.manager() as checkpoints:
        checkpoints.save(1, state_at(1, SMALL))
        for entry in client.list_objects_v2(Bucket=bucket)["Contents"]:
            client.delete_object(Bucket=bucket, Key=entry["Key"])
        client.delete_bucket(Bucket=bucket)
        with pytest.raises(StorageError):
            checkpoints.save(2, state_at(2, SMALL))
