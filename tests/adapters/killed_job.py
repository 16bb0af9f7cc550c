"""A process that trains with a peer until it kills itself: ``python -m … lightning ROOT STEP``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def main(peer: str, root: str, step: str) -> None:
    """Train, and die by SIGKILL after the step."""
    if peer == "lightning":
        from tests.adapters import lightning_job as module
    else:
        from tests.adapters import hf_job as module

    class Killed:
        def __init__(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    module.Stopped = Killed  # raised where a test's own process would stop
    module.Job(Path(root)).run(int(step))


if __name__ == "__main__":
    main(*sys.argv[1:])
