"""One MLflow run per pipeline run: what was asked, what came out, the files, and the registered version.

Every call names the run's id; there is no active run, so threads and retries cannot write into another one.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llava_pipeline import store
from llava_pipeline.contracts import Evaluation, RecordedRun, Snapshot, ValidatedData
from llava_pipeline.spec import EasyVqaSource, HubSource, RunSpec, ScenesSource
from llava_pipeline.tracking import content
from llava_pipeline.tracking.card import card, headline, save_card
from llava_pipeline.tracking.client import (
    connect,
    ensure_experiment,
    first_line,
    is_refusal,
    refusal,
    refusals,
)
from llava_pipeline.tracking.packaging import save_model
from llava_pipeline.tracking.registry import register
from llava_pipeline.tracking.settings import Settings
from llava_pipeline.tracking.stale import PROCESS, left_alone, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.entities import DatasetInput, Metric

_log = logging.getLogger(__name__)
TRAINING = "llava.training"


def record(
    spec: RunSpec,
    evaluation: Evaluation,
    settings: Settings,
    tags: dict[str, str],
    *,
    started: float | None = None,
) -> RecordedRun:
    """Record a finished pipeline run and register its projector as a new version.

    The version is made last, when all files are in; the run is the one that ``begin`` began for the same flow run, or a
    new one. An attempt that follows one that was cut off writes into the same run, and makes no second version.
    ``started`` is when the pipeline run began, in seconds since the epoch.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses; the run ends as FAILED with the reason.
        StoreError: the projector, the history, the answers or a snapshot are missing or damaged.
    """
    with refusals("record the run in MLflow"):
        client = connect(settings)
        if (known := _recorded(client, spec, evaluation, settings, tags)) is not None:
            return known
        experiment_id, run_id = begin(client, spec, settings, tags, started)
    try:
        began = time.time() if started is None else started
        describe(client, run_id, spec, evaluation, content.tags_of_evaluation(evaluation), began)
        _log_files(client, run_id, spec, evaluation)
        version = register(client, spec, evaluation, run_id, settings)
        client.set_tag(run_id, "llava.registered_version", version)
        _finish(client, run_id)
    except BaseException as error:
        _fail(client, run_id, first_line(error))
        if is_refusal(error):
            raise refusal(f"cannot record run {run_id} in MLflow", error) from error
        raise
    return RecordedRun(
        run_id=run_id,
        experiment_id=experiment_id,
        registered_model=spec.registered_model,
        version=version,
        evaluation=evaluation,
    )


def _recorded(
    client: MlflowClient, spec: RunSpec, evaluation: Evaluation, settings: Settings, tags: dict[str, str]
) -> RecordedRun | None:
    """What an attempt of the same flow run has recorded whole, whose last answer was lost; it is ended properly."""
    run_id = _begun(client, settings, tags)
    if run_id is None:
        return None
    run = client.get_run(run_id)
    version = run.data.tags.get("llava.registered_version")
    if version is None or run.data.tags.get("llava.evaluation_digest") != content.evaluation_digest(evaluation):
        return None
    _finish(client, run_id)
    return RecordedRun(
        run_id=run_id, experiment_id=run.info.experiment_id, registered_model=spec.registered_model, version=version,
        evaluation=evaluation,
    )  # fmt: skip


def record_failure(
    spec: RunSpec, reason: str, settings: Settings, tags: dict[str, str], *, started: float | None = None
) -> str | None:
    """Record a pipeline run that died, as a FAILED run with the reason: the one it had begun to record, or a new one.

    Never raises: what went wrong is the reason, not this. Returns the run's id, or None when it could not be recorded.
    """
    try:
        client = connect(settings)
        if run_id := _begun(client, settings, tags):
            _fail(client, run_id, reason)
            return run_id
        _, run_id = _start(client, spec, settings, tags, started)
    except Exception as error:
        _log.warning("the failed run is not in MLflow: %s", first_line(error))
        return None
    try:
        from mlflow.entities import Param

        client.log_batch(run_id, params=[Param(*item) for item in content.parameters(spec).items()])
        client.log_text(run_id, _as_yaml(spec), "spec.yaml")
    except Exception as error:
        _log.warning("the failed run %s lacks its parameters: %s", run_id, first_line(error))
    _fail(client, run_id, reason)
    return run_id


def begin(
    client: MlflowClient, spec: RunSpec, settings: Settings, tags: dict[str, str], started: float | None,
    *, gives_way: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Ids of the experiment and of the flow run's own run: the one begun that has no version yet, or a new one.

    ``gives_way`` is for whoever begins it beside the recording: a run that was begun meanwhile is taken instead.
    """
    run_id = _begun(client, settings, tags)
    if run_id is None or "llava.registered_version" in client.get_run(run_id).data.tags:
        return _start(client, spec, settings, tags, started, gives_way)
    client.update_run(run_id, status="RUNNING")
    client.set_tag(run_id, PROCESS, this_process())
    return client.get_run(run_id).info.experiment_id, run_id


def adopt(client: MlflowClient, settings: Settings, tags: dict[str, str], training: str) -> None:
    """Make the run of a flow run that was killed in a training this flow run's own: it goes on where that one stopped.

    Nothing happens where this flow run has a run already, or where nobody was killed in this training.
    """
    flow_run = tags.get("prefect.flow_run_id")
    if not flow_run or _begun(client, settings, tags):
        return
    asked = f"tags.`{TRAINING}` = '{training}'"
    for run in client.search_runs([ensure_experiment(client, settings)], filter_string=asked):
        if run.info.status != "FINISHED" and left_alone(run) and "llava.registered_version" not in run.data.tags:
            was = run.data.tags.get("prefect.flow_run_id", "")
            client.set_tag(run.info.run_id, "llava.goes_on_from", was)
            for key, value in tags.items():
                client.set_tag(run.info.run_id, key, value[: content.MAX_TAG])
            _log.info("goes on with run %s, whose flow run %s was cut off", run.info.run_id, was)
            return


def _start(
    client: MlflowClient, spec: RunSpec, settings: Settings, tags: dict[str, str], started: float | None,
    gives_way: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Ids of the experiment and of a new run with everything known beforehand.

    There may be a second one: MLflow's client repeats a request whose answer was lost, and another thread may have
    begun one too. One of them stays.
    """
    began = time.time() if started is None else started
    experiment_id = ensure_experiment(client, settings)
    name = f"{spec.profile}-{datetime.fromtimestamp(began, UTC):%Y%m%d-%H%M%S}"
    known = (
        content.tags_of_spec(spec)
        | {PROCESS: this_process()}
        | {key: value[: content.MAX_TAG] for key, value in tags.items()}
    )
    before = _runs_of(client, experiment_id, tags)
    run = client.create_run(experiment_id, start_time=int(began * 1000), tags=known, run_name=name)
    own = str(run.info.run_id)
    others = [run_id for run_id in _runs_of(client, experiment_id, tags) if run_id not in (own, *before)]
    stays = others[0] if others and gives_way else own
    for run_id in (own, *others):
        if run_id != stays:
            client.delete_run(run_id)
    return experiment_id, stays


def _begun(client: MlflowClient, settings: Settings, tags: dict[str, str]) -> str | None:
    """Id of the run that the same flow run has recorded already, if any."""
    return next(iter(_runs_of(client, ensure_experiment(client, settings), tags)), None)


def _runs_of(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> list[str]:
    """Ids of the runs of one flow run, the newest first; none where there is no flow run."""
    flow_run = tags.get("prefect.flow_run_id")
    if not flow_run:
        return []
    asked = f"tags.`prefect.flow_run_id` = '{flow_run}'"
    return [str(run.info.run_id) for run in client.search_runs([experiment_id], filter_string=asked)]


def describe(
    client: MlflowClient, run_id: str, spec: RunSpec, evaluation: Evaluation, tags: dict[str, str], began: float
) -> None:  # fmt: skip
    """Parameters, metrics, tags and data sets; the client sends them in parts that a server takes.

    ``began`` is when the run began, in seconds since the epoch.
    """
    from mlflow.entities import Param, RunTag

    tags = tags | {"mlflow.note.content": headline(evaluation)}
    client.log_batch(
        run_id,
        metrics=list(_metrics(client, run_id, evaluation, began)),
        params=[Param(*item) for item in content.parameters(spec, evaluation).items()],
        tags=[RunTag(*item) for item in tags.items()],
    )
    train, held_out = evaluation.projector.data, evaluation.held_out
    client.log_inputs(run_id, datasets=[_dataset_input(train, "training"), _dataset_input(held_out, "evaluation")])


def _metrics(client: MlflowClient, run_id: str, evaluation: Evaluation, began: float) -> Iterator[Metric]:
    """What is missing of the training's curve, and then the results, at a time that another attempt finds again.

    MLflow keeps a point that has the same value, step and time once; a step that was taken twice has two times.
    """
    from mlflow.entities import Metric

    curve = content.training_curve(content.read_rows(content.history(evaluation)), began)
    there = points_there(client, run_id, {point.key for point in curve})
    yield from (as_metric(point) for point in curve if (point.key, point.step) not in there)
    ended = max((point.time for point in curve), default=began)
    for key, value in content.results(evaluation).items():
        yield Metric(key, value, int(ended * 1000), evaluation.projector.num_steps)


def points_there(client: MlflowClient, run_id: str, keys: Iterable[str]) -> set[tuple[str, int]]:
    """Key and step of every point that a run has of some metrics."""
    there = client.get_run(run_id).data.metrics
    return {(key, point.step) for key in keys if key in there for point in client.get_metric_history(run_id, key)}


def as_metric(point: content.Point) -> Metric:
    """A point as MLflow takes it."""
    from mlflow.entities import Metric

    return Metric(point.key, point.value, int(point.time * 1000), point.step)


def _dataset_input(snapshot: Snapshot, context: str) -> DatasetInput:
    """A data set as MLflow's pages show it. MLflow keeps 36 characters of a digest; the whole one is a tag."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = _dataset_source(snapshot, context)
    dataset = Dataset(
        name=snapshot.origin[:500],
        digest=snapshot.rows.digest[:32],
        source_type=source._get_source_type(),
        source=source.to_json(),
        profile=json.dumps(content.dataset_profile(snapshot)),
    )
    return DatasetInput(dataset=dataset, tags=[InputTag(key="mlflow.data.context", value=context)])


def _dataset_source(snapshot: Snapshot, context: str) -> DatasetSource:
    """Where a data set came from, in MLflow's kinds: the hub, a file or folder of this machine, or code."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
    from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # made on import

    source = snapshot.source
    if isinstance(source, HubSource):
        own = source.train_split if context == "training" else source.test_split
        return HuggingFaceDatasetSource(path=source.repo_id, revision=source.revision, split=own or source.train_split)
    if isinstance(source, ScenesSource | EasyVqaSource):
        return CodeDatasetSource(tags={"origin": snapshot.origin, **source.model_dump(mode="json")})
    here: DatasetSource = LocalArtifactDatasetSource(Path(source.path).expanduser().absolute().as_uri())
    return here


def _log_files(client: MlflowClient, run_id: str, spec: RunSpec, evaluation: Evaluation) -> None:
    answers = store.open_artifact(evaluation.answers)
    client.log_text(run_id, _as_yaml(spec), "spec.yaml")
    client.log_artifact(run_id, str(content.history(evaluation)), "training")
    client.log_artifacts(run_id, str(answers), "evaluation")
    client.log_text(run_id, evaluation.model_dump_json(), "evaluation/evaluation.json")
    rows = content.read_rows(answers / "answers.jsonl")
    samples = content.samples(rows, answers / "samples")
    _log_tables(client, run_id, {"evaluation/answers.json": rows, "evaluation/samples.json": samples})
    if evaluation.asked:
        client.log_dict(run_id, {asked.question: asked.answer for asked in evaluation.asked}, "evaluation/asked.json")
    projector = store.open_artifact(evaluation.projector.projector)
    client.log_artifacts(run_id, str(projector), "projector")
    _log_model(client, run_id, spec, evaluation, projector, answers)
    _log_data(client, run_id, ValidatedData(train=evaluation.projector.data, held_out=evaluation.held_out))


def _log_tables(client: MlflowClient, run_id: str, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Rows as tables that MLflow's pages show, each written anew: ``log_table`` would put those of another attempt
    behind the ones that are there, with pictures under other names."""
    for name, rows in tables.items():
        client.log_dict(run_id, content.table(rows), name)
    listed = [{"path": name, "type": "table"} for name in tables]
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(listed))


def _log_model(
    client: MlflowClient, run_id: str, spec: RunSpec, evaluation: Evaluation, projector: Path, answers: Path
) -> None:
    """What MLflow loads and serves, with its card; the registered version points there."""
    with tempfile.TemporaryDirectory() as folder:
        as_file = Path(folder) / "spec.yaml"
        as_file.write_text(_as_yaml(spec), encoding="utf-8")
        save_model(Path(folder) / "model", projector, as_file, answers / "example.png")
        versions = {name.removeprefix("llava.version."): v for name, v in content.library_versions().items()}
        save_card(Path(folder) / "model", answers, card(spec, evaluation, run_id, versions))
        client.log_artifacts(run_id, str(Path(folder) / "model"), "model")


def _log_data(client: MlflowClient, run_id: str, data: ValidatedData) -> None:
    """The report, and every refused row. Copied under the names they get, so that neither is held in memory twice."""
    from llava_pipeline.data import report

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "report.html").write_text(report.page(data), encoding="utf-8")
        for snapshot, name in ((data.train, "rejected-train.jsonl"), (data.held_out, "rejected-held-out.jsonl")):
            shutil.copyfile(store.open_artifact(snapshot.rows) / "rejected.jsonl", Path(folder) / name)
        client.log_artifacts(run_id, folder, "data")


def _as_yaml(spec: RunSpec) -> str:
    return str(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def _finish(client: MlflowClient, run_id: str) -> None:
    """End a run as FINISHED, without the reason why an attempt before this one failed."""
    if "llava.failure" in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, "llava.failure")
    client.set_terminated(run_id, "FINISHED")


def _fail(client: MlflowClient, run_id: str, reason: str) -> None:
    """End a run as FAILED; the error that led here matters more than one from here."""
    try:
        client.set_tag(run_id, "llava.failure", reason[: content.MAX_TAG])
        client.set_terminated(run_id, "FAILED")
    except Exception as error:
        _log.warning("run %s could not be marked as failed: %s", run_id, first_line(error))
