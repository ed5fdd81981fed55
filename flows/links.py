"""From the flow run to its MLflow run, and back."""

from __future__ import annotations

import logging

from prefect.artifacts import create_link_artifact
from prefect.runtime import flow_run

from llava_pipeline.contracts import RecordedRun

log = logging.getLogger("llava_pipeline.flow")


def tags_of_flow_run() -> dict[str, str]:
    """Tags by which the MLflow run names the flow run that makes it, with its page where Prefect has pages."""
    tags = {"prefect.flow_run_id": str(flow_run.get_id() or "")}
    if page := flow_run.get_flow_run_ui_url():
        tags["prefect.flow_run_url"] = page
    return tags


def show_run(run: RecordedRun) -> None:
    """The MLflow run as a link on the flow run's page. A run is worth more than its link."""
    from llava_pipeline.tracking.settings import load_settings, run_address

    try:
        page = run_address(load_settings(), run.experiment_id, run.run_id)
        told = f"Version {run.version} of {run.registered_model}: parameters, curves, answers, model card."
        create_link_artifact(page, link_text="the run in MLflow", key="mlflow-run", description=told)
    except Exception as error:
        log.warning("the link to MLflow is not shown in Prefect: %s", error)
