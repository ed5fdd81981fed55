"""The one door to MLflow: where it is, whether it answers, and what its refusals become."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import requests

from llava_pipeline import store
from llava_pipeline.errors import TrackingError, TrackingUnavailable
from llava_pipeline.tracking.settings import (
    URI_VARIABLE,
    Settings,
    database_path,
    is_server,
    tracking_uri,
    without_login,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def check_reachable(settings: Settings) -> None:
    """Ask a tracking server whether it is there. Cheap; a database is not asked.

    Raises:
        TrackingError: the server does not answer within ``tracking.timeout_seconds``.
    """
    uri = tracking_uri(settings)
    if not is_server(uri):
        return
    try:
        response = requests.get(f"{uri.rstrip('/')}/health", timeout=settings.tracking.timeout_seconds)
    except requests.RequestException as error:
        raise TrackingUnavailable(_unreachable(settings, uri, _reason(error, settings))) from error
    if not response.ok:
        raise TrackingUnavailable(_unreachable(settings, uri, f"HTTP {response.status_code} from /health"))


def connect(settings: Settings) -> MlflowClient:
    """A client of the tracking store and of the registry, which are one address.

    Nothing global is set: everything goes through the client, with the run's id. A missing SQLite database is created.

    Raises:
        TrackingError: the server does not answer, or the database cannot be opened.
    """
    check_reachable(settings)
    uri = tracking_uri(settings)
    _prepare_mlflow()
    with refusals(f"open MLflow at {uri}"):
        from mlflow import MlflowClient

        database = database_path(uri)
        if database is None:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(
                f"cannot create {database.parent} for MLflow's database ({error.strerror}); "
                "point LLAVA_PIPELINE_HOME or tracking.uri at a folder that can be written"
            ) from error
        with locked("mlflow-database"):  # two first connections must not both create the tables
            return MlflowClient(tracking_uri=uri, registry_uri=uri)


def ensure_experiment(client: MlflowClient, settings: Settings) -> str:
    """Id of the experiment, created when missing.

    Beside an SQLite database artifacts go to ``mlartifacts`` in the same folder, wherever the process was started; a
    server chooses their place itself.

    Raises:
        TrackingError: the experiment was deleted.
    """
    name = settings.tracking.experiment
    experiment = find_experiment(client, settings)
    if experiment is None:
        database = database_path(tracking_uri(settings))
        location = None if database is None else (database.parent / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            experiment = find_experiment(client, settings)  # another process was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} was deleted; restore it with `mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}` or set another tracking.experiment in mlflow.yml"
        )
    return str(experiment.experiment_id)


def find_experiment(client: MlflowClient, settings: Settings) -> Experiment | None:
    """The experiment of the settings, or None."""
    return client.get_experiment_by_name(settings.tracking.experiment)


@contextmanager
def refusals(attempt: str) -> Iterator[None]:
    """Turn what MLflow and its transport raise into one sentence: ``cannot <attempt>: ...``.

    Raises:
        TrackingError: in place of an MlflowException, a requests or an SQLAlchemy error.
        TrackingUnavailable: likewise, where it may be better in a minute.
    """
    try:
        yield
    except Exception as error:
        if not is_refusal(error):
            raise
        raise refusal(f"cannot {attempt}", error) from error


def refusal(told: str, error: BaseException) -> TrackingError:
    """Our error for one of MLflow's, of the kind that says whether asking again may help."""
    kind = TrackingUnavailable if is_outage(error) else TrackingError
    return kind(f"{told}: {first_line(error)}")


def is_outage(error: BaseException) -> bool:
    """Whether MLflow is away for the moment: no connection, a timeout, an overloaded server or a locked database.

    MLflow's client raises its own exception for a connection that failed, with nothing to tell it by but its sentence.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, requests.ConnectionError | requests.Timeout | ConnectionError | TimeoutError):
            return True
        if type(cause).__name__ == "OperationalError":
            return True
        cause = cause.__cause__ or cause.__context__
    told = str(error)
    away = ("failed with exception", "too many 50", "error code 502", "error code 503", "error code 504")
    return any(sign in told for sign in away)


def is_refusal(error: BaseException) -> bool:
    """Whether an error is MLflow's, its transport's or its database's."""
    kinds = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    known = {"mlflow.MlflowException", "requests.RequestException", "sqlalchemy.SQLAlchemyError"}
    return bool(kinds & known)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold ``<home>/locks/<name>.lock``: one process of this machine at a time; freed when the process ends.

    Whether it is held: always, unless somebody else holds it and it is not to be waited for.
    """
    path: Path = store.home() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _prepare_mlflow() -> None:
    """Import MLflow with telemetry off and without its chatter; what the user has set stays."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import mlflow  # noqa: F401

    for name in ("alembic", "mlflow"):
        logger = logging.getLogger(name)
        if logger.level < logging.WARNING:
            logger.setLevel(logging.WARNING)


def _reason(error: requests.RequestException, settings: Settings) -> str:
    if isinstance(error, requests.Timeout):
        return f"nothing within {settings.tracking.timeout_seconds:g} s"
    if isinstance(error, requests.ConnectionError):
        return "connection refused or host unknown"
    return first_line(error)


def _unreachable(settings: Settings, uri: str, reason: str) -> str:
    return (
        f"MLflow at {without_login(uri)} does not answer ({reason}); start it with `llava-pipeline mlflow-server`, "
        f"or everything with `up`; or unset {URI_VARIABLE} and tracking.uri, and say `down`, to record without a server"
    )
