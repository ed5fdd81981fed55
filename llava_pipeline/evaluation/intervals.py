"""How sure a mean is: a bootstrap over pictures, because questions about one picture are not independent.

The interval is the percentile bootstrap's (Efron, 1979) with whole pictures drawn with replacement; to draw questions
instead makes intervals up to three times too narrow where a picture has several.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_pipeline.contracts import Interval

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0
MIN_PICTURES = 10  # with fewer an interval means nothing
_CHUNK = 1 << 22  # weights drawn at once


def interval(values: Sequence[float], pictures: Sequence[int]) -> Interval | None:
    """The mean of ``values``, one per question, and its interval; ``pictures`` says which picture each is about.

    None with fewer than ten pictures. The same numbers give the same interval.
    """
    _, cluster = np.unique(np.asarray(pictures), return_inverse=True)
    count = int(cluster.max()) + 1 if len(cluster) else 0
    if count < MIN_PICTURES:
        return None
    numbers = np.asarray(values, dtype=np.float64)
    sums = np.bincount(cluster, weights=numbers, minlength=count)
    sizes = np.bincount(cluster, minlength=count).astype(np.float64)
    means = _means(sums, sizes)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=float(numbers.mean()), low=float(low), high=float(high))


def by_kind(values: Sequence[float], pictures: Sequence[int], kinds: Sequence[str]) -> dict[str, Interval]:
    """Intervals of each kind of question; a kind with too few pictures is left out."""
    found = {}
    for kind in sorted(set(kinds)):
        rows = [k for k, name in enumerate(kinds) if name == kind]
        one = interval([values[k] for k in rows], [pictures[k] for k in rows])
        if one is not None:
            found[kind] = one
    return found


def _means(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Means of as many resamples of the clusters."""
    count = len(sums)
    random = np.random.default_rng(SEED)
    step = max(1, _CHUNK // count)
    means = []
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(0, count, (min(step, RESAMPLES - start), count))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    return np.concatenate(means)
