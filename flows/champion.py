"""Is the champion still what was judged? A weekly regression on the version that is served."""

from __future__ import annotations

import logging

import prefect
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.form import ProfileName
from flows.hooks import sweep
from flows.links import tags_of_flow_run
from flows.stages import stage
from llava_pipeline.contracts import ChampionCheck, Differences
from llava_pipeline.errors import LlavaPipelineError, Regressed, SourceUnavailable, TrackingUnavailable
from llava_pipeline.spec import load_spec
from llava_pipeline.tracking.registry import Champion

log = logging.getLogger("llava_pipeline.flow")
MODULE = "llava_pipeline.stages.regression"
NOT_ITS_FAULT = (TrackingUnavailable, SourceUnavailable)


@stage(MODULE, minutes=10, retries=5, reuse=False)
def find_champion(registered_model: str) -> Champion | None:
    from llava_pipeline.tracking import registry
    from llava_pipeline.tracking.settings import load_settings

    return registry.champion(registered_model, load_settings())


@stage(MODULE, minutes=240, retries=5, reuse=False, device=lambda champion, registered_model: ("auto", 1))
def ask_champion_again(champion: Champion, registered_model: str) -> tuple[Differences, tuple[str, ...]]:
    from llava_pipeline.stages import regression

    return regression.ask_again(champion, registered_model)


@stage(MODULE, minutes=30, retries=5, reuse=False)
def ask_serving(champion: Champion, registered_model: str) -> tuple[str, str | None]:
    from llava_pipeline.stages import regression

    return regression.ask_serving(champion, registered_model)


@stage(MODULE, minutes=30, retries=5, reuse=False)
def record_check(
    profile: str, registered_model: str, champion: Champion, found: Differences | None, serving: str,
    problems: tuple[str, ...],
) -> ChampionCheck:  # fmt: skip
    from llava_pipeline.tracking import checks
    from llava_pipeline.tracking.settings import load_settings

    tags = tags_of_flow_run()
    return checks.record_check(profile, registered_model, champion, found, serving, problems, load_settings(), tags)


@prefect.flow(name="evaluate-champion", on_running=[sweep])
def evaluate_champion(profile: ProfileName = "pocket") -> ChampionCheck | None:
    """Ask the champion its own held-out questions again.

    Args:
        profile: A profile's name; its champion is asked.

    Raises:
        Regressed: it does not answer as it was recorded, or is not what is served.
        TrackingUnavailable, SourceUnavailable: nothing can be said of it now.
    """
    spec = load_spec(profile)
    model = spec.registered_model
    champion = find_champion(model)
    if champion is None:
        log.info("%s has no champion yet; nothing was asked", model)
        show(f"# {model} has no champion yet\n\nNothing was asked.\n", "no champion yet")
        return None
    found: Differences | None = None
    try:
        found, problems = ask_champion_again(champion, model)
    except NOT_ITS_FAULT:
        raise
    except LlavaPipelineError as error:
        problems = (f"it could not be asked: {error}",)
    serving, wrong = ask_serving(champion, model)
    problems += () if wrong is None else (wrong,)
    check = record_check(spec.profile, model, champion, found, serving, problems)
    show_check(check)
    if check.problems:
        raise Regressed(
            f"version {check.version} of {model} is not as it was recorded: {'; '.join(check.problems)}; "
            f"`llava-pipeline rollback --profile {spec.profile}` goes back to the version before"
        )
    return check


def show_check(check: ChampionCheck) -> None:
    """The page of a check on the flow run's page, and the way to MLflow's run."""
    from llava_pipeline.tracking.checks import AS_RECORDED, report
    from llava_pipeline.tracking.client import connect
    from llava_pipeline.tracking.settings import load_settings, run_address

    show(report(check), "regressed" if check.problems else AS_RECORDED)
    try:
        settings = load_settings()
        experiment = connect(settings).get_run(check.run_id).info.experiment_id
        page = run_address(settings, experiment, check.run_id)
        create_link_artifact(page, link_text="the check in MLflow", key="mlflow-run", description="The check.")
    except Exception as error:
        log.warning("the link to MLflow is not shown in Prefect: %s", error)


def show(page: str, description: str) -> None:
    """A check is worth more than its page."""
    try:
        create_markdown_artifact(page, key="champion-check", description=description)
    except Exception as error:
        log.warning("the check is not shown in Prefect: %s", error)
