"""Stage 7: the gate decides; the alias ``champion`` moves only when every rule passes."""

from __future__ import annotations

from llava_pipeline.contracts import RecordedRun, Verdict
from llava_pipeline.tracking import gate, registry
from llava_pipeline.tracking.settings import load_settings


def pass_gate_and_promote(run: RecordedRun) -> Verdict:
    """Compare with the champion of this moment, then promote or leave the version a challenger."""
    settings = load_settings()
    champion = registry.version_by_alias(run.registered_model, settings.registry.champion, settings)
    rules = gate.decide(run.evaluation, registry.champion_scores(run.registered_model, settings), settings.gate)
    previous = None
    promoted = all(rule.passed for rule in rules)
    registry.write_verdict(run, rules, settings)
    if promoted:
        champion, previous = registry.promote(run.registered_model, run.version, champion, settings)
    return Verdict(
        decision="promoted" if promoted else "challenger", rules=rules, registered_model=run.registered_model,
        version=run.version, champion=champion, previous=previous, run_id=run.run_id,
    )  # fmt: skip
