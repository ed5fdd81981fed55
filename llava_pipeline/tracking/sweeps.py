"""A sweep in MLflow: one run, with a child for every combination. Nothing is registered.

Every call finds by tags what an attempt before it has left, so each may be made again. Children carry no place in the
source (``llava.data.cursor``): a sweep reads no increment away from the nights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llava_pipeline.contracts import Combination, Evaluation, SweepRun
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import content
from llava_pipeline.tracking.client import connect, ensure_experiment, first_line, refusals
from llava_pipeline.tracking.reading import CURSOR, READING
from llava_pipeline.tracking.run import describe
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.tracking.stale import PROCESS, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_log = logging.getLogger(__name__)
SWEEP, TRIAL = "llava.sweep", "llava.trial"
PARENT = "mlflow.parentRunId"
SWEPT = ("learning_rate", "warmup_share", "seed")
UNFINISHED = "attributes.status != 'FINISHED'"


def begin(spec: RunSpec, tried: Sequence[Combination], settings: Settings, tags: dict[str, str]) -> SweepRun:
    """The run of a sweep: the newest one of the same combinations that was not finished, or a new one.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    digest = sweep_digest(spec, tried)
    known = {content.KIND: "sweep", SWEEP: digest, "llava.profile": spec.profile, PROCESS: this_process()}
    known |= content.library_versions() | {key: value[: content.MAX_TAG] for key, value in tags.items()}
    with refusals("begin the run of a sweep in MLflow"):
        client = connect(settings)
        experiment_id = ensure_experiment(client, settings)
        asked = f"tags.`{SWEEP}` = '{digest}' and {UNFINISHED}"
        for run in client.search_runs([experiment_id], asked, order_by=["attributes.start_time DESC"]):
            if _is_free(run):
                _go_on(client, run, known)
                return SweepRun(experiment_id=experiment_id, run_id=run.info.run_id)
        name = f"sweep-{spec.profile}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        run = client.create_run(experiment_id, tags=known, run_name=name)
        _log_parameters(client, run.info.run_id, spec, tried)
    return SweepRun(experiment_id=experiment_id, run_id=run.info.run_id)


def sweep_digest(spec: RunSpec, tried: Sequence[Combination]) -> str:
    """Digest of everything that a sweep is asked."""
    asked = [_without_swept(spec), *(one.model_dump() for one in tried)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _without_swept(spec: RunSpec) -> dict[str, Any]:
    told = spec.model_dump(mode="json")
    told["training"] = {key: value for key, value in told["training"].items() if key not in SWEPT}
    return told


def _is_free(run: Run) -> bool:
    """Whether nobody else works on it: it has ended, or this process began it and the answer was lost."""
    return run.info.status != "RUNNING" or run.data.tags.get(PROCESS) == this_process()


def _go_on(client: MlflowClient, run: Run, tags: dict[str, str]) -> None:
    for key, value in tags.items():
        client.set_tag(run.info.run_id, key, value)
    if "llava.failure" in run.data.tags:
        client.delete_tag(run.info.run_id, "llava.failure")
    client.update_run(run.info.run_id, status="RUNNING")


def _log_parameters(client: MlflowClient, run_id: str, spec: RunSpec, tried: Sequence[Combination]) -> None:
    from mlflow.entities import Param

    axes = {name: list(dict.fromkeys(getattr(one, name) for one in tried)) for name in SWEPT}
    told = {f"sweep.{name}": json.dumps(values) for name, values in axes.items()}
    own = {f"spec.training.{name}" for name in SWEPT}
    told |= {key: value for key, value in content.parameters(spec).items() if key not in own}
    client.log_batch(run_id, params=[Param(*item) for item in told.items()])


def begin_trial(sweep: SweepRun, spec: RunSpec, name: str, settings: Settings) -> str:
    """Id of a combination's run: the one that is finished, or a new one in place of those that are not.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"begin the run of {name} in MLflow"):
        client = connect(settings)
        there = client.search_runs(
            [sweep.experiment_id],
            f"tags.`{PARENT}` = '{sweep.run_id}' and tags.`{TRIAL}` = '{content.spec_digest(spec)}'",
        )
        finished = [str(run.info.run_id) for run in there if run.info.status == "FINISHED"]
        for run in there:
            if run.info.run_id not in finished[:1]:
                client.delete_run(run.info.run_id)
        return finished[0] if finished else _start(client, sweep, spec, name)


def _start(client: MlflowClient, sweep: SweepRun, spec: RunSpec, name: str) -> str:
    tags = content.tags_of_spec(spec) | {
        content.KIND: "trial", PARENT: sweep.run_id, TRIAL: content.spec_digest(spec), PROCESS: this_process(),
    }  # fmt: skip
    tags.pop("llava.registered_model")  # it registers nothing
    return str(client.create_run(sweep.experiment_id, tags=tags, run_name=name).info.run_id)


def record_trial(
    sweep: SweepRun, run_id: str, spec: RunSpec, name: str, evaluation: Evaluation, settings: Settings
) -> str:  # fmt: skip
    """Record what a combination came to, and end its run; gives the run's id.

    A run that is finished stays as it is, unless the result is another one now: then a new one takes its place.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
        StoreError: the history is missing or damaged.
    """
    tags = content.tags_of_evaluation(evaluation)
    kept = {key: value for key, value in tags.items() if key not in (CURSOR, READING)}
    with refusals(f"record {name} in MLflow"):
        client = connect(settings)
        run = client.get_run(run_id)
        if run.info.status == "FINISHED":
            if run.data.tags.get("llava.evaluation_digest") == kept["llava.evaluation_digest"]:
                return run_id
            client.delete_run(run_id)
            run_id = _start(client, sweep, spec, name)
        describe(client, run_id, spec, evaluation, kept, time.time())
        client.log_text(run_id, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False), "spec.yaml")
        client.log_artifact(run_id, str(content.history(evaluation)), "training")
        client.log_text(run_id, evaluation.model_dump_json(), "evaluation/evaluation.json")
        client.set_terminated(run_id, "FINISHED")
    return run_id


def fail(run_id: str, reason: str, settings: Settings) -> None:
    """End a sweep's or a trial's run as FAILED with the reason. Never raises: the reason is what matters."""
    try:
        client = connect(settings)
        client.set_tag(run_id, "llava.failure", reason[: content.MAX_TAG])
        client.set_terminated(run_id, "FAILED")
    except Exception as error:
        _log.warning("run %s could not be marked as failed: %s", run_id, first_line(error))


def finish(
    sweep: SweepRun, rows: list[dict[str, Any]], page: str, picture: Path, metrics: dict[str, float],
    settings: Settings,
) -> None:  # fmt: skip
    """Write what a sweep found with its run, and end it.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"record the sweep {sweep.run_id} in MLflow"):
        client = connect(settings)
        client.log_dict(sweep.run_id, content.table(rows), "sweep.json")
        client.log_text(sweep.run_id, page, "sweep.md")
        client.log_artifact(sweep.run_id, str(picture))
        for key, value in metrics.items():
            client.log_metric(sweep.run_id, key, value)
        client.set_tag(sweep.run_id, "mlflow.loggedArtifacts", json.dumps([{"path": "sweep.json", "type": "table"}]))
        client.set_tag(sweep.run_id, "mlflow.note.content", page[: content.MAX_TAG])
        client.set_terminated(sweep.run_id, "FINISHED")
