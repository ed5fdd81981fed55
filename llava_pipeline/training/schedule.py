"""Learning rate: linear warm-up, then a cosine to a floor, as a function of the share of the budget used."""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, peak: float, floor: float, warmup_share: float) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``num_steps``."""
    warmup = math.ceil(num_steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - 1 - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
