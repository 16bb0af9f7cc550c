"""Run ``elastic_job.py`` on hosts under torchrun elastic, and read what its ranks noted."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from tests.support.hosts import Hosts

__all__ = ["ElasticJob", "Note"]

Note = dict[str, Any]
_REPOSITORY = Path(__file__).parents[2]
_LIMIT_S = 200.0


class ElasticJob:
    """One job, whose rendezvous is here, outside of its hosts: any of them may go.

    Args:
        hosts: Where it runs, one rank a host.
        directory: Shared by all; for notes and orders.
        url: Of the run.
        least: Hosts that it needs; it runs on as many as there are.
        deadline_s: Of saves and loads.
        flags: More of the script's.
        env: More environment variables.
    """

    def __init__(
        self,
        hosts: Hosts,
        directory: Path,
        url: str,
        *,
        least: int = 2,
        deadline_s: float = 10.0,
        flags: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._hosts = hosts
        self._directory = directory
        self._rendezvous = dist.TCPStore(
            hosts.gateway, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        self._nodes = f"{least}:{len(hosts.numbers)}"
        script = str(Path(__file__).with_name("elastic_job.py"))
        self._script = [script, str(directory), url, f"--deadline-s={deadline_s}", *flags]
        self._env = {
            "PYTHONPATH": str(_REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else no restart ever connects
            **(env or {}),
        }
        self._seen = dict.fromkeys(hosts.numbers, 0)

    def start(self, *hosts: int) -> Self:
        """Power hosts on; they join."""
        conf = "is_host=0,read_timeout=600,join_timeout=600,last_call_timeout=3"
        conf += ",keep_alive_interval=2,keep_alive_max_attempt=3"
        for host in hosts:
            command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self._nodes}"]
            command += ["--nproc-per-node=1", "--max-restarts=20", "--rdzv-backend=c10d"]
            command += [f"--rdzv-endpoint={self._hosts.gateway}:{self._rendezvous.port}"]
            command += [f"--rdzv-conf={conf}", f"--local-addr={self._hosts.address(host)}"]
            self._hosts.start(host, [*command, *self._script], self._env)
        return self

    def hold(self, host: int, number: int) -> None:
        """Stop the rank there at this step of its next save, until ``release``."""
        whole = self._order(host).with_suffix(".new")
        whole.write_text(str(number))
        whole.rename(self._order(host))

    def release(self, host: int) -> None:
        """Let it go on."""
        self._order(host).unlink()

    def finish(self) -> None:
        """The job ends after its next step."""
        (self._directory / "finish").touch()

    def notes(self, host: int) -> list[Note]:
        """All notes of a host since ``forget``, oldest first."""
        path = self._directory / "notes" / f"{self._hosts.name(host)}.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be on its way
        return [json.loads(line) for line in whole.splitlines()[self._seen[host] :]]

    def forget(self) -> None:
        """Look only at what is noted from here on."""
        for host in self._hosts.numbers:
            self._seen[host] += len(self.notes(host))

    def wait_for(self, what: str, hosts: Iterable[int], **facts: Any) -> list[Note]:
        """The first such note of each of the hosts, once all have one.

        Raises:
            AssertionError: Some host has none within the limit, or is off.
        """

        def first(host: int) -> Note | None:
            return next(
                (n for n in self.notes(host) if n["what"] == what and facts.items() <= n.items()),
                None,
            )

        wanted = list(hosts)
        self._wait(lambda: all(map(first, wanted)), wanted, f"note {what!r} {facts}")
        return [note for note in map(first, wanted) if note is not None]

    def wait_for_end(self, *hosts: int) -> None:
        """Until the launchers have ended."""
        self._wait(lambda: not any(map(self._hosts.is_on, hosts)), (), "end")

    def _order(self, host: int) -> Path:
        return self._directory / f"hold-{self._hosts.name(host)}"

    def _wait(self, is_so: Callable[[], bool], hosts: Iterable[int], what: str) -> None:
        end = time.monotonic() + _LIMIT_S
        while not is_so():
            dead = [host for host in hosts if not self._hosts.is_on(host)]
            if time.monotonic() > end or (dead and not is_so()):
                logs = "\n".join(
                    f"--- {self._hosts.name(host)}: {self.notes(host)[-8:]}\n"
                    f"{self._hosts.log(host)[-3000:]}"
                    for host in self._hosts.numbers
                )
                raise AssertionError(f"no {what}; hosts that ended: {dead}\n{logs}")
            time.sleep(0.05)
