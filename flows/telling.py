"""A verdict as an event of Prefect's, so that automations can tell people: when it has changed, not every night."""

from __future__ import annotations

import logging

from prefect.events import emit_event

from llava_pipeline.contracts import RecordedRun, Verdict, leading

log = logging.getLogger("llava_pipeline.flow")
PROMOTED = "llava-pipeline.verdict.promoted"
REFUSED = "llava-pipeline.verdict.refused"
WAITS = "llava-pipeline.verdict.waits"  # passed, and a person has to approve
UNCHANGED = "llava-pipeline.verdict.unchanged"  # refused by the same rule as the run before: nobody is told


def tell_verdict(run: RecordedRun, verdict: Verdict, before: str | None) -> str:
    """Emit the event of a verdict, and give its name. A run is worth more than its event.

    Args:
        run: that was judged.
        verdict: on it.
        before: the leading rule that refused the run before this one; None where it was promoted, or there was none.
    """
    from llava_pipeline.tracking.settings import load_settings, run_address

    refused_by = leading(verdict.rules)
    rule = None if refused_by is None else refused_by.name
    if verdict.decision == "promoted":
        event = PROMOTED
    else:
        event = WAITS if rule is None else UNCHANGED if rule == before else REFUSED
    payload = {
        "subject": f"{verdict.registered_model}: {event.rpartition('.')[2]}", "sentence": sentence(verdict),
        "version": verdict.version, "champion": verdict.champion, "rule": rule,
        "page": run_address(load_settings(), run.experiment_id, run.run_id),
    }  # fmt: skip
    try:
        emit_event(
            event, {"prefect.resource.id": f"llava-pipeline.model.{verdict.registered_model}"}, payload=payload
        )  # fmt: skip
    except Exception as error:
        log.warning("the verdict is not told to Prefect: %s", error)
    return event


def sentence(verdict: Verdict) -> str:
    """What happened, for a person who reads one line."""
    name, version = verdict.registered_model, verdict.version
    if verdict.decision == "promoted":
        before = f"; version {verdict.previous} was before" if verdict.previous else ", the first one"
        return f"Version {version} of {name} is champion{before}."
    broken = leading(verdict.rules)
    if broken is None:
        return f"Version {version} of {name} passed the gate and waits for a person: llava-pipeline promote {version}."
    stays = f"version {verdict.champion} stays champion" if verdict.champion else "there is no champion"
    return (
        f"Version {version} of {name} was refused by {broken.name.replace('_', ' ')}: found {broken.found}, "
        f"required {broken.required}; {stays}."
    )
