"""What holds on an accelerator holds on one that works late, on any machine with a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import late_device

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("c++") is None, reason="NO C++ COMPILER: no device to test on")
def test_the_tests_of_devices_pass_on_a_device_that_works_late(tmp_path):
    library = tmp_path / "late_device.so"
    late_device.build(library)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/device"],
        cwd=ROOT,
        env={**os.environ, "TEST_DEVICE": str(library)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "skipped" not in found.stdout.splitlines()[-1]
