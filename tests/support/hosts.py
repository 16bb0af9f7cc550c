"""Hosts on one machine: network, UTS, mount and process namespaces, joined by a bridge. Needs root.

with Hosts(4, tmp_path) as hosts:
    hosts.start(1, ["torchrun", ...], {"GLOO_SOCKET_IFNAME": "eth0"})
    hosts.cut(1)
    hosts.mend(1)
    hosts.power_off(1)

Each host has an address and a name of its own, no name server, and a disk that no other host sees,
at the same path on all: ``hosts.local_disk``. Everything else of the file system is shared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Hosts", "why_no_hosts"]

_PROGRAMS = ("ip", "unshare", "mount", "hostname")
_BOOT = """\
set -e
hostname "$1"; mount --bind "$2" "$3"
mount --bind "$4" /etc/hosts; mount --bind "$5" /etc/resolv.conf
shift 5; exec "$@"
"""


def why_no_hosts() -> str:
    """Why this machine cannot have hosts; empty if it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no program {', '.join(missing)}"
    probe = f"dr{os.getpid()}p"
    made = _run("ip", "netns", "add", probe, check=False)
    if made.returncode:
        return f"network namespaces cannot be made: {made.stderr.strip()}"
    unshare = ("unshare", "--uts", "--pid", "--mount-proc", "--fork", "true")
    links = ("ip", "-n", probe, "link", "add", "br0", "type", "bridge")
    leg = ("ip", "link", "add", f"{probe}a", "type", "veth", "peer", f"{probe}b", "netns", probe)
    tried = [_run(*command, check=False) for command in (unshare, links, leg)]
    _run("ip", "netns", "del", probe)
    return "; ".join(result.stderr.strip() for result in tried if result.returncode)


class Hosts:
    """So many hosts, numbered from 1; use it as a context, which leaves nothing behind.

    Args:
        count: How many.
        directory: For their disks and logs.
    """

    def __init__(self, count: int, directory: Path) -> None:
        self.numbers = range(1, count + 1)
        self._directory = directory
        self._subnet = _free_subnet()
        self._name = f"dr{os.getpid()}"
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.local_disk = directory / "local"
        self.gateway = f"{self._subnet}.254"
        """Address of this process, as the hosts see it."""

    def name(self, host: int) -> str:
        """Host name."""
        return f"node{host}"

    def address(self, host: int) -> str:
        """IP address."""
        return f"{self._subnet}.{host}"

    def log(self, host: int) -> str:
        """What its processes printed, of all starts."""
        path = self._directory / f"{self.name(host)}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def disk(self, host: int) -> Path:
        """What the host sees as ``local_disk``."""
        return self._directory / f"disk-{host}"

    def start(self, host: int, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Power on, with one program to run."""
        disk = self.disk(host)
        disk.mkdir(exist_ok=True)
        self.mend(host)
        names = self._directory / "hosts"
        places = [disk, self.local_disk, names, self._directory / "resolv.conf"]
        boot = ["sh", "-c", _BOOT, "boot", self.name(host), *map(str, places), *command]
        space = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
        with (self._directory / f"{self.name(host)}.log").open("ab") as output:
            self._processes[host] = subprocess.Popen(
                ["ip", "netns", "exec", self._net(host), *space, *boot],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def is_on(self, host: int) -> bool:
        """Whether its program runs."""
        return host in self._processes and self._processes[host].poll() is None

    def cut(self, host: int) -> None:
        """Take its link down: packets are lost in silence, either way."""
        self._switch("link", "set", f"p{host}", "down")

    def mend(self, host: int) -> None:
        """Bring its link up again."""
        self._switch("link", "set", f"p{host}", "up")

    def power_off(self, host: int) -> None:
        """Cut its link, so that no peer hears of it, and kill all its processes at once."""
        self.cut(host)
        process = self._processes.pop(host, None)
        if process is None:
            return
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        first = children.read_text().split() if process.poll() is None else []
        for pid in first:  # of its process namespace: the kernel ends all others before this one
            os.kill(int(pid), signal.SIGKILL)
        if not first:
            process.kill()
        process.wait()

    def replace_disk(self, host: int) -> None:
        """Give a host that is off an empty disk."""
        shutil.rmtree(self.disk(host), ignore_errors=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            self.local_disk.mkdir()
            names = [f"{self.address(host)} {self.name(host)}\n" for host in self.numbers]
            (self._directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
            (self._directory / "resolv.conf").write_text("")
            _run("ip", "netns", "add", self._net(0))
            self._switch("link", "add", "br0", "type", "bridge")
            self._switch("link", "set", "br0", "up")
            for host in self.numbers:
                _run("ip", "netns", "add", self._net(host))
                self._connect(host, self._net(host), "eth0", self.address(host))
            self._connect(0, "", self._name, self.gateway)
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _net(self, host: int) -> str:
        return f"{self._name}-{host}"  # 0: the bridge

    def _switch(self, *arguments: str) -> None:
        _run("ip", "-n", self._net(0), *arguments)

    def _connect(self, port: int, net: str, device: str, address: str) -> None:
        """A cable from the bridge to a namespace, or to where this process is."""
        there = ["-n", net] if net else []
        end = ["peer", "name", f"p{port}", "netns", self._net(0)]
        _run("ip", *there, "link", "add", device, "type", "veth", *end)
        self._switch("link", "set", f"p{port}", "master", "br0", "up")
        _run("ip", *there, "addr", "add", f"{address}/24", "dev", device)
        for link in (device, "lo"):
            _run("ip", *there, "link", "set", link, "up")

    def _stop(self) -> None:
        for host in list(self._processes):
            self.power_off(host)
        # The cables go with the bridge's namespace, this process's end too.
        for host in (0, *self.numbers):
            _run("ip", "netns", "del", self._net(host), check=False)


def _free_subnet() -> str:
    """Of 198.18.0.0/15, which is set aside for tests; the machine may use the private ones."""
    used = _run("ip", "-4", "-o", "addr").stdout
    subnets = [f"198.18.{(os.getpid() + shift) % 256}" for shift in range(256)]
    return next(subnet for subnet in subnets if f" {subnet}." not in used)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result
