"""A person's word as flows: a deployment can be asked to promote what the gate passed, or to go back."""

from __future__ import annotations

import prefect
from prefect.runtime import flow_run

from flows.form import ProfileName
from llava_pipeline.spec import load_spec


@prefect.flow(name="promote")
def promote(version: str, reason: str, profile: ProfileName = "pocket", despite_gate: bool = False) -> str:
    """Make a version the champion; returns the champion."""
    from llava_pipeline.tracking.promotion import promote_by_person
    from llava_pipeline.tracking.settings import load_settings

    name = load_spec(profile).registered_model
    settings, who = load_settings(), f"flow run {flow_run.get_name()}"
    return promote_by_person(name, version, settings, who=who, why=reason, despite_gate=despite_gate).champion


@prefect.flow(name="rollback")
def rollback(reason: str, version: str | None = None, profile: ProfileName = "pocket") -> str:
    """Make a former champion the champion again; returns it."""
    from llava_pipeline.tracking import promotion
    from llava_pipeline.tracking.settings import load_settings

    name = load_spec(profile).registered_model
    who = f"flow run {flow_run.get_name()}"
    return promotion.rollback(name, version, load_settings(), who=who, why=reason).champion
