"""Who follows a training while it runs: Prefect's page and MLflow's. Neither can hold it up, or end it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.runtime import flow_run

from flows.form import spec_of_parameters
from flows.links import tags_of_flow_run

log = logging.getLogger("llava_pipeline.flow")
STORY = "train-projector"
SECONDS_BETWEEN = 5.0
Follow = Callable[[dict[str, Any]], None]


@contextmanager
def followers() -> Iterator[Follow]:
    """A function to be called with every event of a training."""
    progress, live = Progress(), live_in_mlflow()

    def follow(event: dict[str, Any]) -> None:
        for one in (progress, live):
            if one is not None:
                one(event)

    try:
        yield follow
    finally:
        if live is not None:
            live.close()


def live_in_mlflow() -> Any:
    """Steps go to the MLflow run of this flow run; None where it is not the story's: a sweep has runs of its own."""
    from llava_pipeline.tracking.live import Live
    from llava_pipeline.tracking.settings import load_settings

    if flow_run.get_flow_name() != STORY:
        return None
    spec = spec_of_parameters(flow_run.get_parameters())
    began = flow_run.get_scheduled_start_time().timestamp()
    return Live(spec, load_settings(), tags_of_flow_run(), began)


class Progress:
    """The share of the budget that is used, as a bar on the flow run's page."""

    def __init__(self) -> None:
        self.artifact: UUID | None = None
        self.shown = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Show a step, not more often than every few seconds."""
        if event["event"] != "step" or (time.monotonic() - self.shown < SECONDS_BETWEEN and event["share"] < 1):
            return
        self.shown = time.monotonic()
        share = round(100 * event["share"], 1)
        told = f"Step {event['step']}, loss {event['loss']:.3f} (share of the training's budget)."
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(share, key="training-progress", description=told)  # type: ignore[assignment]
            else:
                update_progress_artifact(self.artifact, share, description=told)
        except Exception as error:
            log.warning("the progress is not shown in Prefect: %s", error)
