"""Give a damaged checkpoint up: only once the damage is proven.

What one rank finds wrong may be its own fault: a stale mount, a bad cache, bad memory. So the first
and the last rank, on two hosts where there are several, look again for themselves. If either finds
the checkpoint whole, nothing is given up. A store that fails says nothing of the checkpoint, and
never leads here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dcp_resume.errors import DamageDisputed, InvalidCheckpoint, PartialLoad
from dcp_resume.events import CheckpointSkipped, emit
from dcp_resume.manifest.signing import Trust
from dcp_resume.problems import summarise
from dcp_resume.session.located import Located
from dcp_resume.session.marks import quarantine
from dcp_resume.session.opening import open_checkpoint
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.values import read_values
from dcp_resume.session.verify import verify_files
from dcp_resume.session.votes import Votes
from dcp_resume.storage import ObjectStore

__all__ = ["Damage", "give_up"]

Damage = InvalidCheckpoint | PartialLoad

_WHOLE, _DAMAGED, _UNSEEN = b"whole", b"damaged", b""


def give_up(
    store: ObjectStore, log: RunLog, votes: Votes, located: Located, damage: Damage
) -> None:
    """Prove the damage that a load met, say it loudly, and quarantine the checkpoint.

    Args:
        store: Root of the run.
        log: This rank's view of its log.
        votes: One round is held.
        located: The checkpoint.
        damage: The load's error, the same on every rank.

    Raises:
        DamageDisputed: A rank finds the checkpoint whole; nothing was marked.
        RankErrors: The store failed on a rank; nothing was marked.
        RankSilent: A rank did not answer by the deadline.
        StorageError: The store failed, and nothing was marked.
    """
    trust = log.signing.trust
    step = log.history.commits[located.seq].step
    suspects = {problem.where for problem in damage.problems}

    def look() -> bytes:
        if votes.rank not in (0, votes.world_size - 1):
            return _UNSEEN
        return _WHOLE if _is_whole(store, trust, votes, located, suspects) else _DAMAGED

    def decide(ballots: Sequence[bytes]) -> list[bytes]:
        ranks = tuple(rank for rank, ballot in enumerate(ballots) if ballot == _WHOLE)
        if ranks:
            raise _disputed(store.url, step, damage, ranks)
        quarantine(log, located.seq, reason=str(damage)[:2000])
        return [b""] * len(ballots)

    votes.round("second look", look, decide)
    emit(CheckpointSkipped(step=step, reason=str(damage)))


def _is_whole(
    store: ObjectStore, trust: Trust, votes: Votes, located: Located, suspects: Collection[str]
) -> bool:
    """Whether documents, sizes, and every byte of the files that are named are right here."""
    try:
        opened = open_checkpoint(store, located.prefix, located.manifest, trust=trust)
        read_values(store, opened, rank=votes.rank, world_size=votes.world_size)
    except InvalidCheckpoint:
        return False
    return not verify_files(store, opened, suspects)


def _disputed(url: str, step: int, damage: Damage, ranks: tuple[int, ...]) -> DamageDisputed:
    names = ", ".join(map(str, ranks))
    return DamageDisputed(
        f"step {step} of {url} looked damaged, but rank(s) {names} find the same files whole:\n"
        f"{summarise(damage.problems)}\nNothing was given up. Look at the host that met it (mount, "
        f"page cache, memory), and start again",
        step=step,
        ranks=ranks,
        written_fqns=getattr(damage, "written_fqns", ()),
        problems=damage.problems,
    )
