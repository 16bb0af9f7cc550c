"""The README's claim, by the README's command: a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
STEPS, INTERVAL = 8, 2


@pytest.mark.torchrun
@pytest.mark.parametrize("storage", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_demo(tmp_path, storage):
    facts = run_demo(tmp_path, storage)

    assert facts["is_bit_equal"]
    reference = facts["losses"]["uninterrupted"]
    resumed = facts["losses"]["resumed on 4 ranks"]
    assert list(reference) == [str(step) for step in range(1, STEPS + 1)]
    # Not from step 6, whose save was killed, and not from the beginning.
    assert resumed == {step: reference[step] for step in ("5", "6", "7", "8")}

    assert facts["files_of_the_killed_save"], "the kill came before the save wrote anything"
    assert not [key for key in facts["files_of_the_killed_save"] if key.endswith("manifest.json")]
    assert facts["checkpoints"] == [4, 6, 8]  # the newest three, as the trainer keeps

    # Sums in another order differ in the last bits of a float32; another state differs by far more.
    assert set(facts["max_difference"]) == {"resumed on 2 ranks", "resumed on 2 stages"}
    assert all(difference < 1e-5 for difference in facts["max_difference"].values())


def run_demo(directory, storage):
    command = [sys.executable, str(DEMO), "--json", "--storage", storage]
    command += ["--directory", str(directory), "--steps", str(STEPS)]
    command += ["--save-interval", str(INTERVAL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
