"""A real Ceph cluster of one monitor and one OSD in memory, and its RADOS Gateway, on loopback.

with CephServer() as server:
    server.make_bucket("runs")
    store = open_store("s3://runs/a", storage_options=server.storage_options)

It needs neither systemd nor ceph-mgr, and writes nowhere but into its own directory.
"""

from __future__ import annotations

import shutil
import subprocess
import time
import uuid
from pathlib import Path

from tests.support.free_ports import free_ports
from tests.support.s3_server import S3Server, answers, kill

__all__ = ["PACKAGES", "CephServer"]

PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
"""Of Debian and Ubuntu."""
_PROGRAMS = (
    *("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin"),
    *("ceph", "ceph-authtool", "monmaptool", "setpriv"),
)
_GATEWAY = "client.rgw"
_CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *"},
    _GATEWAY: {"mon": "allow rwx", "osd": "allow rwx"},
}
_LOG = "log"


class CephServer(S3Server):
    """Three processes: started on entry, killed on exit, and by the kernel if this process dies.

    Args:
        start_timeout_s: How long all of them together may take to answer.
    """

    def __init__(self, *, start_timeout_s: float = 120.0) -> None:
        super().__init__(start_timeout_s=start_timeout_s)
        self._directory = Path()
        self._deadline = 0.0

    def admin(self, *arguments: str) -> None:
        """Run ``radosgw-admin``, for what S3 has no request for, such as quotas."""
        self._deadline = time.monotonic() + self._start_timeout_s
        self._call("radosgw-admin", "-n", _GATEWAY, *arguments)

    def _start(self, directory: Path) -> int:
        missing = [name for name in _PROGRAMS if shutil.which(name) is None]
        if missing:
            raise RuntimeError(
                f"no {', '.join(missing)} found. Install them:"
                f" apt-get install --no-install-recommends {PACKAGES}"
            )
        self._directory = directory
        self._deadline = time.monotonic() + self._start_timeout_s
        mon_port, port = free_ports(2)
        cluster = str(uuid.uuid4())
        (directory / "ceph.conf").write_text(_config(directory, cluster, mon_port, port))
        self._start_monitor(cluster, mon_port)
        self._start_osd()
        self._make_user()
        gateway = self._spawn("radosgw", "-n", _GATEWAY)
        while not answers(port):
            if gateway.poll() is not None or time.monotonic() > self._deadline:
                raise self._failure(f"the gateway on port {port} did not answer")
            time.sleep(0.1)
        return port

    def _start_monitor(self, cluster: str, port: int) -> None:
        keyring, monmap = str(self._directory / "keyring"), str(self._directory / "monmap")
        for number, (entity, caps) in enumerate(_CAPS.items()):
            options = [word for daemon, cap in caps.items() for word in ("--cap", daemon, cap)]
            create = [] if number else ["--create-keyring"]
            self._call("ceph-authtool", keyring, *create, "--gen-key", "-n", entity, *options)
        address = f"[v2:127.0.0.1:{port}]"
        self._call("monmaptool", "--create", "--fsid", cluster, "--addv", "a", address, monmap)
        self._call("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._spawn("ceph-mon", "-i", "a")

    def _start_osd(self) -> None:
        osd = str(uuid.uuid4())
        (self._directory / "osd").mkdir()  # the monitor makes its own
        self._call("ceph", "osd", "new", osd)  # waits for the monitor
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-i", "0")

    def _make_user(self) -> None:
        """Before the gateway starts, for both would make the pools; waits for the OSD."""
        access, secret = self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"]
        keys = [f"--access-key={access}", f"--secret-key={secret}"]
        self._call(
            *("radosgw-admin", "-n", _GATEWAY, "user", "create", "--uid=test"),
            *("--display-name=test", *keys),
        )

    def _call(self, program: str, *arguments: str) -> None:
        """Run one tool to its end, within what is left of the time."""
        with (self._directory / _LOG).open("ab") as log:
            process = self._popen([program, *self._where(), *arguments], log)
            try:
                code = process.wait(max(0.0, self._deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise self._failure(f"{program} did not come to an end") from None
            finally:
                kill(process)
        if code:
            raise self._failure(f"{program} failed with status {code}")

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground (``-d``): it is our child, and its log is ours."""
        log = self._exit.enter_context((self._directory / _LOG).open("ab"))
        process = self._popen([program, "-d", *self._where(), *arguments], log)
        self._exit.callback(kill, process)
        return process

    def _where(self) -> list[str]:
        return ["--conf", str(self._directory / "ceph.conf")]

    def _popen(self, command: list[str], log: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],  # it becomes the command, by exec
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self._directory,
            start_new_session=True,
        )

    def _failure(self, what: str) -> RuntimeError:
        tail = (self._directory / _LOG).read_text(errors="replace")[-4000:]
        return RuntimeError(f"{what}:\n{tail}")


def _config(directory: Path, cluster: str, mon_port: int, port: int) -> str:
    places = {
        "run dir": directory,
        "keyring": directory / "keyring",
        "mon data": directory / "mon",
        "osd data": directory / "osd",
        "rgw data": directory / "rgw",
        "crash dir": directory / "crash",
        "admin socket": "",
        "pid file": "",
        "log file": "",
        "mon cluster log to file": "false",
    }
    network = {
        "fsid": cluster,
        "mon host": f"[v2:127.0.0.1:{mon_port}]",
        "public addr": "127.0.0.1",
        "cluster addr": "127.0.0.1",
        "ms bind msgr1": "false",
    }
    one_of_each = {
        "mon allow pool size one": "true",
        "mon data avail crit": "1",  # per cent; it would stop at 5
        "mon max pg per osd": "2000",
        "osd crush chooseleaf type": "0",
        "osd pool default size": "1",
        "osd pool default min size": "1",
        "osd pool default pg num": "4",
        "osd pool default pg autoscale mode": "off",  # is done by ceph-mgr
        "osd objectstore": "memstore",
        "memstore device bytes": str(4 << 30),
    }
    gateway = {
        "rgw frontends": f"beast endpoint=127.0.0.1:{port}",
        "rgw relaxed region enforcement": "true",
    }
    settings = {**places, **network, **one_of_each, **gateway}
    return "\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""])
