"""A second, independent S3 keeps the same contract: the RADOS Gateway of Ceph."""

from __future__ import annotations

import pytest

from tests.contracts import test_s3_store as s3
from tests.support.ceph_server import CephServer

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
