"""The accelerator of these tests: the machine's, or the late device that TEST_DEVICE names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support import late_device

LIBRARY = os.environ.get("TEST_DEVICE")
if LIBRARY:
    late_device.register(Path(LIBRARY))


@pytest.fixture
def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    if found is None or not torch.accelerator.is_available():
        pytest.skip("NO ACCELERATOR: a device that works late stands in, in test_late_device.py")
    return found
