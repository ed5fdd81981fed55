"""Scores as pure functions: exact match by kind, and what a model that never looks would reach."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence


def normal(text: str) -> str:
    """What counts as the same answer: case, outer space and a final full stop do not matter."""
    return text.strip().lower().removesuffix(".").strip()


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> list[bool]:
    """Whether each answer is its truth."""
    return [normal(answer) == normal(truth) for answer, truth in zip(answers, truths, strict=True)]


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; of nothing, 0."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def by_kind(values: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    """Mean per kind of question; of hits, the share."""
    groups: dict[str, list[float]] = defaultdict(list)
    for value, kind in zip(values, kinds, strict=True):
        groups[kind].append(value)
    return {kind: mean(group) for kind, group in sorted(groups.items())}


class BlindGuesser:
    """Answers each question by the answer most frequent for its text among the training rows; it never looks.

    A text it has not seen gets the most frequent answer of its kind.
    """

    def __init__(self, rounds: Iterable[tuple[str, str, str]]) -> None:
        """``rounds`` are (kind, question, answer)."""
        texts: dict[str, Counter[str]] = defaultdict(Counter)
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for kind, question, answer in rounds:
            texts[normal(question)][normal(answer)] += 1
            kinds[kind][normal(answer)] += 1
        self._by_text = {text: counts.most_common(1)[0][0] for text, counts in texts.items()}
        self._by_kind = {kind: counts.most_common(1)[0][0] for kind, counts in kinds.items()}

    def answer(self, kind: str, question: str) -> str:
        """Its guess; empty for a kind it has never seen."""
        return self._by_text.get(normal(question)) or self._by_kind.get(kind, "")


def derangement(num_images: int, seed: int) -> list[int]:
    """For every image another one: a random cycle through all of them. One image alone keeps itself."""
    import random

    cycle = list(range(num_images))
    random.Random(seed).shuffle(cycle)
    other = [0] * num_images
    for position, image in enumerate(cycle):
        other[image] = cycle[(position + 1) % num_images]
    return other
