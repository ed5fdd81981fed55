"""Stage 6: the MLflow run people look for, and a registered version of the projector."""

from __future__ import annotations

from llava_pipeline.contracts import RecordedRun
from llava_pipeline.errors import TrackingUnavailable
from llava_pipeline.tracking import run
from llava_pipeline.tracking.settings import load_settings
from llava_pipeline.tracking.spool import Spooled


def record_run(night: Spooled) -> RecordedRun:
    """Write parameters, curves, scores, answers and pictures; register the projector as a challenger.

    Raises:
        TrackingUnavailable: MLflow is away; the night waits in the spool.
        TrackingError: MLflow refuses.
    """
    try:
        return run.record(night.spec, night.evaluation, load_settings(), night.tags, started=night.began)
    except TrackingUnavailable as error:
        raise TrackingUnavailable(
            f"{error}; what the run has brought waits: `llava-pipeline ship` records it, and the deployment ship does "
            "every hour"
        ) from error
