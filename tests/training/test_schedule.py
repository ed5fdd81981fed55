"""The learning rate climbs, falls, and ends where it should."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_pipeline.training.schedule import learning_rate

PEAK, FLOOR = 2e-4, 2e-5


def rates(num_steps: int, warmup_share: float, floor: float = FLOOR) -> list[float]:
    return [learning_rate(step, num_steps, PEAK, floor, warmup_share) for step in range(num_steps)]


def test_it_warms_up_linearly_from_the_first_step() -> None:
    warming = rates(350, 0.05)[:18]
    assert warming == pytest.approx([PEAK * (step + 1) / 18 for step in range(18)])


def test_it_is_halfway_down_in_the_middle_of_the_cosine() -> None:
    assert rates(111, 0.1)[12 + 49] == pytest.approx((PEAK + FLOOR) / 2)


def test_without_a_warm_up_it_starts_at_the_peak() -> None:
    assert rates(10, 0.0)[0] == PEAK


@given(num_steps=st.integers(3, 400), share=st.floats(0, 0.9), floor=st.floats(0, PEAK))
def test_it_climbs_to_the_peak_then_falls_to_the_floor(num_steps: int, share: float, floor: float) -> None:
    found = rates(num_steps, share, floor)
    warmup = math.ceil(num_steps * share)
    assert max(found) == pytest.approx(PEAK)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert all(rate > 0 or floor == 0 for rate in found)
    assert min(found[warmup:], default=floor) >= floor - 1e-18
    if num_steps - warmup >= 2:
        assert found[-1] == pytest.approx(floor, abs=1e-15)


@given(num_steps=st.integers(1, 3), share=st.floats(0, 0.99))
def test_even_the_shortest_training_has_a_rate(num_steps: int, share: float) -> None:
    assert all(0 < rate <= PEAK for rate in rates(num_steps, share))
