"""From lines to numbers: scores, grounding, yes and no, health, and one projector against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llava_pipeline.contracts import Grounding, Health, Interval, Likely, Score, YesNo
from llava_pipeline.evaluation import intervals
from llava_pipeline.evaluation.lines import Line
from llava_pipeline.evaluation.score import by_kind, exact_match, mean, normal
from llava_pipeline.evaluation.texts import is_short


def likelihood(loss: float) -> float:
    """Of an answer, from its nats per token."""
    return math.exp(-loss)


def likely(lines: Sequence[Line], suffix: str = "") -> Likely:
    """How likely the truth is in one condition; ``suffix`` is that of its columns.

    The loss is a mean over tokens, as in training; a likelihood a mean over questions.
    """
    losses = _column(lines, f"loss{suffix}")
    tokens = _column(lines, "num_truth_tokens")
    values = [likelihood(loss) for loss in losses]
    return Likely(
        loss=sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / max(1, sum(tokens)),
        likelihood=mean(values),
        likelihood_by_kind=by_kind(values, _column(lines, "kind")),
    )


def score(lines: Sequence[Line], suffix: str = "") -> Score:
    """One condition's scores."""
    hits = hits_of(lines, suffix)
    long = [line for line in lines if "chrf" in line] if not suffix else []
    return Score(
        exact_match=mean(hits),
        by_kind=by_kind(hits, _column(lines, "kind")),
        chrf=mean(line["chrf"] for line in long) if long else None,
        rouge_l=mean(line["rouge_l"] for line in long) if long else None,
        **likely(lines, suffix).model_dump(),
    )


def hits_of(lines: Sequence[Line], suffix: str = "") -> list[bool]:
    """Whether each answer is its truth."""
    return exact_match([line[f"answer{suffix}"] for line in lines], [line["truth"] for line in lines])


def grounding(lines: Sequence[Line]) -> Grounding | None:
    """What the right picture is worth; None with too few pictures to tell."""
    pictures, kinds = _column(lines, "image"), _column(lines, "kind")
    over_shuffled = [line["loss_shuffled"] - line["loss"] for line in lines]
    over_none = [line["loss_no_image"] - line["loss"] for line in lines]
    found = [intervals.interval(gains, pictures) for gains in (over_shuffled, over_none)]
    if found[0] is None or found[1] is None:
        return None
    kinds_ = intervals.by_kind(over_shuffled, pictures, kinds)
    return Grounding(over_shuffled=found[0], over_no_image=found[1], by_kind=kinds_)


def yes_no(lines: Sequence[Line]) -> YesNo | None:
    """Yes and no by their likelihood, so that a chatty model is not told wrong for its manners; None without any.

    The yes-rate is of what the model says, not of the truth (lmms-eval 0.7.3 counts the truth).
    """
    asked = [line for line in lines if "nats_over_opposite" in line]
    if not asked:
        return None
    right = [line["nats_over_opposite"] > 0 for line in asked]
    truth = [normal(line["truth"]) == "yes" for line in asked]
    said = [is_yes == is_right for is_yes, is_right in zip(truth, right, strict=True)]
    both = sum(a and b for a, b in zip(truth, said, strict=True))
    all_yes = sum(truth) + sum(said)
    return YesNo(
        num_questions=len(asked), accuracy=mean(right), f1=2 * both / all_yes if all_yes else 0.0,
        yes_rate=mean(said), true_yes_rate=mean(truth),
    )  # fmt: skip


def health(lines: Sequence[Line]) -> Health:
    """How the answers with the right picture are, right or wrong."""
    short = [line for line in lines if is_short(line["truth"])]
    return Health(
        empty=mean(not line["answer"] for line in lines),
        repeating=mean(line["repeats"] for line in lines),
        unended=mean(not line["ended"] for line in lines),
        unended_short=mean(not line["ended"] for line in short) if short else None,
        mean_tokens=mean(line["num_tokens"] for line in lines),
        num_not_finite=sum(not line["finite"] for line in lines),
    )


def likelihood_gain(lines: Sequence[Line], others: Sequence[Line]) -> list[float]:
    """By how much one projector finds each true answer more likely than another one."""
    return [likelihood(a["loss"]) - likelihood(b["loss"]) for a, b in zip(lines, others, strict=True)]


def gain(lines: Sequence[Line], others: Sequence[Line]) -> Interval | None:
    """The mean of that, with its interval; paired, so what makes a question hard for both cancels out."""
    return intervals.interval(likelihood_gain(lines, others), _column(lines, "image"))


def against(lines: Sequence[Line], others: Sequence[Line]) -> dict[str, Any]:
    """One projector against another on the same questions, as fields of ``ChampionScores``."""
    pictures, kinds = _column(lines, "image"), _column(lines, "kind")
    gains = likelihood_gain(lines, others)
    hits = [float(a) - float(b) for a, b in zip(hits_of(lines), hits_of(others), strict=True)]
    return {
        "likelihood_gain": intervals.interval(gains, pictures),
        "exact_match_gain": intervals.interval(hits, pictures),
        "likelihood_gain_by_kind": intervals.by_kind(gains, pictures, kinds),
        "exact_match_gain_by_kind": by_kind(hits, kinds),
    }


def short_share(lines: Sequence[Line]) -> float:
    """Share of true answers that are a few words."""
    return mean(is_short(line["truth"]) for line in lines)


def _column(lines: Sequence[Line], name: str) -> list[Any]:
    return [line[name] for line in lines]
