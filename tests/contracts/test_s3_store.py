"""S3 keeps the contract, against a real server process; boto3 looks from outside."""

from __future__ import annotations

import uuid

import pytest

from dcp_resume.errors import KeyExists
from dcp_resume.storage import open_store
from tests.contracts.object_store import ObjectStoreContract

pytestmark = pytest.mark.s3

_MIB = 1 << 20


class TestS3Store(ObjectStoreContract):
    race_rounds = 4  # SeaweedFS takes a second or more for each contended one
    large_bytes = 40 * _MIB + 12_345

    @pytest.fixture
    def store(self, s3_server, bucket):
        self.client = s3_server.client()
        self.bucket = bucket
        self.root = f"{uuid.uuid4().hex}/below/"
        store = open_store(f"s3://{bucket}/{self.root}", storage_options=s3_server.storage_options)
        yield store
        store.close()

    def outside_keys(self):
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.root
        )
        entries = [entry for page in pages for entry in page.get("Contents", ())]
        return {entry["Key"].removeprefix(self.root): entry["Size"] for entry in entries}

    def outside_read(self, key):
        return self.client.get_object(Bucket=self.bucket, Key=self.root + key)["Body"].read()

    def outside_put(self, name, content):
        self.client.put_object(Bucket=self.bucket, Key=self.root + name, Body=content)

    def leave_unfinished(self, key):
        self.client.create_multipart_upload(Bucket=self.bucket, Key=self.root + key)


def test_whole_bucket_by_environment_alone(s3_server, monkeypatch):
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{bucket}")
    store.create("k", b"x")
    with pytest.raises(KeyExists):
        store.create("k", b"y")
    assert store.read("k", max_bytes=1) == b"x"
    assert [info.key for info in store.list("")] == ["k"]
    assert store.url == f"s3://{bucket}"
    store.close()
