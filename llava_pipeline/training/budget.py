"""A budget is a stop condition, and the learning rate follows the share of it that is used.

So twenty minutes of a card end with a finished cosine. Of several budgets the one that is used up first counts, at
every step anew. Steps and samples are the same in every run; minutes and money are not, and neither is then the rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llava_pipeline.spec import TrainingSpec

FIRST_OF_WARMUP = 0.1


@dataclass(frozen=True, slots=True)
class Used:
    """What a run has used up so far; ``seconds`` of all its attempts."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0


def share(spec: TrainingSpec, used: Used) -> float:
    """Share of the budget that is used, of the one that is nearest to its end; 1 and more: used up."""
    hours = used.seconds / 3600
    shares = [
        used.steps / spec.max_steps if spec.max_steps else 0.0,
        used.samples / spec.max_samples if spec.max_samples else 0.0,
        hours * 60 / spec.max_minutes if spec.max_minutes else 0.0,
        hours * spec.price_per_hour / spec.max_cost if spec.max_cost else 0.0,
    ]
    return max(shares)


def next_samples(spec: TrainingSpec, used: Used) -> int:
    """Samples of the next step: the last one takes what is left."""
    left = spec.max_samples - used.samples if spec.max_samples else spec.samples_per_step
    return min(spec.samples_per_step, left)


def end_of_next(spec: TrainingSpec, used: Used, step_seconds: float) -> float:
    """Share used at the end of the next step, which takes as long as steps did lately.

    It is 1 where the time would not be enough for another one after it: then the next is the last.
    """
    counted = Used(used.steps + 1, used.samples + next_samples(spec, used))
    timed, one_more = (Used(seconds=used.seconds + count * step_seconds) for count in (1, 2))
    by_time = 1.0 if share(spec, one_more) > 1 else share(spec, timed)
    if step_seconds == 0 and (spec.max_minutes or spec.max_cost):
        by_time = max(by_time, FIRST_OF_WARMUP * spec.warmup_share)
    return min(1.0, max(share(spec, counted), by_time))


def learning_rate(spec: TrainingSpec, share: float) -> float:
    """Rate of the step that ends when ``share`` of the budget is used: a linear warm-up, then the schedule."""
    if share < spec.warmup_share:
        return spec.learning_rate * share / spec.warmup_share
    if spec.schedule == "constant":
        return spec.learning_rate
    done = (share - spec.warmup_share) / (1 - spec.warmup_share)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * cosine
