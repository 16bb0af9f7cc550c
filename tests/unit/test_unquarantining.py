"""A quarantine that is lifted."""

from __future__ import annotations

import pytest

from dcp_resume.errors import ConfigurationError
from dcp_resume.session import commit as rules
from dcp_resume.session.unquarantining import unquarantine

from .faulty_log import FaultyStore, commit, new_log


@pytest.fixture
def store(tmp_path):
    return FaultyStore(tmp_path / "run")


@pytest.fixture
def log(store):
    log = new_log(store)
    assert rules.open_run(log, incarnation="first") == (1, None)
    return log


def test_a_lifted_quarantine_counts_no_more(store, log):
    damaged = commit(log, 40)
    with pytest.raises(ConfigurationError, match="quarantine are \\[\\]"):
        unquarantine(log, damaged.seq)
    rules.quarantine(log, damaged.seq)
    unquarantine(log, damaged.seq)
    assert rules.open_run(new_log(store), incarnation="second") == (2, damaged.seq)


def test_a_retired_checkpoint_is_not_lifted(log):
    damaged = commit(log, 40)
    commit(log, 60)
    rules.quarantine(log, damaged.seq)
    rules.retire(log, damaged.seq)
    with pytest.raises(ConfigurationError):
        unquarantine(log, damaged.seq)
