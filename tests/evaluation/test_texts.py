"""Long answers, loops, and what is short."""

from __future__ import annotations

import pytest

from llava_pipeline.evaluation.texts import chrf_and_rouge, is_short, repeats


def test_equal_texts_score_full_and_strangers_nothing() -> None:
    texts = ["a small red circle stands on the left", "a small red circle stands on the left", ""]
    truths = ["a small red circle stands on the left", "zzz qqq", "a small red circle"]
    same, strange, empty = chrf_and_rouge(texts, truths)
    assert same == (pytest.approx(100.0), pytest.approx(1.0))
    assert strange[0] < 5
    assert strange[1] == 0
    assert empty[1] == 0
    assert chrf_and_rouge([], []) == []


def test_rouge_l_is_lins_own_example() -> None:
    # Lin, 2004: "police killed the gunman" against "police kill the gunman": LCS 3 of 4 and 4.
    ((_, rouge),) = chrf_and_rouge(["police kill the gunman"], ["police killed the gunman"])
    assert rouge == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([], False),
        ([1, 2, 3, 4, 5, 6, 7, 8], False),
        ([7] * 7, False),
        ([7] * 8, True),
        ([1, 2, 1, 2, 1, 2, 1], False),
        ([1, 2, 1, 2, 1, 2, 1, 2], True),
        ([9, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4], True),
        ([1, 2, 3] * 3, False),
        (list(range(16)) * 4, True),
        (list(range(17)) * 4, False),
    ],
)
def test_a_loop_is_the_same_words_four_times_and_eight_tokens(ids: list[int], loops: bool) -> None:
    assert repeats(ids) == loops


@pytest.mark.parametrize(("truth", "short"), [("red", True), ("two of them left", True), ("a man on a horse", False)])
def test_a_few_words_are_short(truth: str, short: bool) -> None:
    assert is_short(truth) == short
