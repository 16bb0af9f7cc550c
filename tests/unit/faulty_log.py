"""A run's log over a store that loses answers, lags and refuses, as told."""

from dcp_resume.errors import OutcomeUnknown, StorageDenied, StorageError
from dcp_resume.manifest.models import DocumentRef, TrainerFacts
from dcp_resume.session import commit as rules
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage.posix_store import PosixStore


class FaultyStore(PosixStore):
    """Answers creates as told: ``lost`` (done, answer lost), ``dropped``, ``denied``, ``ok``."""

    def __init__(self, root):
        super().__init__(root)
        self.fates = []
        self.created = []
        self.hidden = ()
        self.unreadable = 0

    def create(self, key, data):
        fate = self.fates.pop(0) if self.fates else "ok"
        self.created.append((key, data))
        if fate == "denied":
            raise StorageDenied("denied", url=self.url, key=key)
        if fate != "dropped":
            super().create(key, data)
        if fate != "ok":
            raise OutcomeUnknown(fate, url=self.url, key=key)

    def list(self, prefix, *, start_after=""):
        entries = super().list(prefix, start_after=start_after)
        return (entry for entry in entries if entry.key not in self.hidden)

    def read(self, key, *, max_bytes):
        if self.unreadable:
            self.unreadable -= 1
            raise StorageError("unreadable", url=self.url, key=key)
        return super().read(key, max_bytes=max_bytes)


class Time:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def new_log(store, **options):
    time = Time()
    return RunLog(store, clock=time.clock, sleep=time.sleep, **options)


def commit(log, step, *, attempt=None, generation=1, parent=None, references=(), planned_at=None):
    return rules.commit(
        log,
        generation=generation,
        step=step,
        attempt=attempt or f"a{step}",
        manifest=DocumentRef(key="m", size=1, digest="d"),
        parent=parent,
        references=references,
        planned_at=log.last_seq if planned_at is None else planned_at,
        num_bytes=1,
        trainer=TrainerFacts(step=step),
    )
