"""Whether a projector may become champion: rules over numbers, nothing else. NaN passes no rule."""

from __future__ import annotations

import math

from llava_pipeline.contracts import Evaluation, Rule
from llava_pipeline.spec import Frozen, Sha256
from llava_pipeline.tracking.settings import GateSettings

_ROUNDING = 1e-9  # 0.6 - 0.5 is a little less than 0.1


class ChampionScores(Frozen):
    """What the champion reached, and on which questions."""

    version: str
    held_out_digest: Sha256
    frozen_digest: Sha256
    projector_digest: Sha256
    exact_match: float
    by_kind: dict[str, float]


def decide(evaluation: Evaluation, champion: ChampionScores | None, gate: GateSettings) -> tuple[Rule, ...]:
    """Every rule with what was found; the projector may become champion when all of them passed.

    The first five rules are absolute, so the first champion has to earn its place too; the next two keep out what is
    no replacement for the champion. The last two compare with the champion. They pass when there is none. When it was
    scored on another held-out set, the numbers cannot be compared, and refusing would keep a champion for ever once
    the data have changed: these rules then pass with the note "champion was scored on another set; not compared", but
    only if all absolute rules pass; else they fail.

    "Not worse" leaves room for noise (``max_regression``). A chain of promotions can lose that much each time; set it
    to 0 to forbid that.
    """
    absolute = (
        _frozen_weights_unchanged(evaluation),
        _loss_is_finite(evaluation),
        _looks_at_the_image(evaluation, gate),
        _better_than_untrained(evaluation, gate),
        _better_than_blind(evaluation, gate),
    )
    replaces = (_same_frozen_parts(evaluation, champion), _not_the_champion_again(evaluation, champion))
    if champion is None:
        return (*absolute, *replaces, *_not_compared(True, "no champion yet"))
    if champion.held_out_digest != evaluation.held_out_digest:
        passed = all(rule.passed for rule in absolute)
        return (*absolute, *replaces, *_not_compared(passed, "champion was scored on another set; not compared"))
    return (
        *absolute,
        *replaces,
        _not_worse_than_champion(evaluation, champion, gate),
        _no_kind_worse_than_champion(evaluation, champion, gate),
    )


def _frozen_weights_unchanged(evaluation: Evaluation) -> Rule:
    before, after = evaluation.projector.frozen_digest_before, evaluation.projector.frozen_digest_after
    return Rule(
        name="frozen_weights_unchanged",
        passed=before == after,
        found=f"digest {before[:12]} before training, {after[:12]} after",
        required="the same digest before and after",
    )


def _loss_is_finite(evaluation: Evaluation) -> Rule:
    losses = {"training": evaluation.projector.final_loss, "held out": evaluation.right_image.loss}
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    return Rule(
        name="loss_is_finite",
        passed=all(math.isfinite(loss) for loss in measured.values()),
        found=", ".join(f"{name} {loss:.4f}" for name, loss in measured.items()),
        required="finite numbers",
    )


def _looks_at_the_image(evaluation: Evaluation, gate: GateSettings) -> Rule:
    right, shuffled = evaluation.right_image, evaluation.shuffled_image
    passed = _at_least(right.exact_match - shuffled.exact_match, gate.min_grounding_margin)
    found = _gain(right.exact_match, shuffled.exact_match, "with shuffled pictures")
    required = f"a gain of at least {gate.min_grounding_margin:.3f} over shuffled pictures"
    if right.loss is not None and shuffled.loss is not None:
        passed = passed and right.loss < shuffled.loss < math.inf
        found += f"; loss {right.loss:.4f} against {shuffled.loss:.4f}"
        required += ", and a lower loss"
    return Rule(name="looks_at_the_image", passed=passed, found=found, required=required)


def _better_than_untrained(evaluation: Evaluation, gate: GateSettings) -> Rule:
    right, untrained = evaluation.right_image.exact_match, evaluation.untrained.exact_match
    return Rule(
        name="better_than_untrained",
        passed=_at_least(right - untrained, gate.min_over_untrained),
        found=_gain(right, untrained, "before training"),
        required=f"a gain of at least {gate.min_over_untrained:.3f} over the projector before training",
    )


def _better_than_blind(evaluation: Evaluation, gate: GateSettings) -> Rule:
    right, blind = evaluation.right_image.exact_match, evaluation.blind_rate
    return Rule(
        name="better_than_blind",
        passed=_at_least(right - blind, gate.min_over_blind),
        found=_gain(right, blind, "without any picture"),
        required=f"a gain of at least {gate.min_over_blind:.3f} over the best answer without any picture",
    )


def _same_frozen_parts(evaluation: Evaluation, champion: ChampionScores | None) -> Rule:
    """Serving swaps projectors between the same backbones; another pair wants a registered model of its own."""
    own = evaluation.projector.model.frozen_digest
    found = (
        "no champion yet" if champion is None else f"digest {own[:12]}, the champion's {champion.frozen_digest[:12]}"
    )
    return Rule(
        name="same_frozen_parts",
        passed=champion is None or champion.frozen_digest == own,
        found=found,
        required="the same frozen parts as the champion; give another pair a name of its own: --set profile=NAME",
    )


def _not_the_champion_again(evaluation: Evaluation, champion: ChampionScores | None) -> Rule:
    own = evaluation.projector.projector.digest
    same = champion is not None and champion.projector_digest == own
    return Rule(
        name="not_the_champion_again",
        passed=not same,
        found=f"the same projector as version {champion.version}" if same and champion else f"a new one, {own[:12]}",
        required="another projector than the champion's",
    )


def _not_worse_than_champion(evaluation: Evaluation, champion: ChampionScores, gate: GateSettings) -> Rule:
    right = evaluation.right_image.exact_match
    return Rule(
        name="not_worse_than_champion",
        passed=_at_least(right - champion.exact_match, -gate.max_regression),
        found=_gain(right, champion.exact_match, f"of version {champion.version}"),
        required=f"at most {gate.max_regression:.3f} less than the champion",
    )


def _no_kind_worse_than_champion(evaluation: Evaluation, champion: ChampionScores, gate: GateSettings) -> Rule:
    """A kind that the champion answered and this one was not asked counts as worse."""
    own = evaluation.right_image.by_kind
    worse = [
        f"{kind} {own.get(kind, math.nan):.3f} against {value:.3f}"
        for kind, value in sorted(champion.by_kind.items())
        if not _at_least(own.get(kind, math.nan) - value, -gate.max_kind_regression)
    ]
    return Rule(
        name="no_kind_worse_than_champion",
        passed=not worse,
        found="; ".join(worse) or f"none of {len(champion.by_kind)} kinds is worse than version {champion.version}",
        required=f"at most {gate.max_kind_regression:.3f} less than the champion in every kind",
    )


def _not_compared(passed: bool, note: str) -> tuple[Rule, Rule]:
    required = "no worse than the champion on the same held-out questions"
    return (
        Rule(name="not_worse_than_champion", passed=passed, found=note, required=required),
        Rule(name="no_kind_worse_than_champion", passed=passed, found=note, required=required),
    )


def _at_least(value: float, required: float) -> bool:
    """Whether a difference reaches what is required; NaN never does."""
    return math.isfinite(value) and value >= required - _ROUNDING


def _gain(own: float, other: float, label: str) -> str:
    return f"exact match {own:.3f}, {other:.3f} {label}: {own - other:+.3f}"
