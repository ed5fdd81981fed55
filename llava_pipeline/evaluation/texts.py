"""Answers compared as texts: where they are longer than a few words, none matches its truth exactly."""

from __future__ import annotations

from collections.abc import Sequence

SHORT_WORDS = 4
MAX_NGRAM, MIN_TIMES, MIN_TOKENS = 16, 4, 8


def is_short(truth: str) -> bool:
    """Whether an answer can be expected word by word."""
    return len(truth.split()) <= SHORT_WORDS


def chrf_and_rouge(answers: Sequence[str], truths: Sequence[str]) -> list[tuple[float, float]]:
    """chrF (0 to 100) and ROUGE-L's F measure (0 to 1) of each answer, as torchmetrics has them.

    chrF: Popovic, 2015 (character 6-grams, beta 2). ROUGE-L: Lin, 2004, without stemming.
    """
    if not answers:
        return []
    from torchmetrics.functional.text import chrf_score  # takes five seconds
    from torchmetrics.functional.text.rouge import rouge_score

    _, each = chrf_score(list(answers), [[truth] for truth in truths], n_word_order=0, return_sentence_level_score=True)
    rouge = [
        float(rouge_score(answer, truth, rouge_keys="rougeL")["rougeL_fmeasure"])
        for answer, truth in zip(answers, truths, strict=True)
    ]
    return [(100 * float(chrf), one) for chrf, one in zip(each, rouge, strict=True)]


def repeats(ids: Sequence[int]) -> bool:
    """Whether an answer runs into a loop: some tokens four times or more in a row, eight tokens or more in all."""
    for size in range(1, min(MAX_NGRAM, len(ids) // MIN_TIMES) + 1):
        same = 0
        for k in range(size, len(ids)):
            same = same + 1 if ids[k] == ids[k - size] else 0
            if same + size >= max(size * MIN_TIMES, MIN_TOKENS):
                return True
    return False
