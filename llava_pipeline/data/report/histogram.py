"""Histograms with the same bins for several sides, from counted whole numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MAX_BINS = 16
LONG_TAIL = (
    1.5  # the last bin is open where the largest value lies further out than this many times the 99th percentile
)


@dataclass(frozen=True, slots=True)
class Histogram:
    """``shares[side][bin]`` is the share of a side's values from ``edges[bin]`` to below ``edges[bin + 1]``.

    ``edges`` has one more entry than there are bins. Where ``open_end`` is set, the last bin has everything from its
    lower edge on.
    """

    edges: list[int]
    counts: list[list[int]]
    shares: list[list[float]]
    open_end: bool

    @property
    def num_bins(self) -> int:
        """How many bins there are."""
        return len(self.edges) - 1


def histogram(sides: Sequence[Counter[int]]) -> Histogram:
    """At most 16 bins of a round width (1, 2 or 5 times a power of ten) over the values of all sides.

    There has to be at least one value.
    """
    lowest = min(min(side) for side in sides if side)
    highest = max(max(side) for side in sides if side)
    tail = max(quantile(side, 0.99) for side in sides if side)
    open_end = highest > LONG_TAIL * tail
    top = tail if open_end else highest
    width = _round_width(lowest, top)
    first = lowest // width
    num_bins = top // width - first + 1
    counts = [[0] * num_bins for _ in sides]
    for counted, side in zip(counts, sides, strict=True):
        for value, times in side.items():
            counted[min(value // width - first, num_bins - 1)] += times
    return Histogram(
        edges=[(first + n) * width for n in range(num_bins + 1)],
        counts=counts,
        shares=[[times / max(1, sum(counted)) for times in counted] for counted in counts],
        open_end=open_end,
    )


def quantile(values: Counter[int], share: float) -> int:
    """The smallest value that at least ``share`` of the values do not exceed."""
    wanted, seen = share * values.total(), 0
    for value in sorted(values):
        seen += values[value]
        if seen >= wanted:
            return value
    raise ValueError("there are no values")


def _round_width(lowest: int, highest: int) -> int:
    """The smallest round width with which ``lowest`` to ``highest`` fall into few enough bins."""
    width = 1
    for factor in (2, 2.5, 2) * 9:
        if highest // width - lowest // width < MAX_BINS:
            break
        width = int(width * factor)
    return width
