"""Stage 8: the gate decides; the alias ``champion`` moves when every rule passes, and nobody has to approve."""

from __future__ import annotations

import logging

from llava_pipeline.contracts import Evidence, RecordedRun, Verdict
from llava_pipeline.tracking import gate, promotion, registry, verdict
from llava_pipeline.tracking.settings import load_settings

log = logging.getLogger(__name__)


def pass_gate_and_promote(run: RecordedRun, evidence: Evidence, who: str) -> Verdict:
    """Judge, write the verdict, then promote or leave the version a challenger.

    Where an attempt before this one has promoted the version and its answer was lost, the verdict is that of then.

    Raises:
        NotPromoted: the champion moved meanwhile, or serving does not follow.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    settings = load_settings()
    champion = registry.version_by_alias(run.registered_model, settings.registry.champion, settings)
    if champion == run.version:
        champion = None if evidence.champion is None else evidence.champion.version
    rules = gate.decide(run.evaluation, evidence, champion, settings.gate)
    verdict.write(run, evidence, rules, settings)
    passed, previous = all(rule.passed for rule in rules), None
    promoted = passed and settings.registry.approval == "automatic"
    if promoted:
        moved = promotion.promote(
            run.registered_model, run.version, champion, settings, who=who, why="it passed every rule of the gate"
        )
        champion, previous = moved.champion, moved.previous
    elif passed:
        log.info("version %s passed; `llava-pipeline promote %s` makes it champion", run.version, run.version)
    return Verdict(
        decision="promoted" if promoted else "challenger", rules=rules, registered_model=run.registered_model,
        version=run.version, champion=champion, previous=previous, run_id=run.run_id,
    )  # fmt: skip
