"""The next token of every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TINY = 1e-9  # a temperature below is this one


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is chosen. ``temperature`` 0 takes the most likely token each time, as evaluation does."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = field(default=())

    def generator(self) -> torch.Generator | None:
        """Where its chance comes from: equal seeds give equal answers; None where there is no chance."""
        if self.temperature == 0:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed % (1 << 64))  # torch takes no others
        return generator


def choose(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int]:  # fmt: skip
    """One token for every row of (B, V) logits."""
    chosen: list[int] = logits.argmax(-1).tolist()
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if generator is not None:
            chosen[row] = _draw(logits[row].float().cpu(), sampling, generator)
    return chosen


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by chance, among the most likely ones that together have ``top_p``."""
    # The largest becomes 0 before it is divided: no temperature, however small, makes infinity of it.
    far = (logits - logits.max()).double() / max(sampling.temperature, TINY)
    shares = far.softmax(-1)
    if sampling.top_p < 1:
        ranked, order = shares.sort(descending=True)
        beyond = ranked.cumsum(-1) - ranked >= sampling.top_p
        beyond[0] = False
        shares = torch.zeros_like(shares).scatter(0, order, ranked.masked_fill(beyond, 0.0))
    return int(torch.multinomial(shares, 1, generator=generator))
