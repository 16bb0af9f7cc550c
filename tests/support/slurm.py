"""A Slurm cluster of one node on this machine, for one test run: Debian's daemons, no systemd.

Needs root, and ``apt-get install --no-install-recommends slurmctld slurmd slurm-client munge``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.free_ports import free_ports

__all__ = ["Slurm", "missing_programs"]

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "setpriv")
_START_S = 60.0
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={directory}/munge/socket
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SchedulerParameters=bf_interval=2,sched_min_interval=500000
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs that a cluster needs and this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


class Slurm:
    """One node, two partitions: ``high`` preempts ``low``; use it as a context."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._directory.chmod(0o755)  # munged runs as another user
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = {**os.environ, "SLURM_CONF": str(self._directory / "slurm.conf")}

    def __enter__(self) -> Self:
        try:
            self._start_munge()
            port, node_port = free_ports(2)
            configuration = _CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0],
                directory=self._directory,
                port=port,
                node_port=node_port,
            )
            (self._directory / "slurm.conf").write_text(configuration)
            for name in ("state", "spool"):
                (self._directory / name).mkdir()
            for command in (["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
                self._daemons.append(self._spawn(command))
            self._wait_for(lambda: "idle" in self.call("sinfo", "-h", "-o", "%T", check=False))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def call(self, *command: str, check: bool = True) -> str:
        """Run one of Slurm's commands; its standard output."""
        result = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False, timeout=60
        )
        if check and result.returncode:
            raise RuntimeError(f"{command}: {result.stderr}")
        return result.stdout.strip()

    def submit(self, script: Path, *options: str) -> str:
        """Submit a batch script; the job's id."""
        return self.call("sbatch", "--parsable", *options, str(script))

    def _start_munge(self) -> None:
        place = self._directory / "munge"
        place.mkdir()
        key = place / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for path in (place, key):
            shutil.chown(path, "munge", "munge")
        command = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged"]
        command += ["--foreground", "--force", f"--key-file={key}", f"--socket={place}/socket"]
        command += [
            f"--pid-file={place}/pid",
            f"--log-file={place}/log",
            f"--seed-file={place}/seed",
        ]
        self._daemons.append(self._spawn(command))
        self._wait_for((place / "socket").exists)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        output = (self._directory / "daemons.log").open("ab")
        with output:
            return subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        end = time.monotonic() + _START_S
        while not is_there():
            if time.monotonic() > end:
                raise RuntimeError((self._directory / "daemons.log").read_text())
            time.sleep(0.1)

    def _stop(self) -> None:
        if len(self._daemons) == 3:
            self.call("scancel", "-u", "root", "-s", "KILL", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
