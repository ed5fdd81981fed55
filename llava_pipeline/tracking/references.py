"""What the recorded runs and the registered versions still refer to in the store, read from their evaluations.

Read as plain JSON, so that what runs of former versions refer to is known too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_pipeline.errors import TrackingError
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking.client import connect, find_experiment, refusals
from llava_pipeline.tracking.settings import Settings, database_path, tracking_uri
from llava_pipeline.tracking.stale import left_alone

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

EVALUATION = "evaluation/evaluation.json"
WITHOUT_TRAINING = ("held_out.", "scored.", "projector.model.")  # where a version's own needs stand in its evaluation
PAGE = 200


class Reference(Frozen):
    """An artifact of the store, and where it stands in the document that names it."""

    kind: str
    digest: str
    place: str  # held_out.rows


class Referrer(Frozen):
    """A run or a version with what it needs of the store."""

    who: str  # for people
    role: Literal["alias", "newest", "version"]
    run_id: str
    needs: tuple[Reference, ...]


class Recorded(Frozen):
    """Who needs what, and since when somebody is at work."""

    referrers: tuple[Referrer, ...]
    running_since: float | None  # start of the oldest run that is under way, in seconds since the epoch


def recorded(settings: Settings, keep_runs: int) -> Recorded | None:
    """What versions, aliases and the newest runs need; None where nothing was ever recorded.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses, or a run's evaluation is not to be had.
    """
    database = database_path(tracking_uri(settings))
    if database is not None and not database.exists():
        return None
    with refusals("ask MLflow what is still needed"):
        client = connect(settings)
        if (experiment := find_experiment(client, settings)) is None:
            return None
        found = list(_versions(client))
        found += _newest(client, experiment.experiment_id, keep_runs)
        return Recorded(referrers=tuple(found), running_since=_running_since(client, experiment.experiment_id))


def references(document: Any, place: str = "") -> Iterator[Reference]:
    """Every artifact of the store that a JSON document names."""
    if isinstance(document, list):
        for number, item in enumerate(document):
            yield from references(item, f"{place}.{number}" if place else str(number))
    if not isinstance(document, dict):
        return
    kind, digest = document.get("kind"), document.get("digest")
    if isinstance(kind, str) and isinstance(digest, str) and "num_bytes" in document:
        yield Reference(kind=kind, digest=digest, place=place)
        return
    for key, value in document.items():
        yield from references(value, f"{place}.{key}" if place else str(key))


def _versions(client: MlflowClient) -> Iterator[Referrer]:
    """Every version that this pipeline registered; one that an alias points to needs all that its run made."""
    for model in _registered_models(client):
        aliases: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        for found in _versions_of(client, model.name):
            if "llava.projector_digest" not in found.tags:
                continue
            named = sorted(aliases.get(str(found.version), []))
            who = f"version {found.version} of {model.name}" + (f" ({', '.join(named)})" if named else "")
            needs = _needs_of_version(client, found)
            if not named:
                needs = tuple(need for need in needs if need.place.startswith(WITHOUT_TRAINING))
            yield Referrer(who=who, role="alias" if named else "version", run_id=str(found.run_id), needs=needs)


def _needs_of_version(client: MlflowClient, version: ModelVersion) -> tuple[Reference, ...]:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(str(version.run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return ()  # the run and its files were removed for good; nothing can be asked of this version any more
    return _needs(client, run)


def _newest(client: MlflowClient, experiment_id: str, count: int) -> list[Referrer]:
    asked = "attributes.status = 'FINISHED' and tags.`llava.registered_version` LIKE '%'"
    if count == 0:
        return []
    found = client.search_runs(
        [experiment_id], filter_string=asked, order_by=["attributes.start_time DESC"], max_results=count
    )
    return [
        Referrer(
            who=f"run {run.info.run_name}, one of the newest {count}", role="newest", run_id=run.info.run_id,
            needs=_needs(client, run),
        )
        for run in found
    ]  # fmt: skip


def _needs(client: MlflowClient, run: Run) -> tuple[Reference, ...]:
    """What the evaluation of a run names.

    Raises:
        TrackingError: it has none, although all its files were recorded: the artifact store is not all there.
    """
    run_id = run.info.run_id
    if EVALUATION not in {item.path for item in client.list_artifacts(run_id, "evaluation")}:
        raise TrackingError(
            f"run {run_id} has no {EVALUATION}, so nothing says what it needs; if MLflow's artifacts are where they "
            "should be, its files were removed by hand: delete its version and the run"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(run_id, EVALUATION, folder))
        try:
            return tuple(references(json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise TrackingError(
                f"{EVALUATION} of run {run_id} is damaged, so nothing says what it needs; delete its version and run"
            ) from error


def _running_since(client: MlflowClient, experiment_id: str) -> float | None:
    """When the oldest run began that is under way; one whose process on this machine is gone is not."""
    running = client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'")
    return min((run.info.start_time / 1000 for run in running if not left_alone(run)), default=None)


def _registered_models(client: MlflowClient) -> Iterator[RegisteredModel]:
    token: str | None = None
    while True:
        page = client.search_registered_models(max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _versions_of(client: MlflowClient, name: str) -> Iterator[ModelVersion]:
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return
