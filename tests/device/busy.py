"""Work that keeps a device from what is queued behind it."""

from __future__ import annotations

import torch


def keep_busy(device: torch.device, tenths_of_s: int) -> None:
    """Queue work of about that long, and return at once."""
    if device.type == "cuda":
        for _ in range(tenths_of_s):
            torch.cuda._sleep(200_000_000)  # cycles
        return
    dummy = torch.zeros(1, device=device)
    for _ in range(500 * tenths_of_s):
        dummy.zero_()  # after a pause of 0.2 ms, on average
