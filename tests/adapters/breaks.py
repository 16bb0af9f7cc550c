"""What may happen to a job of a peer, and must not show afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys

__all__ = ["damage_newest", "kill_after"]


def kill_after(peer, root, step):
    """Train in a process of its own that dies by SIGKILL after the step."""
    command = [sys.executable, "-m", "tests.adapters.killed_job", peer, str(root), str(step)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def damage_newest(root):
    """Flip a bit of the largest data file of the newest step."""
    step = max(root.glob("step-*"))
    path = max(step.rglob("*.safetensors*"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
