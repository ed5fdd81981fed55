"""Scores: what counts as the same answer, what a model that never looks would reach, and whose picture is whose."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_pipeline.evaluation.score import BlindGuesser, by_kind, derangement, exact_match, mean, normal


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("red", "red"),
        ("Red", "red"),
        (" red ", "red"),
        ("red.", "red"),
        ("RED .", " red"),
        ("Yes.\n", "yes"),
        ("", " "),
    ],
)
def test_case_outer_space_and_a_full_stop_do_not_matter(answer: str, truth: str) -> None:
    assert exact_match([answer], [truth]) == [True]


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("red", "blue"), ("red circle", "red"), ("dark  red", "dark red"), ("red!", "red"), ("", "red"), ("1.5", "15")],
)
def test_all_else_does(answer: str, truth: str) -> None:
    assert exact_match([answer], [truth]) == [False]


@given(st.text(), st.sampled_from(["", " ", "\n", "."]))
def test_a_truth_matches_itself_however_it_is_written(text: str, end: str) -> None:
    assert exact_match([text, f" {text} "], [text, text]) == [True, True]
    assert normal(text.strip().removesuffix(".") + end) == normal(text.strip().removesuffix("."))


def test_every_answer_needs_its_truth() -> None:
    with pytest.raises(ValueError, match="shorter"):
        exact_match(["red", "blue"], ["red"])


def test_hits_are_counted_by_kind() -> None:
    hits = [True, False, True, True, False]
    assert by_kind(hits, ["yes/no", "color", "color", "color", "shape"]) == {"color": 2 / 3, "shape": 0, "yes/no": 1}
    assert list(by_kind(hits, ["b", "c", "a", "a", "c"])) == ["a", "b", "c"]
    assert by_kind([], []) == {}


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), min_size=1))
def test_the_kinds_weighted_by_their_size_make_the_whole(pairs: list[tuple[bool, str]]) -> None:
    hits, kinds = [hit for hit, _ in pairs], [kind for _, kind in pairs]
    shares = by_kind(hits, kinds)
    assert mean(hits) == pytest.approx(sum(shares[kind] for kind in kinds) / len(kinds))


def test_the_mean_of_nothing_is_nothing() -> None:
    assert mean([]) == 0
    assert mean(iter([1, 2])) == 1.5


# --------------------------------------------------------------------------------------------- blind

ROUNDS = [
    ("color", "What color is the circle?", "red"),
    ("color", "what color is the circle? ", "Blue."),
    ("color", "What color is the circle?", "blue"),
    ("color", "What color is the square?", "red"),
    ("color", "What color is the square?", "red"),
    ("yes/no", "Is it red?", "no"),
]


def test_a_blind_guesser_takes_the_most_frequent_answer_to_the_text() -> None:
    guesser = BlindGuesser(ROUNDS)
    assert guesser.answer("color", "What color is the circle?") == "blue"
    assert guesser.answer("color", "WHAT COLOR IS THE SQUARE?") == "red"


def test_of_a_text_it_has_not_seen_it_guesses_by_kind() -> None:
    guesser = BlindGuesser(ROUNDS)
    assert guesser.answer("color", "What color is the star?") == "red"
    assert guesser.answer("yes/no", "Is it blue?") == "no"
    assert guesser.answer("count", "How many?") == ""
    assert BlindGuesser([]).answer("color", "What color is the circle?") == ""


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("pqr"), st.sampled_from("xyz")), min_size=1))
def test_no_answer_by_text_alone_is_right_more_often(rounds: list[tuple[str, str, str]]) -> None:
    guesser = BlindGuesser(iter(rounds))

    def rate(answers: dict[str, str]) -> float:
        return mean(answers[question] == answer for _, question, answer in rounds)

    best = rate({question: guesser.answer("", question) for question in "pqr"})
    assert best == mean(guesser.answer(kind, question) == answer for kind, question, answer in rounds)
    assert all(rate({"p": p, "q": q, "r": r}) <= best for p in "xyz" for q in "xyz" for r in "xyz")


# --------------------------------------------------------------------------------------------- another's picture


@given(num=st.integers(2, 300), seed=st.integers())
def test_no_picture_is_shuffled_to_itself(num: int, seed: int) -> None:
    state = random.getstate()
    other = derangement(num, seed)
    assert sorted(other) == list(range(num))
    assert all(image != own for own, image in enumerate(other))
    assert derangement(num, seed) == other
    assert random.getstate() == state


def test_too_few_pictures_to_shuffle() -> None:
    assert derangement(1, 0) == [0]
    assert derangement(0, 0) == []
