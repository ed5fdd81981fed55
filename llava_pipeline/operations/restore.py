"""``llava-pipeline restore``: a backup put where the settings say that databases and artifacts are."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from llava_pipeline.addresses import read_addresses
from llava_pipeline.errors import BackupFailed, BackupRefused, LlavaPipelineError
from llava_pipeline.operations import artifacts as places
from llava_pipeline.operations import backup, databases, processes
from llava_pipeline.operations.artifacts import ROOT_COLUMNS, Artifacts
from llava_pipeline.operations.backup import Manifest
from llava_pipeline.operations.databases import Database
from llava_pipeline.spec import Frozen
from llava_pipeline.tracking.settings import Settings


class Restored(Frozen):
    """What was put where."""

    restored: tuple[str, ...]
    aside: tuple[str, ...]  # what was there before
    notes: tuple[str, ...]


def put_back(folder: Path, settings: Settings, *, replace: bool) -> Restored:
    """Restore a backup. What is there already is put aside under ``<name>.before-restore-<time>``.

    Everything is checked before anything is touched. Databases and artifacts come as they were; only where artifacts
    lie in another folder now, MLflow's notes of their places are changed to it.

    Raises:
        BackupRefused: the backup is not whole, a server is running on what would be replaced, or there is something
            and ``replace`` was not said.
        BackupFailed: a database or S3 refuses.
        DiskFull: no space left.
    """
    folder = folder.absolute()
    manifest = backup.read(folder)
    all_ = (databases.mlflow_database(settings), databases.prefect_database(settings), databases.people_database())
    known = {one.name: one for one in all_}
    targets = [known[one.name] for one in manifest.databases]
    place = places.artifacts_of(settings)
    _refuse_other_kind(manifest, targets, place)
    _refuse_in_use(targets)
    full = [one for one in targets if not databases.is_empty(one)]
    has_artifacts = not places.is_empty(place)
    there = [*(one.place for one in full), *([place.address] if has_artifacts else [])]
    if there and not replace:
        raise BackupRefused(f"there is something already: {', '.join(there)}; say --replace to put it aside first")
    suffix = f".before-restore-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    aside: list[str] = []
    try:
        for one in full:
            aside.append(databases.put_aside(one, suffix))
        if has_artifacts:
            aside.append(places.put_aside(place, suffix))
        places.copy_back(place, folder / backup.ARTIFACTS)
        for database in targets:
            databases.load(database, folder)
        _follow_artifacts(known["mlflow"], manifest.artifacts, place)
    except (LlavaPipelineError, OSError) as error:
        where = f"what was there before is at {', '.join(aside)}" if aside else "nothing was put aside"
        raise BackupFailed(
            f"the restore broke off: {error}; {where}; mend it, and restore again with --replace"
        ) from error
    return Restored(
        restored=(*(one.place for one in targets), place.address), aside=tuple(aside), notes=_notes(manifest)
    )


def _refuse_other_kind(manifest: Manifest, targets: list[Database], place: Artifacts) -> None:
    for copied, target in zip(manifest.databases, targets, strict=True):
        if copied.kind != target.kind:
            raise BackupRefused(
                f"the backup of {copied.name} is of {copied.kind}, the settings say {target.kind} ({target.place}); "
                f"name a {copied.kind} database in mlflow.yml or the environment"
            )
    if manifest.artifacts.kind != place.kind:
        raise BackupRefused(
            f"the backup's artifacts come from {manifest.artifacts.address}, the settings say {place.address}; "
            "name a place of the same kind in server.artifacts_destination"
        )


def _refuse_in_use(targets: list[Database]) -> None:
    up = read_addresses()
    if up is not None:
        for url in (f"{up.mlflow}/health", f"{up.prefect}/health"):
            if processes.answers(url):
                raise BackupRefused(f"a server answers at {url}; say `llava-pipeline down` first")
    for target in targets:
        if (users := databases.users_of(target)) is not None:
            raise BackupRefused(f"{target.place} is in use by {users}; end what uses it first")


def _follow_artifacts(mlflow: Database, before: Artifacts, now: Artifacts) -> None:
    """Runs that were recorded without a server name the folder of their artifacts by its whole path."""
    if before.kind == "folder" and before.address != now.address:
        old, new = Path(before.address), Path(now.address)
        databases.move_paths(mlflow, ROOT_COLUMNS, old.as_uri(), new.as_uri())
        databases.move_paths(mlflow, ROOT_COLUMNS, str(old), str(new))


def _notes(manifest: Manifest) -> tuple[str, ...]:
    """What has to be done because libraries are of other versions than when the backup was made."""
    commands = {"mlflow": "mlflow db upgrade", "prefect": "prefect server database upgrade"}
    return tuple(
        f"it was made with {name} {manifest.versions[name]}, this is {version(name)}: say `{command}` before use"
        for name, command in commands.items()
        if manifest.versions.get(name) != version(name)
    )
