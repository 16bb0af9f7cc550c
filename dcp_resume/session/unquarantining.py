"""Take a quarantine back, by one record."""

from __future__ import annotations

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.records import LogRecord, UnquarantineRecord
from dcp_resume.session.run_log import Appended, RunLog

__all__ = ["unquarantine"]


def unquarantine(log: RunLog, target: int) -> Appended:
    """Lift a quarantine: the checkpoint counts again.

    Raises:
        ConfigurationError: It is not quarantined, or it was retired.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; the quarantine holds.
    """

    def check(history: RunHistory) -> None:
        if target not in history.quarantined or target in history.retired:
            held = sorted(history.quarantined.keys() - history.retired.keys())
            raise ConfigurationError(
                f"cannot lift the quarantine of checkpoint {target} of {log.url}: those in "
                f"quarantine are {held}. Choose one of them.",
                option="target",
            )

    def build(_: RunHistory) -> LogRecord:
        return UnquarantineRecord(run=log.run, created=log.timestamp(), target=target)

    log.refresh()
    return log.append(build, check)
