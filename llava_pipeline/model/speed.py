"""How fast a device can multiply."""

from __future__ import annotations

import time

import torch


def measured_flops(device: torch.device, dtype: torch.dtype, side: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second of a square matrix product on this device, in this precision."""
    if device.type == "cuda":
        side = 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for _ in range(4 if device.type == "cuda" else 1):
            product = matrix @ matrix
            count += 1
        product[0, 0].item()
    return count * 2 * side**3 / (time.monotonic() - started)
