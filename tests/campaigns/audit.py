"""What many kills left in a run: every checkpoint whole, and nothing that no rule would collect."""

from __future__ import annotations

from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.keys import parse_attempt_prefix, parse_log_key
from dcp_resume.session.load import Located
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.verify import verify_checkpoint
from dcp_resume.storage import ObjectStore
from tests.campaigns.judging import Finding

__all__ = ["audit"]


def audit(store: ObjectStore) -> list[Finding]:
    """Prove every byte of every live checkpoint, and account for every key."""
    history = RunLog(store).refresh()
    found = [Finding("unusable", f"record {seq}: {why}") for seq, why in history.ignored.items()]
    found += [Finding("unusable", f"commit {seq} is quarantined") for seq in history.quarantined]
    for seq, record in history.live_commits().items():
        verification = verify_checkpoint(store, Located.of(CommitEntry(seq, record)))
        found += [Finding("unusable", str(problem)) for problem in verification.problems]
    keys = [info.key for info in store.list("")]
    found += [Finding("litter", key) for key in keys if not _is_accounted_for(key, history)]
    return found


def _is_accounted_for(key: str, history: RunHistory) -> bool:
    """Whether a key belongs to the log or to an attempt, which commits or is collected."""
    place = parse_attempt_prefix(key)
    return parse_log_key(key) is not None or place is not None or key.startswith("probe/")
