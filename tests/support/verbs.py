"""Runs verbs in a process of their own: one that cannot import torch, or one that is interrupted.

python -m tests.support.verbs without-torch|interrupted < calls.json

``calls`` is a list of argument lists; ``{endpoint}`` in one stands for a server that takes
connections and never answers: the first one is when SIGINT comes. Prints a list of
``[exit code, stdout, stderr]``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["call_verbs"]


def call_verbs(how: str, calls: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Run the calls one after the other, all in one process."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.verbs", how],
        input=json.dumps([[str(word) for word in call] for call in calls]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return [tuple(result) for result in json.loads(found.stdout)]


class NoTorch:
    """Finds no torch, as where it is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        del path, target
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """A server that never answers; interrupts this process when the first connection comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def interrupt() -> None:
            connection, _ = server.accept()
            held.append(connection)
            os.kill(os.getpid(), signal.SIGINT)

        held: list[socket.socket] = []
        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()
        for connection in held:
            connection.close()


def _run(call: Sequence[str]) -> tuple[int, str, str]:
    from dcp_resume.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(call)
    return code, out.getvalue(), err.getvalue()


def _interrupted(call: Sequence[str]) -> tuple[int, str, str]:
    with silent_server() as endpoint:
        return _run([word.replace("{endpoint}", endpoint) for word in call])


def _main(how: str) -> None:
    calls = json.load(sys.stdin)
    if how == "without-torch":
        sys.meta_path.insert(0, NoTorch())  # type: ignore[arg-type]
        results = [_run(call) for call in calls]
        assert "torch" not in sys.modules
    else:
        results = [_interrupted(call) for call in calls]
    print(json.dumps(results))


if __name__ == "__main__":
    _main(sys.argv[1])
