"""Registered projectors: one registered model per profile, one version per recorded run, and aliases on versions."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from llava_pipeline import store
from llava_pipeline.contracts import Evaluation
from llava_pipeline.errors import DamagedArtifact, NoSuchRun, TrackingError
from llava_pipeline.spec import Frozen, RunSpec, Sha256
from llava_pipeline.tracking import content
from llava_pipeline.tracking.card import headline
from llava_pipeline.tracking.client import connect, find_experiment, first_line, refusals
from llava_pipeline.tracking.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_MISSING = "RESOURCE_DOES_NOT_EXIST"


class Champion(Frozen):
    """The version that the alias points to."""

    version: str
    run_id: str
    frozen_digest: Sha256
    projector_digest: Sha256


def version_of_run(run_id: str, settings: Settings) -> str | None:
    """The version that a run has registered, if it has.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"look up the version of run {run_id}"):
        return next(iter(_versions_of(connect(settings), run_id)), None)


def register(client: MlflowClient, spec: RunSpec, evaluation: Evaluation, run_id: str, settings: Settings) -> str:
    """Make a run's projector a new version and the challenger; returns the version.

    The registered model is created when missing.

    Raises:
        TrackingError: MLflow refuses.
    """
    name = spec.registered_model
    with refusals(f"register the projector of run {run_id} as {name}"):
        _ensure_registered_model(client, spec)
        if not _versions_of(client, run_id):
            client.create_model_version(
                name,
                source=f"{client.get_run(run_id).info.artifact_uri}/model",
                run_id=run_id,
                tags=content.tags_of_version(evaluation),
                description=f"{headline(evaluation)}\n\nThe whole card: model/README.md of the run.",
            )
        version, *again = _versions_of(client, run_id)
        for number in again:  # MLflow's client repeats a request whose answer was lost
            client.delete_model_version(name, number)
        client.set_registered_model_alias(name, settings.registry.challenger, version)
    return version


def _versions_of(client: MlflowClient, run_id: str) -> list[str]:
    """The versions that a run has registered, the first one first."""
    return sorted((str(v.version) for v in client.search_model_versions(f"run_id = '{run_id}'")), key=int)


def registered_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model with its aliases, or None when nothing was registered under that name."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == _MISSING:
            return None
        raise


def aliases(name: str, settings: Settings) -> dict[str, str]:
    """Version of every alias of a registered model; empty when there is no such model."""
    with refusals(f"read the aliases of {name}"):
        return aliases_of(connect(settings), name)


def version_by_alias(name: str, alias: str, settings: Settings) -> str | None:
    """The version an alias points to, or None.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    return aliases(name, settings).get(alias)


def run_of_version(name: str, version: str, settings: Settings) -> str:
    """Id of the run that registered a version.

    Raises:
        NoSuchRun: there is no such version; the message has those that exist.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"read version {version} of {name}"):
        return str(require_version(connect(settings), name, version).run_id)


def champion(name: str, settings: Settings) -> Champion | None:
    """Who is champion, and what it was trained between; None when there is no champion.

    Raises:
        TrackingError: MLflow cannot be reached, or the version does not say what it is.
    """
    with refusals(f"read the champion of {name}"):
        client = connect(settings)
        version = aliases_of(client, name).get(settings.registry.champion)
        if version is None:
            return None
        found = client.get_model_version(name, version)
    try:
        return Champion(
            version=version,
            run_id=found.run_id,
            frozen_digest=found.tags["llava.frozen_digest"],
            projector_digest=found.tags["llava.projector_digest"],
        )
    except (KeyError, ValueError) as error:
        raise TrackingError(
            f"version {version} of {name} is champion but its tags do not say what it is ({first_line(error)}); "
            "point the alias to a version that this pipeline registered, or remove the alias"
        ) from error


def resolve(which: str, registered_model: str | None, settings: Settings) -> str:
    """Id of the run meant by a run's id, or by an alias or a version of ``registered_model``.

    Raises:
        NoSuchRun: there is no such run, version or alias; the message has those that exist.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"look up {which!r}"):
        return _resolve(connect(settings), which, registered_model, settings)


def download_projector(which: str, registered_model: str | None, settings: Settings) -> Path:
    """The folder with the projector of a run (by its id), or of an alias or a version of ``registered_model``.

    Kept in ``<home>/cache/projectors/<run id>``. Its digest is compared with the run's ``llava.projector_digest`` each
    time, of the kept folder too; a kept folder that differs is downloaded again.

    Raises:
        NoSuchRun: there is no such run, version or alias, or the run has no projector.
        DamagedArtifact: what was downloaded is not what was recorded.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    with refusals(f"download the projector of {which!r}"):
        client = connect(settings)
        run_id = _resolve(client, which, registered_model, settings)
        run = client.get_run(run_id)
        expected = run.data.tags.get("llava.projector_digest")
        if expected is None or not any(item.path == "projector" for item in client.list_artifacts(run_id)):
            raise NoSuchRun(f"run {run_id} ({run.info.status}) has no projector; choose a run that is FINISHED")
        final = store.home() / "cache" / "projectors" / run_id
        if not _is_whole(final, expected):
            _download(client, run_id, expected, final)
        return final


def download_files(run_id: str, paths: Sequence[str], folder: Path, settings: Settings) -> list[Path]:
    """Copy single artifacts of a run into a folder, under their own names.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such artifact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with refusals(f"download {', '.join(paths)} of run {run_id}"), tempfile.TemporaryDirectory(dir=folder) as temporary:
        client = connect(settings)
        downloaded = [Path(client.download_artifacts(run_id, path, temporary)) for path in paths]
        return [path.replace(folder / path.name) for path in downloaded]


def recorded_spec(which: str, registered_model: str | None, settings: Settings) -> RunSpec:
    """The spec of a run (by its id), or of an alias or a version of ``registered_model``.

    Raises:
        NoSuchRun: there is no such run, version or alias.
        TrackingError: MLflow cannot be reached, or the run has no spec that this version can read.
    """
    run_id = resolve(which, registered_model, settings)
    with tempfile.TemporaryDirectory() as temporary:
        (path,) = download_files(run_id, ("spec.yaml",), Path(temporary), settings)
        try:
            return RunSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValidationError, yaml.YAMLError) as error:
            raise TrackingError(
                f"the spec of run {run_id} cannot be read by this version ({first_line(error)}); train it again"
            ) from error


def recorded_evaluation(run_id: str, settings: Settings) -> Evaluation:
    """The evaluation of a run, as it was recorded.

    Raises:
        TrackingError: MLflow cannot be reached, or the run has no evaluation that this version can read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        (path,) = download_files(run_id, ("evaluation/evaluation.json",), Path(temporary), settings)
        try:
            return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise TrackingError(
                f"the evaluation of run {run_id} cannot be read by this version ({first_line(error)}); train it again"
            ) from error


def _download(client: MlflowClient, run_id: str, expected: str, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".downloading-", dir=final.parent) as folder:
        downloaded = Path(client.download_artifacts(run_id, "projector", folder))
        if not _is_whole(downloaded, expected):
            raise DamagedArtifact(
                f"the projector of run {run_id} is not the one that was recorded (digest {expected[:12]}); "
                "its files in MLflow's artifact store were changed; train again or choose another run"
            )
        shutil.rmtree(final, ignore_errors=True)
        downloaded.replace(final)


def _is_whole(folder: Path, expected: str) -> bool:
    return folder.is_dir() and store.digest_of(store.describe(folder)) == expected


def _resolve(client: MlflowClient, which: str, model: str | None, settings: Settings) -> str:
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", which):
        try:
            return str(client.get_run(which).info.run_id)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            raise NoSuchRun(f"no run {which}; the latest are: {_latest_runs(client, settings)}") from error
    if model is None:
        raise NoSuchRun(f"{which!r} is not the id of a run; give 32 hexadecimal digits, or a profile with it")
    version = which if which.isdecimal() else aliases_of(client, model).get(which)
    if version is None:
        raise NoSuchRun(f"{model} has no alias {which!r}; {what_exists(client, model)}")
    return str(require_version(client, model, version).run_id)


def require_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """A version.

    Raises:
        NoSuchRun: there is none; the message has those that exist.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code not in (_MISSING, "INVALID_PARAMETER_VALUE"):
            raise
        raise NoSuchRun(f"{name} has no version {version}; {what_exists(client, name)}") from error


def what_exists(client: MlflowClient, name: str) -> str:
    """The newest versions and all aliases of a registered model, in words."""
    if registered_model(client, name) is None:
        return f"nothing is registered as {name}; run the profile first"
    newest = client.search_model_versions(f"name = '{name}'", max_results=10, order_by=["version_number DESC"])
    versions = ", ".join(str(version.version) for version in newest) or "none"
    named = ", ".join(f"{alias}={version}" for alias, version in sorted(aliases_of(client, name).items())) or "none"
    return f"newest versions: {versions}; aliases: {named}"


def _latest_runs(client: MlflowClient, settings: Settings) -> str:
    experiment = find_experiment(client, settings)
    if experiment is None:
        return "none"
    latest = client.search_runs([experiment.experiment_id], max_results=5, order_by=["attributes.start_time DESC"])
    return ", ".join(run.info.run_id for run in latest) or "none"


def aliases_of(client: MlflowClient, name: str) -> dict[str, str]:
    """As ``aliases``, with a client at hand."""
    model = registered_model(client, name)
    return {} if model is None else {alias: str(version) for alias, version in model.aliases.items()}


def _ensure_registered_model(client: MlflowClient, spec: RunSpec) -> None:
    from mlflow.exceptions import MlflowException

    if registered_model(client, spec.registered_model) is not None:
        return
    about = f"Projectors trained with the profile {spec.profile}. {spec.title}".strip()
    try:
        client.create_registered_model(spec.registered_model, tags={"llava.profile": spec.profile}, description=about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
            raise
