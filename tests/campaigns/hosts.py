"""Lose hosts of a torchrun elastic job, one way after the other, and look at what it resumes from.

    python -m tests.campaigns.hosts
    python -m tests.campaigns.hosts --storage s3

Four hosts made of namespaces (``tests/support/hosts.py`` says what that needs; without it this
says ``SKIPPED``), one job. Ends with 0 if every error was the one expected, and every resume gave
exactly the state of a step that was committed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcp_resume.manifest.history import RunHistory
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from tests.campaigns.audit import audit
from tests.support.elastic import ElasticJob
from tests.support.hosts import Hosts, why_no_hosts
from tests.support.s3_server import S3Server

__all__ = ["COMMIT", "WRITE", "Trials"]

WRITE, COMMIT = 3, 4
"""Steps of a save, as ``session.save`` numbers them."""
_BUCKET = "hosts"


class Trials:
    """One job, and what is done to its hosts in turn.

    Args:
        hosts: All are off.
        directory: Shared by all.
        url: Of a new run.
        storage_options: For the run, as options and as environment variables.
        env: The same as environment variables.
        deadline_s: Of saves and loads.
        tell: Called with each thing seen, and the seconds since hosts were lost or started.
    """

    def __init__(
        self,
        hosts: Hosts,
        directory: Path,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        deadline_s: float = 10.0,
        tell: Callable[[str, float], None],
    ) -> None:
        self._hosts = hosts
        self._all = list(hosts.numbers)
        self._directory = directory
        self._url, self._options = url, dict(storage_options or {})
        flags = [f"--try-first={hosts.local_disk}/run"]
        self._job = ElasticJob(hosts, directory, url, deadline_s=deadline_s, flags=flags, env=env)
        self._tell = tell
        self._began_s = 0.0

    def start(self) -> None:
        """A run that each host has to itself is refused on every rank; a shared one is saved to."""
        self._begin()
        self._job.start(*self._all)
        for note in self._job.wait_for("refused", self._all):
            assert note["kind"] == "StoreNotShared", note
            assert note["ranks"] == list(range(1, len(self._all))), note
        for host in self._all:
            assert not list(self._hosts.disk(host).rglob("attempts/**/*"))
        self._see("each its own disk: StoreNotShared on all")
        self._job.wait_for("saved", self._all, step=3)
        self._see(f"3 steps saved by {len(self._all)} hosts")

    def cut(self, host: int, number: int, *, zombie: str) -> None:
        """Cut a host off in a save; the others go on without it, and it commits nothing more.

        Args:
            host: Which.
            number: The step of the save at which it is held while it is cut off.
            zombie: Name of the error that it meets when its link comes back.
        """
        others = [other for other in self._all if other != host]
        self._job.hold(host, number)
        (held,) = self._job.wait_for("held", [host])
        generation, newest = self._history().generation, self._newest()
        assert newest == held["step"] - 1
        self._begin()
        self._hosts.cut(host)
        for note in self._job.wait_for("error", others):
            assert (note["kind"], note["ranks"]) == ("RankSilent", [held["rank"]]), note
        self._see(f"host {host} (rank {held['rank']}) cut off in step {number}: RankSilent on all")
        assert self._resumed(others) == newest
        self._hosts.mend(host)
        self._job.release(host)
        (error,) = self._job.wait_for("error", [host])
        assert error["kind"] == zombie, error
        mine = [c.step for c in self._history().commits.values() if c.generation == generation]
        assert max(mine) == newest, "the host that was cut off has committed"
        self._see(f"link back: {zombie} on host {host}")

    def rejoin(self) -> None:
        """The host that was cut off takes part again."""
        newest = self._newest()
        assert self._resumed(self._all) >= newest

    def lose(self, *lost: int) -> None:
        """Power hosts off; the others go on."""
        self._begin()
        for host in lost:
            self._hosts.power_off(host)
        newest = self._newest()
        self._see(f"hosts {', '.join(map(str, lost))} lost")
        # A commit may have been on its way, of ballots that were in.
        assert newest <= self._resumed([h for h in self._all if h not in lost]) <= newest + 1

    def grow(self, *back: int) -> None:
        """Power hosts on; all go on together, from no older step."""
        self._begin()
        newest = self._newest()
        self._job.start(*back)
        assert self._resumed(self._all) >= newest

    def replace(self, host: int) -> None:
        """Another machine takes a host's place: its disk is empty."""
        self.lose(host)
        self._hosts.replace_disk(host)
        self.grow(host)

    def end(self) -> None:
        """The job ends by itself, and leaves what ``audit`` wants."""
        self._begin()
        self._job.finish()
        self._job.wait_for_end(*self._all)
        self.audit()
        self._see(f"ended at step {self._newest()}, every byte verified")

    def audit(self) -> None:
        """Every byte of every checkpoint is whole, and every key accounted for; nobody writes."""
        with contextlib.closing(open_store(self._url, storage_options=self._options)) as store:
            findings = audit(store)
        assert not findings, findings

    def _resumed(self, hosts: Iterable[int]) -> int:
        hosts = list(hosts)
        notes = self._job.wait_for("resumed", hosts, world_size=len(hosts))
        steps = {note["step"] for note in notes}
        assert len(steps) == 1, notes
        assert all(note["is_exact"] for note in notes), notes
        self._see(f"{len(hosts)} hosts resumed from step {min(steps)}, state equal")
        self._job.wait_for("saved", hosts, world_size=len(hosts))
        return int(min(steps))

    def _begin(self) -> None:
        self._job.forget()
        self._began_s = time.monotonic()

    def _see(self, what: str) -> None:
        self._tell(what, time.monotonic() - self._began_s)

    def _history(self) -> RunHistory:
        with contextlib.closing(open_store(self._url, storage_options=self._options)) as store:
            return RunLog(store).refresh()

    def _newest(self) -> int:
        return next(entry.record.step for entry in self._history().lineage())


def run_campaign(storage: str, deadline_s: float, tell: Callable[[str, float], None]) -> None:
    """Everything, on four hosts.

    Raises:
        AssertionError: Something came out otherwise.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        hosts = stack.enter_context(Hosts(4, directory))
        url, options, env = str(directory / "run"), {}, {}
        if storage == "s3":
            server = stack.enter_context(S3Server(address=hosts.gateway))
            server.make_bucket(_BUCKET)
            url, options, env = f"s3://{_BUCKET}/run", server.storage_options, server.env
        trials = Trials(
            hosts,
            directory,
            url,
            storage_options=options,
            env=env,
            deadline_s=deadline_s,
            tell=tell,
        )
        trials.start()
        trials.cut(4, WRITE, zombie="RankSilent")
        trials.rejoin()
        trials.cut(1, COMMIT, zombie="Fenced")
        trials.rejoin()
        trials.lose(3, 4)
        trials.grow(3, 4)
        trials.lose(1, 2)
        trials.grow(1, 2)
        trials.replace(4)
        trials.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--storage", choices=("local", "s3"), default="local")
    parser.add_argument("--deadline-s", type=float, default=10.0, help="of saves and loads")
    arguments = parser.parse_args(argv)
    if why := why_no_hosts():
        print(f"SKIPPED: {why}")
        return 0
    print(f"{'what':<66} {'seconds':>7}")
    run_campaign(
        arguments.storage,
        arguments.deadline_s,
        lambda what, took_s: print(f"{what:<66} {took_s:>7.1f}", flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
