"""From lines to numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llava_pipeline.evaluation import summary

NUM = 40


def line(k: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": str(k), "image": k, "kind": "color" if k % 2 else "yes/no", "question": "?", "truth": "red",
        "num_truth_tokens": 2, "answer": "red", "num_tokens": 1, "ended": True, "repeats": False, "finite": True,
        "loss": 0.1, "answer_shuffled": "blue", "loss_shuffled": 1.1, "loss_no_image": 2.1,
    } | changes  # fmt: skip


def test_the_loss_is_a_mean_over_tokens_and_the_likelihood_over_questions() -> None:
    lines = [line(0, loss=1.0, num_truth_tokens=1), line(1, loss=0.0, num_truth_tokens=3)]
    found = summary.likely(lines)
    assert found.loss == 0.25
    assert found.likelihood == pytest.approx((math.exp(-1) + 1) / 2)
    assert found.likelihood_by_kind == {"color": 1.0, "yes/no": pytest.approx(math.exp(-1))}


def test_grounding_is_what_the_right_picture_gains_per_question() -> None:
    lines = [line(k, loss_shuffled=1.1 + (k % 3 - 1) / 10) for k in range(NUM - 1)]
    found = summary.grounding(lines)
    assert found is not None
    assert found.over_shuffled.mean == pytest.approx(1.0)
    assert found.over_shuffled.low < 1.0 < found.over_shuffled.high
    assert found.over_no_image.mean == pytest.approx(2.0)
    assert set(found.by_kind) == {"color", "yes/no"}
    assert summary.grounding(lines[:5]) is None


def test_one_that_never_looks_gains_nothing() -> None:
    found = summary.grounding([line(k, loss_shuffled=0.1) for k in range(NUM)])
    assert found is not None
    assert found.over_shuffled.low == found.over_shuffled.high == 0.0


def test_the_yes_rate_is_of_what_is_said() -> None:
    always_yes = [
        line(k, truth="yes" if k < 30 else "No.", nats_over_opposite=1.0 if k < 30 else -1.0) for k in range(NUM)
    ]
    found = summary.yes_no(always_yes)
    assert found is not None
    assert (found.yes_rate, found.true_yes_rate, found.accuracy) == (1.0, 0.75, 0.75)
    assert found.f1 == pytest.approx(2 * 30 / 70)
    assert summary.yes_no([line(0)]) is None


def test_health_counts_each_illness() -> None:
    lines = [
        line(0, answer=""), line(1, repeats=True), line(2, ended=False), line(3, finite=False),
        line(4, truth="a very long answer indeed", ended=False),
    ]  # fmt: skip
    found = summary.health(lines)
    assert (found.empty, found.repeating, found.unended, found.num_not_finite) == (0.2, 0.2, 0.4, 1)
    assert found.unended_short == 0.25


def test_one_against_another_is_paired() -> None:
    ours = [line(k, loss=0.1 + k / 100) for k in range(NUM)]
    theirs = [line(k, loss=0.2 + k / 100, answer="blue" if k % 4 == 1 else "red") for k in range(NUM)]
    found = summary.against(ours, theirs)
    gains = [math.exp(-a["loss"]) - math.exp(-b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    assert found["likelihood_gain"].mean == pytest.approx(sum(gains) / NUM)
    assert found["likelihood_gain"].low > 0
    assert found["exact_match_gain"].mean == 0.25
    assert found["exact_match_gain_by_kind"] == {"color": 0.5, "yes/no": 0.0}
    nothing = summary.against(ours, ours)["likelihood_gain"]
    assert nothing.low == nothing.mean == nothing.high == 0.0
