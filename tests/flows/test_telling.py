"""People hear of a verdict when it is another one, with the rule that decided."""

from __future__ import annotations

from typing import Any

import pytest

from flows import telling
from flows.automations import automations
from llava_pipeline.contracts import RecordedRun, Rule, Verdict

RUN = RecordedRun.model_construct(run_id="r", experiment_id="7", registered_model="m", version="4")


def rule(name: str, passed: bool) -> Rule:
    return Rule(name=name, passed=passed, found="0.1", required="0.2", remedy="" if passed else "train longer")


def verdict(*refused: str, decision: str = "challenger") -> Verdict:
    names = ("looks_at_the_image", "better_than_champion", "within_limits")
    return Verdict(
        decision=decision,  # type: ignore[arg-type]
        rules=tuple(rule(name, name not in refused) for name in names), registered_model="m", version="4",
        champion="4" if decision == "promoted" else "3", previous="3", run_id="r",
    )  # fmt: skip


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(telling, "emit_event", lambda event, resource, payload: found.append((event, payload)))
    return found


@pytest.mark.parametrize(
    ("now", "before", "event"),
    [
        (verdict(decision="promoted"), None, telling.PROMOTED),
        (verdict(decision="promoted"), "better_than_champion", telling.PROMOTED),
        (verdict("better_than_champion"), None, telling.REFUSED),
        (verdict("better_than_champion"), "better_than_champion", telling.UNCHANGED),
        (verdict("better_than_champion", "within_limits"), "better_than_champion", telling.UNCHANGED),
        (verdict("looks_at_the_image", "better_than_champion"), "better_than_champion", telling.REFUSED),
        (verdict(), None, telling.WAITS),
        (verdict(), "better_than_champion", telling.WAITS),
    ],
)
def test_only_what_has_changed_is_told(
    emitted: list[tuple[str, dict[str, Any]]], now: Verdict, before: str | None, event: str
) -> None:
    assert telling.tell_verdict(RUN, now, before) == event
    assert [name for name, _ in emitted] == [event]


def test_a_refusal_names_the_leading_rule_with_its_numbers_and_the_page(
    emitted: list[tuple[str, dict[str, Any]]],
) -> None:
    telling.tell_verdict(RUN, verdict("better_than_champion", "within_limits"), None)
    ((_, payload),) = emitted
    assert payload["rule"] == "better_than_champion"
    assert payload["sentence"] == (
        "Version 4 of m was refused by better than champion: found 0.1, required 0.2; version 3 stays champion."
    )
    assert payload["page"].endswith("/#/experiments/7/runs/r")


def test_a_verdict_that_prefect_does_not_take_costs_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no events today")

    monkeypatch.setattr(telling, "emit_event", refuse)
    assert telling.tell_verdict(RUN, verdict(decision="promoted"), None) == telling.PROMOTED
    assert "no events today" in caplog.text


def test_without_somebody_to_tell_only_the_dead_are_ended() -> None:
    (only,) = automations(None)
    assert only.name == "llava-pipeline: a run without a heartbeat has crashed"
