"""In how many bits exported weights are stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0


def precision_of(weights: Iterable[Tensor]) -> torch.dtype:
    """float16; bfloat16 where the weights came in that and float16 would change them; float32 beyond its range."""
    exact = {torch.float16: True, torch.bfloat16: True}
    largest = 0.0
    for weight in weights:
        wide = weight.detach().float()
        largest = max(largest, float(wide.abs().max()))
        for dtype in exact:
            exact[dtype] = exact[dtype] and bool(torch.equal(wide.to(dtype).float(), wide))
    if exact[torch.bfloat16] and not exact[torch.float16]:
        return torch.bfloat16
    return torch.float16 if largest <= FLOAT16_MAX else torch.float32
