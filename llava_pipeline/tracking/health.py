"""How MLflow is: whether it answers, of which version, and whether it holds what this pipeline needs."""

from __future__ import annotations

import os
import time

import requests
from pydantic import Field

from llava_pipeline.errors import TrackingError
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking.client import check_reachable, connect, find_experiment, refusals
from llava_pipeline.tracking.settings import Settings, database_path, is_server, tracking_uri, without_login
from llava_pipeline.tracking.stale import PROCESS, left_alone

OUT_OF_DATE = "out-of-date database schema"
LONG_SECONDS = 48 * 60 * 60.0  # after which a run of another machine is taken for one that nobody ends


class Health(Frozen):
    """What was found. None: it could not be asked, or there is nothing to ask."""

    address: str
    is_server: bool
    refused: str | None = None  # why it cannot be used
    is_outdated: bool = False  # the tables are of another version of MLflow
    has_records: bool = False
    experiment: str | None = None  # active or deleted
    client_version: str = ""
    server_version: str | None = None
    champions: dict[str, str] = Field(default_factory=dict)  # version by registered model
    stale: tuple[str, ...] = ()  # runs that nobody ends any more


def look(settings: Settings) -> Health:
    """Ask MLflow how it is. Nothing is written, and no database is created. Never raises for what MLflow refuses."""
    uri = tracking_uri(settings)
    address, database = without_login(uri), database_path(uri)
    if database is not None and not database.exists():
        return Health(address=address, is_server=False)
    try:
        check_reachable(settings)
        return _ask(settings, uri, address)
    except TrackingError as error:
        told = str(error).replace(uri, address)
        return Health(address=address, is_server=is_server(uri), refused=told, is_outdated=OUT_OF_DATE in told)


def _ask(settings: Settings, uri: str, address: str) -> Health:
    with refusals(f"ask MLflow at {address}"):
        client = connect(settings)
        experiment = find_experiment(client, settings)
        models = client.search_registered_models(max_results=1000)
        champions = {model.name: model.aliases.get(settings.registry.champion) for model in models}
        running = []
        if experiment is not None and experiment.lifecycle_stage == "active":
            asked = "attributes.status = 'RUNNING'"
            running = list(client.search_runs([experiment.experiment_id], filter_string=asked))
    import mlflow

    late = (time.time() - LONG_SECONDS) * 1000
    stale = [
        f"{run.info.run_name} ({run.data.tags.get(PROCESS, 'of an unknown process')})"
        for run in running
        if left_alone(run) or run.info.start_time < late
    ]
    return Health(
        address=address, is_server=is_server(uri), has_records=True, stale=tuple(stale),
        experiment=None if experiment is None else experiment.lifecycle_stage,
        client_version=mlflow.__version__, server_version=_version(uri, settings) if is_server(uri) else None,
        champions={name: str(version) for name, version in champions.items() if version is not None},
    )  # fmt: skip


def _version(uri: str, settings: Settings) -> str | None:
    login = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
    known = (login[0], login[1]) if login[0] and login[1] else None  # a server with logins tells strangers nothing
    try:
        response = requests.get(f"{uri.rstrip('/')}/version", timeout=settings.tracking.timeout_seconds, auth=known)
    except requests.RequestException:
        return None
    return response.text.strip()[:40] if response.ok else None
