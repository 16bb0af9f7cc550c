"""A quarantine that is lifted."""

from __future__ import annotations

import pytest

from dcp_resume.errors import ConfigurationError
from dcp_resume.session.commit import open_run
from dcp_resume.session.marks import quarantine, retire, unquarantine

from .faulty_log import FaultyStore, commit, new_log


@pytest.fixture
def store(tmp_path):
    return FaultyStore(tmp_path / "run")


@pytest.fixture
def log(store):
    log = new_log(store)
    assert open_run(log, incarnation="first") == (1, None)
    return log


def test_a_lifted_quarantine_counts_no_more(store, log):
    damaged = commit(log, 40)
    with pytest.raises(ConfigurationError, match="quarantine are \\[\\]"):
        unquarantine(log, damaged.seq)
    quarantine(log, damaged.seq)
    unquarantine(log, damaged.seq)
    assert open_run(new_log(store), incarnation="second") == (2, damaged.seq)


def test_a_retired_checkpoint_is_not_lifted(log):
    damaged = commit(log, 40)
    commit(log, 60)
    quarantine(log, damaged.seq)
    retire(log, damaged.seq)
    with pytest.raises(ConfigurationError):
        unquarantine(log, damaged.seq)
