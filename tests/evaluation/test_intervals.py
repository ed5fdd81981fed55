"""Intervals cover what they say they cover, count pictures and not questions, and are the same each time."""

from __future__ import annotations

import numpy as np
import pytest

from llava_pipeline.evaluation.intervals import MIN_PICTURES, by_kind, interval


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = interval(random.normal(0.3, 1.0, 120).tolist(), range(120))
        assert found is not None
        hits += found.low <= 0.3 <= found.high
    assert 0.90 <= hits / 200 <= 0.98


def test_questions_about_one_picture_are_not_counted_as_independent() -> None:
    random = np.random.default_rng(1)
    of_picture = np.repeat(random.normal(0.0, 1.0, 40), 10)
    together = interval(of_picture.tolist(), np.repeat(np.arange(40), 10).tolist())
    apart = interval(of_picture.tolist(), range(400))
    assert together is not None
    assert apart is not None
    assert together.mean == apart.mean
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(10**0.5, rel=0.15)


def test_equal_numbers_give_an_equal_interval_and_a_constant_has_none() -> None:
    values = np.random.default_rng(2).random(50).tolist()
    assert interval(values, range(50)) == interval(values, range(50))
    flat = interval([0.25] * 50, range(50))
    assert flat is not None
    assert flat.low == flat.mean == flat.high == 0.25


def test_too_few_pictures_give_no_interval() -> None:
    assert interval([], []) is None
    assert interval([1.0] * 100, [k % (MIN_PICTURES - 1) for k in range(100)]) is None
    assert interval([1.0] * 100, [k % MIN_PICTURES for k in range(100)]) is not None


def test_pictures_with_more_questions_weigh_more() -> None:
    pictures = [0] * 30 + list(range(1, 21))
    found = interval([1.0] * 30 + [0.0] * 20, pictures)
    assert found is not None
    assert found.mean == 0.6
    assert found.low == 0.0
    assert found.high > 0.6


def test_kinds_are_judged_apart() -> None:
    kinds = ["a"] * 20 + ["b"] * 20 + ["c"] * 3
    found = by_kind([1.0] * 20 + [2.0] * 20 + [3.0] * 3, range(43), kinds)
    assert {kind: one.mean for kind, one in found.items()} == {"a": 1.0, "b": 2.0}
