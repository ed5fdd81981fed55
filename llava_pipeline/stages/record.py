"""Stage 6: the MLflow run people look for, and a registered version of the projector."""

from __future__ import annotations

from llava_pipeline.contracts import Evaluation, RecordedRun
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import run
from llava_pipeline.tracking.settings import load_settings


def record_run(spec: RunSpec, evaluation: Evaluation, tags: dict[str, str], began: float) -> RecordedRun:
    """Write parameters, curves, scores, answers and pictures; register the projector as a challenger.

    ``began`` is when the flow began, in seconds since the epoch.
    """
    return run.record(spec, evaluation, load_settings(), tags, started=began)
