"""The gate, rule by rule: what passes, what is refused and by which rule, and what it says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llava_pipeline.contracts import ChampionScores, Evaluation, Evidence, Grounding, Inspection, Interval, Rule
from llava_pipeline.tracking.gate import decide
from llava_pipeline.tracking.settings import GateSettings
from tests.tracking.conftest import MakeEvaluation

NAN = math.nan
Case = tuple[dict[str, Any], dict[str, Any] | None, set[str]]


def sure(mean: float, half: float = 0.01) -> Interval:
    return Interval(mean=mean, low=mean - half, high=mean + half)


def looking(over_shuffled: Interval, over_none: Interval | None = None) -> dict[str, Any]:
    return {"grounding": Grounding(over_shuffled=over_shuffled, over_no_image=over_none or sure(1.0), by_kind={})}


def health(**changes: Any) -> dict[str, Any]:
    return {"health": changes}


BETTER = {
    "likelihood_gain": sure(0.03),
    "exact_match_gain": sure(0.02, 0.015),
    "likelihood_gain_by_kind": {"color": sure(0.03), "yes/no": sure(0.03)},
    "exact_match_gain_by_kind": {"color": 0.02, "yes/no": 0.02},
}
NOT_MEASURED: dict[str, Any] = {
    "likelihood_gain": None, "exact_match_gain": None, "likelihood_gain_by_kind": {}, "exact_match_gain_by_kind": {},
}  # fmt: skip
RELATIVE = {"better_than_champion", "no_kind_worse_than_champion"}

# What the evaluation has, what the champion has (None: there is none), and which rules refuse.
CASES: dict[str, Case] = {
    # --- honest
    "first champion": ({}, None, set()),
    "better": ({}, {}, set()),
    "trained in half precision": ({"frozen_before": "e", "frozen_after": "e"}, {}, set()),
    "better, and a kind within the noise": (
        {}, {"likelihood_gain_by_kind": {"color": sure(0.05), "yes/no": sure(-0.02)}}, set(),
    ),
    "a kind with too few pictures for an interval": ({}, {"likelihood_gain_by_kind": {"color": sure(0.03)}}, set()),
    "long answers, which nobody guesses": ({"right": 0.0, "blind": 0.0, "short_share": 0.1}, {}, set()),
    "long answers that were cut": (health(unended=0.9, unended_short=None), {}, set()),
    # --- does not look
    "trained on shuffled pictures": (looking(sure(0.0, 0.03)), {}, {"looks_at_the_image"}),
    "a gain that may be chance": (looking(sure(0.05, 0.06)), None, {"looks_at_the_image"}),
    "a gain at the limit": (looking(sure(0.03, 0.01)), None, {"looks_at_the_image"}),
    "constant: the picture changes nothing": (looking(sure(0.0, 0.0)), None, {"looks_at_the_image"}),
    "better without any picture": (looking(sure(1.0), sure(-0.5)), {}, {"looks_at_the_image"}),
    "grounding not measured": ({"grounding": None}, {}, {"looks_at_the_image"}),
    "grounding NaN": (looking(Interval(mean=NAN, low=NAN, high=NAN)), {}, {"looks_at_the_image"}),
    "grounding infinite": (looking(Interval(mean=math.inf, low=math.inf, high=math.inf)), {}, {"looks_at_the_image"}),
    "no better than a blind guess": ({"blind": 0.9}, {}, {"better_than_blind"}),
    "hardly better than a blind guess": ({"blind": 0.881}, {}, {"better_than_blind"}),
    "exact match NaN": ({"right": NAN}, None, {"better_than_blind"}),
    "blind rate NaN": ({"blind": NAN}, None, {"better_than_blind"}),
    "short share NaN": ({"short_share": NAN, "blind": 0.9}, None, {"better_than_blind"}),
    # --- has not learned
    "no better than before training": ({"over_untrained": sure(0.0)}, {}, {"better_than_untrained"}),
    "perhaps better than before training": ({"over_untrained": sure(0.05, 0.04)}, {}, {"better_than_untrained"}),
    "untrained not measured": ({"over_untrained": None}, {}, {"better_than_untrained"}),
    # --- broken
    "file tampered with": ({"problem": "weights differ"}, {}, {"artifact_is_whole"}),
    "another projector's file": ({"registered": "0" * 64}, {}, {"artifact_is_whole"}),
    "no file at all": ({"registered": None}, {}, {"artifact_is_whole"}),
    "frozen weights changed": ({"frozen_after": "e"}, {}, {"frozen_weights_unchanged"}),
    "training loss NaN": ({"final_loss": NAN}, {}, {"numbers_are_finite"}),
    "training loss infinite": ({"final_loss": math.inf}, {}, {"numbers_are_finite"}),
    "held-out loss NaN": ({"loss": NAN}, {}, {"numbers_are_finite"}),
    "held-out loss not measured": ({"loss": None}, {}, {"numbers_are_finite"}),
    "one logit NaN": (health(num_not_finite=1), {}, {"numbers_are_finite"}),
    "says nothing": (health(empty=0.03), {}, {"answers_are_healthy"}),
    "says it again and again": (health(repeating=0.06), {}, {"answers_are_healthy"}),
    "never ends": (health(unended_short=0.3), {}, {"answers_are_healthy"}),
    "health NaN": (health(empty=NAN), {}, {"answers_are_healthy"}),
    # --- against the champion
    "another tower's projector": ({}, {"frozen_digest": "0" * 64}, {"same_frozen_parts"}),
    "the champion again": ({}, {"projector_digest": "own"}, {"not_the_champion_again"}),
    "equal": ({}, {"likelihood_gain": sure(0.0, 0.0), "exact_match_gain": sure(0.0, 0.0)}, {"better_than_champion"}),
    "perhaps better": ({}, {"likelihood_gain": sure(0.01, 0.02)}, {"better_than_champion"}),
    "worse": ({}, {"likelihood_gain": sure(-0.03)}, {"better_than_champion"}),
    "more likely, but fewer matches": ({}, {"exact_match_gain": sure(-0.01)}, {"better_than_champion"}),
    "one kind better, another one worse": (
        {}, {"likelihood_gain_by_kind": {"color": sure(0.2), "yes/no": sure(-0.08)}}, {"no_kind_worse_than_champion"},
    ),
    "one kind perhaps worse": (
        {}, {"likelihood_gain_by_kind": {"color": sure(0.2), "yes/no": sure(-0.01, 0.05)}},
        {"no_kind_worse_than_champion"},
    ),
    "one kind with fewer matches": (
        {}, {"exact_match_gain_by_kind": {"color": 0.2, "yes/no": -0.06}}, {"no_kind_worse_than_champion"},
    ),
    "one kind not asked": ({}, {"exact_match_gain_by_kind": {"color": 0.2}}, {"no_kind_worse_than_champion"}),
    "one kind NaN": (
        {}, {"exact_match_gain_by_kind": {"color": 0.2, "yes/no": NAN}}, {"no_kind_worse_than_champion"},
    ),
    "the gain NaN": ({}, {"likelihood_gain": Interval(mean=NAN, low=NAN, high=NAN)}, {"better_than_champion"}),
    "the champion not measured": ({}, NOT_MEASURED, RELATIVE),
    "the champion cannot be asked": (
        {}, NOT_MEASURED | {"problem": "its file is damaged", "held_out_digest": None}, {"same_questions", *RELATIVE},
    ),
    "another set of questions": ({}, {"held_out_digest": "1" * 64}, {"same_questions"}),
    "scores of another set": ({"scored_on": "1" * 64}, {}, {"same_questions"}),
    "a champion that moved": ({"now": "7"}, {}, {"champion_has_not_moved"}),
    "a first champion meanwhile": ({"now": "7"}, None, {"champion_has_not_moved"}),
    "the champion gone meanwhile": ({"now": None}, {}, {"champion_has_not_moved"}),
}  # fmt: skip


def judged(
    make_evaluation: MakeEvaluation, found: dict[str, Any], champion: dict[str, Any] | None, gate: GateSettings
) -> tuple[Evaluation, tuple[Rule, ...]]:
    found = dict(found)
    outside = {key: found.pop(key) for key in ("problem", "registered", "now", "scored_on") if key in found}
    ill = found.pop("health", {})
    evaluation = make_evaluation(**found)
    evaluation = evaluation.model_copy(update={
        "health": evaluation.health.model_copy(update=ill),
        "scored": evaluation.scored.model_copy(
            update={"held_out_digest": outside.get("scored_on", evaluation.held_out_digest)}
        ),
    })  # fmt: skip
    own = evaluation.projector.projector.digest
    asked = None
    if champion is not None:
        known = {
            "version": "1", "frozen_digest": "f" * 64, "projector_digest": "1" * 64, "exact_match": 0.88,
            "likelihood": 0.77, "held_out_digest": evaluation.held_out_digest, **BETTER, **champion,
        }  # fmt: skip
        known["projector_digest"] = own if known["projector_digest"] == "own" else known["projector_digest"]
        asked = ChampionScores(**known)
    inspection = Inspection(problem=outside.get("problem"), projector_digest=outside.get("registered", own))
    now = outside.get("now", None if champion is None else "1")
    return evaluation, decide(evaluation, Evidence(inspection=inspection, champion=asked), now, gate)


@pytest.mark.parametrize(("found", "champion", "refused"), CASES.values(), ids=CASES)
def test_rules(
    make_evaluation: MakeEvaluation, found: dict[str, Any], champion: dict[str, Any] | None, refused: set[str]
) -> None:
    _, rules = judged(make_evaluation, found, champion, GateSettings())
    assert {rule.name for rule in rules if not rule.passed} == refused
    assert len({rule.name for rule in rules}) == len(rules) == 14
    assert all(rule.found and rule.required for rule in rules)
    assert all(bool(rule.remedy) != rule.passed for rule in rules)


def test_it_says_what_was_found_and_what_would_have_to_change(make_evaluation: MakeEvaluation) -> None:
    _, made = judged(make_evaluation, looking(sure(0.001)), None, GateSettings())
    rule = {rule.name: rule for rule in made}["looks_at_the_image"]
    assert rule.found == (
        "+0.001 [-0.009, +0.011] nats per token over another picture; +1.000 [+0.990, +1.010] nats per token over "
        "no picture"
    )
    assert "surely gains more than 0.02 nats" in rule.required
    assert "check that the pictures belong to their questions" in rule.remedy
    assert {rule.found for rule in made[9:]} == {"no champion yet"}


@pytest.mark.parametrize(
    ("limit", "value"),
    [("max_seconds_per_answer", 0.009), ("max_memory_gb", 0.004), ("max_training_minutes", 0.2)],
)
def test_costs_are_limited_where_a_limit_is_set(make_evaluation: MakeEvaluation, limit: str, value: float) -> None:
    _, free = judged(make_evaluation, {}, {}, GateSettings())
    _, bound = judged(make_evaluation, {}, {}, GateSettings(**{limit: value}))
    assert all(rule.passed for rule in free)
    assert [rule.name for rule in bound if not rule.passed] == ["within_limits"]


def test_thresholds_come_from_the_settings(make_evaluation: MakeEvaluation) -> None:
    strict = GateSettings(
        min_grounding_gain=2.0,
        min_over_untrained=0.9,
        min_over_blind=0.5,
        min_over_champion=0.1,
        max_kind_regression=0.0,
    )
    champion = {"likelihood_gain_by_kind": {"color": sure(0.03), "yes/no": sure(0.005)}}
    _, rules = judged(make_evaluation, {}, champion, strict)
    assert {rule.name for rule in rules if not rule.passed} == {
        "looks_at_the_image", "better_than_untrained", "better_than_blind", *RELATIVE,
    }  # fmt: skip


def test_equal_evidence_gives_an_equal_verdict(make_evaluation: MakeEvaluation) -> None:
    assert judged(make_evaluation, {}, {}, GateSettings())[1] == judged(make_evaluation, {}, {}, GateSettings())[1]
