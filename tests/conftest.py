"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.support.s3_server import S3Server


@pytest.fixture(scope="session")
def s3_server():
    """One S3 server process for the session; starts with the first test that wants it."""
    with S3Server() as server:
        yield server
