"""A second, independent S3 keeps the same contract: the RADOS Gateway of Ceph."""

from __future__ import annotations

import os
import uuid

import pytest

from dcp_resume.errors import StorageFull
from dcp_resume.storage import open_store
from tests.contracts import test_s3_store as s3
from tests.support.ceph_server import CephServer

if not os.environ.get("TEST_CEPH"):
    pytest.skip("only with TEST_CEPH=1: `make test-ceph`", allow_module_level=True)

pytestmark = pytest.mark.ceph


@pytest.fixture(scope="module")
def s3_server():
    """Here every test that asks for the S3 server gets Ceph."""
    with CephServer() as server:
        yield server


bucket = s3.bucket


class TestCephStore(s3.TestS3Store):
    race_rounds = 25


test_whole_bucket_by_environment_alone = s3.test_whole_bucket_by_environment_alone


def test_a_quota_is_a_full_store_though_the_status_is_403(s3_server):
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    scope = ("--quota-scope=bucket", f"--bucket={bucket}")
    s3_server.admin("quota", "set", *scope, "--max-size=1M")
    s3_server.admin("quota", "enable", *scope)
    store = open_store(f"s3://{bucket}", storage_options=s3_server.storage_options)
    store.create("small", b"x")
    with pytest.raises(StorageFull, match=r"'big'.*QuotaExceeded\. Free space"):
        store.create("big", bytes(2 << 20))
    store.close()
