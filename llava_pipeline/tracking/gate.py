"""Whether a projector may become champion: rules over numbers, nothing else. What was not measured passes no rule."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llava_pipeline.contracts import ChampionScores, Evaluation, Evidence, Interval, Rule
from llava_pipeline.tracking.settings import GateSettings

_ROUNDING = 1e-9  # 0.6 - 0.5 is a little less than 0.1
MOSTLY = 0.5
SAME_PARTS = "give another pair of backbones a name of its own: --set profile=NAME"
MORE_TRAINING = "train longer, on more data, or with another learning rate"


def decide(
    evaluation: Evaluation, evidence: Evidence, champion_now: str | None, gate: GateSettings
) -> tuple[Rule, ...]:
    """Every rule with what was found; the projector may become champion when all of them passed.

    The first eight rules are absolute, so the first champion has to earn its place too. The others compare with the
    champion, which was asked the same questions in the same job; they pass when there is none. ``champion_now`` is who
    is champion at the moment of the decision.
    """
    return (
        _artifact_is_whole(evaluation, evidence),
        _frozen_weights_unchanged(evaluation),
        _numbers_are_finite(evaluation),
        _looks_at_the_image(evaluation, gate),
        _better_than_untrained(evaluation, gate),
        _better_than_blind(evaluation, gate),
        _answers_are_healthy(evaluation, gate),
        _within_limits(evaluation, gate),
        *_against_champion(evaluation, evidence.champion, champion_now, gate),
    )


# --------------------------------------------------------------------------------------------- absolute rules


def _artifact_is_whole(evaluation: Evaluation, evidence: Evidence) -> Rule:
    """Read from the registry by a process of its own: digest, shapes, finite numbers, and the recorded answers."""
    seen, own = evidence.inspection, evaluation.projector.projector.digest
    problem = seen.problem
    if problem is None and seen.projector_digest != own:
        problem = f"the registered projector is {_short(seen.projector_digest)}, {_short(own)} was evaluated"
    return _rule(
        "artifact_is_whole",
        problem is None,
        problem or f"digest {_short(own)}; a fresh process loads it and gets the recorded answers",
        "the registered files are what was evaluated, load in a fresh process and answer as recorded",
        "run it again: the files in MLflow's artifact store are not those that were recorded",
    )


def _frozen_weights_unchanged(evaluation: Evaluation) -> Rule:
    before, after = evaluation.projector.frozen_digest_before, evaluation.projector.frozen_digest_after
    return _rule(
        "frozen_weights_unchanged",
        before == after,
        f"digest {_short(before)} before training, {_short(after)} after",
        "the same digest before and after",
        "find what wrote into the frozen parts; this projector belongs to weights that are gone",
    )


def _numbers_are_finite(evaluation: Evaluation) -> Rule:
    losses = {"training": evaluation.projector.final_loss, "held out": evaluation.right_image.loss}
    wrong = evaluation.health.num_not_finite
    told = [f"{name} loss {'not measured' if loss is None else format(loss, '.4f')}" for name, loss in losses.items()]
    return _rule(
        "numbers_are_finite",
        all(_finite(loss) for loss in losses.values()) and wrong == 0,
        ", ".join([*told, f"{wrong} questions with a number that is none"]),
        "finite numbers everywhere",
        "lower training.learning_rate, or train in bf16 or fp32 instead of fp16",
    )


def _looks_at_the_image(evaluation: Evaluation, gate: GateSettings) -> Rule:
    """The rule that a model which never looks cannot pass."""
    found = evaluation.grounding
    gains = {} if found is None else {"another picture": found.over_shuffled, "no picture": found.over_no_image}
    return _rule(
        "looks_at_the_image",
        bool(gains) and all(_surely_above(gain, gate.min_grounding_gain) for gain in gains.values()),
        "; ".join(f"{_told(gain)} nats per token over {name}" for name, gain in gains.items()) or "not measured",
        f"the true answer surely gains more than {gate.min_grounding_gain:g} nats per token by its own picture",
        f"{MORE_TRAINING}; check that the pictures belong to their questions, and raise evaluation.max_samples "
        "where the interval is wide",
    )


def _better_than_untrained(evaluation: Evaluation, gate: GateSettings) -> Rule:
    gain = evaluation.over_untrained
    return _rule(
        "better_than_untrained",
        _surely_above(gain, gate.min_over_untrained),
        f"likelihood {_number(evaluation.right_image.likelihood)}, {_number(evaluation.untrained.likelihood)} before "
        f"training: {_told(gain)}",
        f"surely more than {gate.min_over_untrained:g} above the projector before training",
        MORE_TRAINING,
    )


def _better_than_blind(evaluation: Evaluation, gate: GateSettings) -> Rule:
    """Where answers are a few words, the best guess per question text is a line that a blind model reaches."""
    right, blind = evaluation.right_image.exact_match, evaluation.blind_rate
    required = f"exact match at least {gate.min_over_blind:g} above the best answer without any picture"
    if evaluation.short_share < MOSTLY:
        told = f"{evaluation.short_share:.0%} of the true answers are short: nobody guesses the others word by word"
        return _rule("better_than_blind", _finite(evaluation.short_share), told, required, MORE_TRAINING)
    return _rule(
        "better_than_blind",
        _at_least(right - blind, gate.min_over_blind),
        f"exact match {right:.3f}, {blind:.3f} without any picture: {right - blind:+.3f}",
        required,
        MORE_TRAINING,
    )


def _answers_are_healthy(evaluation: Evaluation, gate: GateSettings) -> Rule:
    """Long answers may be cut by ``evaluation.max_new_tokens``, so that is held against short ones only."""
    health = evaluation.health
    limits = [("empty", health.empty, gate.max_empty), ("in a loop", health.repeating, gate.max_repeating)]
    if health.unended_short is not None:
        limits.append(("short ones without an end", health.unended_short, gate.max_unended))
    return _rule(
        "answers_are_healthy",
        all(_at_least(limit - share, 0.0) for _, share, limit in limits),
        ", ".join(f"{share:.1%} {name}" for name, share, _ in limits),
        ", ".join(f"at most {limit:.1%} {name}" for name, _, limit in limits),
        f"{MORE_TRAINING}; check that the chat template ends an answer, and evaluation.max_new_tokens",
    )


def _within_limits(evaluation: Evaluation, gate: GateSettings) -> Rule:
    trained, scored = evaluation.projector, evaluation.scored
    limits = (
        ("seconds per answer", scored.seconds_per_answer, gate.max_seconds_per_answer),
        ("GB of memory", scored.peak_memory_bytes / 1e9, gate.max_memory_gb),
        ("minutes of training", trained.seconds / 60, gate.max_training_minutes),
        ("paid for training", trained.cost, gate.max_training_cost),
    )
    asked = [(name, value, limit) for name, value, limit in limits if limit is not None]
    return _rule(
        "within_limits",
        all(_at_least(limit - value, 0.0) for _, value, limit in asked),
        ", ".join(f"{value:.3g} {name}" for name, value, _ in limits),
        ", ".join(f"at most {limit:g} {name}" for name, _, limit in asked) or "nothing is limited",
        "lower the budget in training, or raise the limit in mlflow.yml",
    )


# --------------------------------------------------------------------------------------------- against the champion


def _against_champion(
    evaluation: Evaluation, champion: ChampionScores | None, champion_now: str | None, gate: GateSettings
) -> Iterator[Rule]:
    yield _champion_has_not_moved(champion, champion_now)
    if champion is None:
        yield from (_rule(name, True, "no champion yet", required, "") for name, required in _COMPARISONS.items())
        return
    yield _same_frozen_parts(evaluation, champion)
    yield _not_the_champion_again(evaluation, champion)
    yield _same_questions(evaluation, champion)
    yield _better_than_champion(champion, gate)
    yield _no_kind_worse(evaluation, champion, gate)


_COMPARISONS = {
    "same_frozen_parts": "the same frozen parts as the champion",
    "not_the_champion_again": "another projector than the champion's",
    "same_questions": "the champion was asked the same questions in the same job",
    "better_than_champion": "surely better than the champion over all questions",
    "no_kind_worse_than_champion": "no kind of question is answered worse than by the champion",
}


def _champion_has_not_moved(champion: ChampionScores | None, now: str | None) -> Rule:
    seen = None if champion is None else champion.version
    return _rule(
        "champion_has_not_moved",
        seen == now,
        f"compared with {_version(seen)}; champion now is {_version(now)}",
        "the champion is the one that was compared with",
        "judge it again, against the champion of now: `llava-pipeline gate VERSION`",
    )


def _same_frozen_parts(evaluation: Evaluation, champion: ChampionScores) -> Rule:
    """Serving swaps projectors between the same backbones; another pair wants a registered model of its own."""
    own = evaluation.projector.model.frozen_digest
    return _rule(
        "same_frozen_parts",
        champion.frozen_digest == own,
        f"digest {_short(own)}, the champion's {_short(champion.frozen_digest)}",
        _COMPARISONS["same_frozen_parts"],
        SAME_PARTS,
    )


def _not_the_champion_again(evaluation: Evaluation, champion: ChampionScores) -> Rule:
    own = evaluation.projector.projector.digest
    same = champion.projector_digest == own
    return _rule(
        "not_the_champion_again",
        not same,
        f"the same projector as version {champion.version}" if same else f"a new one, {_short(own)}",
        _COMPARISONS["not_the_champion_again"],
        "nothing has changed since: change the spec, or let new data come",
    )


def _same_questions(evaluation: Evaluation, champion: ChampionScores) -> Rule:
    own, others = evaluation.held_out_digest, champion.held_out_digest
    asked = champion.problem or f"set {_short(own)}, the champion's {_short(others)}"
    return _rule(
        "same_questions",
        champion.problem is None and evaluation.scored.held_out_digest == own == others,
        asked,
        _COMPARISONS["same_questions"],
        "mend what is wrong with the champion, roll back (`llava-pipeline rollback`), or judge again with "
        "`llava-pipeline gate VERSION`",
    )


def _better_than_champion(champion: ChampionScores, gate: GateSettings) -> Rule:
    """Surely better by the likelihood of the true answers, which is finer than matches; and no fewer of these."""
    likely, hits = champion.likelihood_gain, champion.exact_match_gain
    return _rule(
        "better_than_champion",
        _surely_above(likely, gate.min_over_champion)
        and hits is not None
        and _at_least(hits.mean, -gate.max_regression),
        f"over version {champion.version}: likelihood {_told(likely)}, exact match {_told(hits)}",
        f"likelihood surely more than {gate.min_over_champion:g} above the champion's, exact match at most "
        f"{gate.max_regression:g} below",
        f"{MORE_TRAINING}; more held-out questions (evaluation.max_samples) show smaller differences",
    )


def _no_kind_worse(evaluation: Evaluation, champion: ChampionScores, gate: GateSettings) -> Rule:
    """Non-inferior in each kind; a kind with too few pictures for an interval is judged by its mean."""
    limit = gate.max_kind_regression
    worse, kinds = [], sorted(evaluation.right_image.by_kind)
    for kind in kinds:
        likely = champion.likelihood_gain_by_kind.get(kind)
        hits = champion.exact_match_gain_by_kind.get(kind)
        if hits is None or not _at_least(hits, -limit) or (likely is not None and not _at_least(likely.low, -limit)):
            told = "not measured" if hits is None else f"exact match {hits:+.3f}"
            worse.append(f"{kind}: likelihood {_told(likely)}, {told}")
    return _rule(
        "no_kind_worse_than_champion",
        bool(kinds) and not worse,
        "; ".join(worse) or f"none of {len(kinds)} kinds is worse than version {champion.version}",
        f"in every kind at most {limit:g} below the champion: likelihood surely, exact match by its mean",
        "train on more questions of the kinds that are named, or ask more of them where the interval is wide",
    )


# --------------------------------------------------------------------------------------------- numbers


def _rule(name: str, passed: bool, found: str, required: str, remedy: str) -> Rule:
    return Rule(name=name, passed=passed, found=found, required=required, remedy="" if passed else remedy)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _at_least(value: float, required: float) -> bool:
    """Whether a difference reaches what is required; NaN never does."""
    return math.isfinite(value) and value >= required - _ROUNDING


def _surely_above(found: Interval | None, required: float) -> bool:
    """Whether the whole interval is above; what is NaN or was not measured never is."""
    if found is None or not all(map(math.isfinite, (found.low, found.mean, found.high))):
        return False
    return found.low > required


def _told(found: Interval | None) -> str:
    return "not measured" if found is None else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _version(version: str | None) -> str:
    return "none" if version is None else f"version {version}"
