"""A process that trains with a peer until it kills itself: ``python -m … lightning ROOT STEP``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def die() -> None:
    """At once, without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(peer: str, root: str, step: str) -> None:
    """Train, and die after the step."""
    if peer == "lightning":
        from tests.adapters.lightning_job import Job
    else:
        from tests.adapters.hf_job import Job
    Job(Path(root), stop=die).run(int(step))


if __name__ == "__main__":
    main(*sys.argv[1:])
