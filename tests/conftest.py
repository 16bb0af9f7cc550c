"""Fixtures for all tests."""

from __future__ import annotations

import os
import uuid

import pytest

from tests.support.s3_server import S3Server

# torch's TCPStore asks the name server for the name of every peer's address; where none answers,
# each question costs 5 s (measured: one connection in seven), and the suite minutes.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(scope="session")
def s3_server():
    """One S3 server process for the session; starts with the first test that wants it."""
    with S3Server() as server:
        yield server


@pytest.fixture(scope="module")
def bucket(s3_server):
    """One for a file: SeaweedFS reserves volumes for every bucket, and runs out of them."""
    name = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(name)
    return name


@pytest.fixture(scope="session")
def ranks():
    """Gloo ranks for the session, forked by the first test that wants them."""
    from tests.support.ranks import rank_pool  # loads torch

    yield from rank_pool()
