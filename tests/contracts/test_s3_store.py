"""S3 keeps the contract, against a real server process; boto3 looks from outside."""

from __future__ import annotations

import uuid

import pytest

from dcp_resume.storage import open_store
from tests.contracts.object_store import ObjectStoreContract

pytestmark = pytest.mark.s3

_MIB = 1 << 20


class TestS3Store(ObjectStoreContract):
    race_rounds = 8
    large_bytes = 40 * _MIB + 12_345

    @pytest.fixture(autouse=True)
    def _bucket(self, s3_server):
        self.bucket = f"b-{uuid.uuid4().hex}"
        self.server = s3_server
        self.client = s3_server.client()
        self.client.create_bucket(Bucket=self.bucket)

    @pytest.fixture(params=["", "some/where"], ids=["bucket", "prefix"])
    def store(self, request):
        self.root = f"{request.param}/" if request.param else ""
        store = open_store(
            f"s3://{self.bucket}/{self.root}", storage_options=self.server.storage_options
        )
        yield store
        store.close()

    def outside_keys(self):
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        entries = [entry for page in pages for entry in page.get("Contents", ())]
        return {entry["Key"].removeprefix(self.root): entry["Size"] for entry in entries}

    def outside_read(self, key):
        return self.client.get_object(Bucket=self.bucket, Key=self.root + key)["Body"].read()

    def outside_put(self, name, content):
        self.client.put_object(Bucket=self.bucket, Key=self.root + name, Body=content)

    def leave_unfinished(self, key):
        self.client.create_multipart_upload(Bucket=self.bucket, Key=self.root + key)


def test_environment_is_enough(s3_server, monkeypatch):
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{bucket}/run")
    store.create("k", b"x")
    assert store.read("k", max_bytes=1) == b"x"
    assert store.url == f"s3://{bucket}/run"
    store.close()
