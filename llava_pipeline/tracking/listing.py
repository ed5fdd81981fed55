"""The recorded runs as plain data, for a table on a terminal or for JSON."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from llava_pipeline.errors import SpecError
from llava_pipeline.tracking import content
from llava_pipeline.tracking.client import connect, find_experiment, refusals
from llava_pipeline.tracking.registry import registered_model
from llava_pipeline.tracking.settings import Settings, database_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PARAMETERS = {
    "num_trainable": "params.num_trainable",
    "num_learned": "params.num_learned",
    "num_total": "params.num_total",
    "num_frozen": "params.num_frozen",
    "num_image_tokens": "num_image_tokens",
}


def runs(settings: Settings, profile: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest recorded runs first, of one profile or of all; JSON-serialisable, with null for NaN.

    Raises:
        SpecError: ``limit`` is less than 1.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    if limit < 1:
        raise SpecError(f"cannot list {limit} runs; ask for at least 1")
    database = database_path(tracking_uri(settings))
    if database is not None and not database.exists():
        return []
    with refusals("list the recorded runs"):
        client = connect(settings)
        found = _search(client, settings, profile, limit)
        models = {name: _Model(client, name) for name in {_model_of(run) for run in found} - {""}}
        return [_row(run, models.get(_model_of(run)), settings) for run in found]


def run(settings: Settings, run_id: str) -> dict[str, Any]:
    """One recorded run, as ``runs`` gives it.

    Raises:
        TrackingError: there is no such run, MLflow cannot be reached, or refuses.
    """
    with refusals(f"read run {run_id}"):
        client = connect(settings)
        found = client.get_run(run_id)
        name = _model_of(found)
        return _row(found, _Model(client, name) if name else None, settings)


class _Model:
    """Versions by run and aliases by version of one registered model, read once for a whole listing."""

    def __init__(self, client: MlflowClient, name: str) -> None:
        model = registered_model(client, name)
        aliases: dict[str, Any] = {} if model is None else model.aliases
        self.aliases = {alias: str(version) for alias, version in aliases.items()}
        self.versions: dict[str, str] = {}
        token: str | None = None
        while model is not None:
            page = client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
            self.versions |= {str(version.run_id): str(version.version) for version in page}
            token = page.token
            if not token:
                break


def _search(client: MlflowClient, settings: Settings, profile: str | None, limit: int) -> list[Run]:
    experiment = find_experiment(client, settings)
    if experiment is None:
        return []
    return list(
        client.search_runs(
            [experiment.experiment_id],
            filter_string="" if profile is None else f"tags.`llava.profile` = '{profile}'",
            max_results=limit,
            order_by=["attributes.start_time DESC"],
        )
    )


def _model_of(run: Run) -> str:
    return str(run.data.tags.get("llava.registered_model", ""))


def _row(run: Run, model: _Model | None, settings: Settings) -> dict[str, Any]:
    tags, parameters = run.data.tags, run.data.params
    version = model.versions.get(run.info.run_id) if model else None
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "profile": tags.get("llava.profile"),
        "kind": tags.get(content.KIND, "run"),
        "stage": tags.get("llava.stage", "align"),
        "learned": parameters.get("learned"),
        "began_with": {"run_id": tags["llava.begin.run_id"], "version": tags.get("llava.begin.version")}
        if "llava.begin.run_id" in tags
        else None,
        "status": run.info.status,
        "failure": tags.get("llava.failure"),
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        "duration_seconds": None if run.info.end_time is None else (run.info.end_time - run.info.start_time) / 1000,
        "metrics": _metrics(run),
        "params": {key: int(parameters[name]) for key, name in _PARAMETERS.items() if name in parameters},
        "device": parameters.get("device"),
        "precision": parameters.get("precision"),
        "frozen_digests_equal": {"true": True, "false": False}.get(tags.get("llava.frozen_digests_equal", "")),
        "registered_model": _model_of(run) or None,
        "version": version,
        "aliases": sorted(alias for alias, target in model.aliases.items() if target == version) if model else [],
        "champion_version": model.aliases.get(settings.registry.champion) if model else None,
    }


def _metrics(run: Run) -> dict[str, float | None]:
    kept = ("train/final_loss", "train/seconds", "train/peak_memory_bytes")
    return {
        key: value if math.isfinite(value) else None
        for key, value in sorted(run.data.metrics.items())
        if key.startswith("eval/") or key in kept
    }
