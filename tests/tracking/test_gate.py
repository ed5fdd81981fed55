"""The gate, rule by rule: what passes, what is refused and by which rule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llava_pipeline.tracking.gate import ChampionScores, decide
from llava_pipeline.tracking.settings import GateSettings
from tests.tracking.conftest import MakeEvaluation

NAN = math.nan
CHAMPION: dict[str, Any] = {"exact_match": 0.9, "by_kind": {"color": 0.9, "yes/no": 0.9}}
CHAMPION |= {"frozen_digest": "f" * 64, "projector_digest": "1" * 64}
RELATIVE = {"not_worse_than_champion", "no_kind_worse_than_champion"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, set[str]]] = {
    "first champion": ({}, None, set()),
    "first champion has to earn it": ({"right": 0.45}, None, {"looks_at_the_image", "better_than_blind"}),
    "better": ({"right": 0.95}, {}, set()),
    "between other parts": ({"right": 0.95}, {"frozen_digest": "0" * 64}, {"same_frozen_parts"}),
    "equal": ({}, {}, set()),
    "within the noise": ({"right": 0.895}, {}, set()),
    "worse": ({"right": 0.89}, {}, {"not_worse_than_champion"}),
    "one kind at the limit": ({"by_kind": {"color": 0.95, "yes/no": 0.85}}, {}, set()),
    "one kind worse": ({"by_kind": {"color": 0.96, "yes/no": 0.84}}, {}, {"no_kind_worse_than_champion"}),
    "one kind not asked": ({"by_kind": {"color": 0.9}}, {}, {"no_kind_worse_than_champion"}),
    "one kind NaN": ({"by_kind": {"color": 0.9, "yes/no": NAN}}, {}, {"no_kind_worse_than_champion"}),
    "new kind": ({"by_kind": {"color": 0.9, "yes/no": 0.9, "count": 0.0}}, {}, set()),
    "margins exactly reached": ({"right": 0.6, "shuffled": 0.5, "untrained": 0.5, "blind": 0.58}, None, set()),
    "shuffled equal": ({"shuffled": 0.9}, {}, {"looks_at_the_image"}),
    "shuffled just too close": ({"shuffled": 0.801}, {}, {"looks_at_the_image"}),
    "loss no lower with the right picture": ({"loss": 1.5}, {}, {"looks_at_the_image"}),
    "loss not measured": ({"loss": None, "loss_shuffled": None}, {}, set()),
    "untrained equal": ({"untrained": 0.9}, {}, {"better_than_untrained"}),
    "blind equal": ({"blind": 0.9}, {}, {"better_than_blind"}),
    "blind just too close": ({"blind": 0.881}, {}, {"better_than_blind"}),
    "trained in half precision": ({"frozen_before": "e", "frozen_after": "e"}, {}, set()),
    "frozen weights changed": ({"frozen_after": "e"}, {}, {"frozen_weights_unchanged"}),
    "training loss NaN": ({"final_loss": NAN}, {}, {"loss_is_finite"}),
    "training loss infinite": ({"final_loss": math.inf}, {}, {"loss_is_finite"}),
    "held-out loss NaN": ({"loss": NAN}, {}, {"loss_is_finite", "looks_at_the_image"}),
    "shuffled loss NaN": ({"loss_shuffled": NAN}, {}, {"looks_at_the_image"}),
    "shuffled loss infinite": ({"loss_shuffled": math.inf}, {}, {"looks_at_the_image"}),
    "score NaN": (
        {"right": NAN},
        {},
        {"looks_at_the_image", "better_than_untrained", "better_than_blind", *RELATIVE},
    ),
    "shuffled NaN": ({"shuffled": NAN}, {}, {"looks_at_the_image"}),
    "untrained NaN": ({"untrained": NAN}, {}, {"better_than_untrained"}),
    "blind NaN": ({"blind": NAN}, {}, {"better_than_blind"}),
    "champion NaN": ({}, {"exact_match": NAN}, {"not_worse_than_champion"}),
    "other held-out set": ({"right": 0.7}, {"held_out_digest": "1" * 64}, set()),
    "other held-out set and blind": ({"blind": 0.9}, {"held_out_digest": "1" * 64}, {"better_than_blind", *RELATIVE}),
}


@pytest.mark.parametrize(("scores", "champion", "refused"), CASES.values(), ids=CASES)
def test_rules(
    make_evaluation: MakeEvaluation, scores: dict[str, Any], champion: dict[str, Any] | None, refused: set[str]
) -> None:
    evaluation = make_evaluation(**scores)
    known = {**CHAMPION, "held_out_digest": evaluation.held_out_digest}
    other = None if champion is None else ChampionScores(version="1", **{**known, **champion})
    rules = decide(evaluation, other, GateSettings())
    assert {rule.name for rule in rules if not rule.passed} == refused
    assert len(rules) == 9
    assert all(rule.found and rule.required for rule in rules)


def test_it_says_what_was_found(make_evaluation: MakeEvaluation) -> None:
    rules = {rule.name: rule for rule in decide(make_evaluation(shuffled=0.85), None, GateSettings())}
    assert rules["looks_at_the_image"].found == (
        "exact match 0.900, 0.850 with shuffled pictures: +0.050; loss 0.2000 against 1.5000"
    )
    assert rules["looks_at_the_image"].required.startswith("a gain of at least 0.100 over shuffled pictures")
    assert rules["not_worse_than_champion"].found == "no champion yet"


def test_it_says_that_it_did_not_compare(make_evaluation: MakeEvaluation) -> None:
    champion = ChampionScores(version="1", **{**CHAMPION, "held_out_digest": "1" * 64, "exact_match": 1.0})
    rules = decide(make_evaluation(), champion, GateSettings())
    assert [r.found for r in rules if r.name in RELATIVE] == [
        "champion was scored on another set; not compared",
        "champion was scored on another set; not compared",
    ]


def test_thresholds_come_from_the_settings(make_evaluation: MakeEvaluation) -> None:
    strict = GateSettings(min_grounding_margin=0.6, min_over_untrained=0.9, min_over_blind=0.5)
    refused = {rule.name for rule in decide(make_evaluation(), None, strict) if not rule.passed}
    assert refused == {"looks_at_the_image", "better_than_untrained", "better_than_blind"}
