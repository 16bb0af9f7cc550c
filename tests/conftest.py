"""Fixtures for all tests."""

from __future__ import annotations

import os

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


@pytest.fixture(scope="session")
def ranks():
    """Gloo ranks for the session, forked by the first test that wants them."""
    from tests.support.ranks import rank_pool  # loads torch

    yield from rank_pool()
