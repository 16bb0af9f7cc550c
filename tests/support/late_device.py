"""Builds the device of ``late_device.cpp``, and makes it the accelerator of this process."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("late_device.cpp")
NAME = "late"


def build(library: Path) -> None:
    """Compile; about 20 s."""
    paths = [f"-isystem{path}" for path in include_paths()]
    linked = [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared"]
    command = ["c++", *flags, *paths, str(SOURCE), "-o", str(library), *linked]
    subprocess.run([*command, "-ltorch_cpu", "-lc10"], check=True)


def register(library: Path) -> None:
    """From now on ``torch.accelerator`` is this device, called ``late``."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch.ops.load_library(library)
    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    sys.modules[module.__name__] = module
