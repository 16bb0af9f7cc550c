"""Open a run for writing, once an incarnation, and make sure that all ranks see the same one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from dcp_resume.errors import StoreNotShared
from dcp_resume.events import RunOpened, emit
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import new_attempt_id
from dcp_resume.session.attempt import Run
from dcp_resume.session.commit import Opened, open_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.tuning import tell_choices
from dcp_resume.session.votes import Votes
from dcp_resume.storage import ObjectStore, check_exclusive_create

__all__ = ["own_run"]


def own_run(
    store: ObjectStore,
    log: RunLog,
    votes: Votes,
    choose: Callable[[RunHistory], int | None],
    *,
    is_probed: bool,
) -> Run:
    """Append this incarnation's ``open`` record on the coordinator, and show it to every rank.

    Args:
        store: Root of the run.
        log: This rank's view of its log.
        votes: Two rounds are held.
        choose: Picks the resume source; called on the coordinator, anew for each number tried.
        is_probed: Whether exclusive create was already proved on this store.

    Raises:
        StoreNotShared: Some rank does not see the record: its root is another store.
        UnsupportedStore: The store lacks exclusive create.
        CheckpointNotFound: ``choose`` found nothing that answers the request.
        RunMismatch: Another run lives under this root.
        RankSilent: A rank did not answer by the deadline.
        StorageError: The store failed.
    """

    def decide(ballots: Sequence[bytes]) -> list[bytes]:
        if not is_probed:
            check_exclusive_create(store, f"probe/{new_attempt_id()}/")
        incarnation = new_attempt_id()
        opened = open_run(log, incarnation=incarnation, choose=choose)
        seq = next(s for s, r in log.history.opens.items() if r.incarnation == incarnation)
        answer = [opened.generation, opened.resume_source, seq, incarnation]
        return [json.dumps(answer).encode()] * len(ballots)

    generation, source, seq, incarnation = json.loads(votes.round("open", lambda: b"", decide))

    def see() -> bytes:
        record = log.refresh().opens.get(seq)
        return b"seen" if record is not None and record.incarnation == incarnation else b"unseen"

    def judge(ballots: Sequence[bytes]) -> list[bytes]:
        blind = tuple(rank for rank, ballot in enumerate(ballots) if ballot != b"seen")
        if blind:
            raise StoreNotShared(
                f"rank(s) {', '.join(map(str, blind))} do not see log record {seq} that rank 0 "
                f"wrote to {store.url}: the root is not the same storage on every host. Use a "
                f"shared file system or s3://",
                step=0,
                ranks=blind,
            )
        return [b""] * len(ballots)

    votes.round("see", see, judge)
    if not is_probed:
        tell_choices(store)
    if votes.rank == 0:
        commit = log.history.commits.get(source) if source else None
        emit(
            RunOpened(
                url=store.url,
                generation=generation,
                resume_step=commit.step if commit else None,
            )
        )
    return Run(store, log, Opened(generation, source))
