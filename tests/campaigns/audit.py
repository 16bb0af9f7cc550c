"""What many kills left in a run: every checkpoint whole, and after a cleaning nothing else."""

from __future__ import annotations

import math

from dcp_resume.manifest.keys import parse_log_key
from dcp_resume.session.litter import find_litter, remove_litter
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.sweep import read_needs
from dcp_resume.storage import ObjectStore
from tests.campaigns.judging import Finding
from tests.support.inspection import look_at

__all__ = ["audit"]


def audit(store: ObjectStore) -> list[Finding]:
    """Prove every byte of every live checkpoint, clear the litter away, account for every key."""
    log = RunLog(store)
    remove_litter(store, log, find_litter(store, log, until_s=math.inf))
    found = look_at(store)
    needed = {
        key for record in log.history.live_commits().values() for key in read_needs(store, record)
    }
    keys = [info.key for info in store.list("") if parse_log_key(info.key) is None]
    leftovers = [*(key for key in keys if key not in needed), *found.unfinished]
    return [
        *(Finding("unusable", problem) for problem in found.problems),
        *(Finding("litter", key) for key in leftovers),
    ]
