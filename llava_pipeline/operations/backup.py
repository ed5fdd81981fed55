"""``llava-pipeline backup``: databases, artifacts and settings in one folder, which is there only when it is whole.

<folder>/mlflow.db or .dump, prefect.db or .dump, artifacts/, mlflow.yml, and MANIFEST.json last
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from llava_pipeline import store
from llava_pipeline.errors import BackupRefused
from llava_pipeline.operations import artifacts as places
from llava_pipeline.operations import databases, services
from llava_pipeline.operations.artifacts import Artifacts, S3Object
from llava_pipeline.spec import Frozen, Sha256
from llava_pipeline.tracking.settings import FILE_VARIABLE, Settings

ARTIFACTS, SETTINGS = "artifacts", "mlflow.yml"
TEMPORARY = ".backup-writing-"
LIBRARIES = ("llava-pipeline", "mlflow", "prefect")


class File(Frozen):
    """A file of a backup."""

    num_bytes: int
    sha256: Sha256


class Copied(Frozen):
    """A database of a backup."""

    name: Literal["mlflow", "prefect"]
    kind: Literal["sqlite", "postgresql"]
    place: str  # where it was, without a password
    file: str


class Manifest(Frozen):
    """What a backup is, and how each of its files was when it was written."""

    format: Literal[1] = 1
    created: str  # UTC
    versions: dict[str, str]
    databases: tuple[Copied, ...]
    artifacts: Artifacts
    objects: dict[str, S3Object]  # of artifacts in S3, as it told
    settings: str | None  # where the settings file was
    notes: tuple[str, ...]
    files: dict[str, File]
    digest: str = ""  # of all of the above

    def sealed(self) -> Manifest:
        """With its digest."""
        return self.model_copy(update={"digest": self._digest()})

    def is_sealed(self) -> bool:
        """Whether it is as it was written."""
        return self.digest == self._digest()

    def _digest(self) -> str:
        told = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


def make(folder: Path, settings: Settings) -> Manifest:
    """Back up into a new folder.

    Databases are copied before artifacts, so that every file that a run of the copy names is there.

    Raises:
        BackupRefused: the folder exists, or there is nothing to back up.
        BackupFailed: a database or an artifact cannot be copied.
        DiskFull: no space left.
    """
    folder = folder.absolute()
    if folder.exists():
        raise BackupRefused(f"{folder} exists already; name a folder that does not")
    known = (databases.mlflow_database(settings), databases.prefect_database(settings))
    there = [one for one in known if not databases.is_empty(one)]
    if not any(one.name == "mlflow" for one in there):
        raise BackupRefused(f"there is no MLflow database at {known[0].place}, so there is nothing to back up")
    people = databases.people_database()
    there += [] if databases.is_empty(people) else [people]
    notes = tuple(f"{one.name} has no database yet at {one.place}" for one in known if one not in there)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        store.sweep(folder.parent, f"{TEMPORARY}*")
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent) as temporary:
            new = Path(temporary) / folder.name
            new.mkdir(mode=0o700)  # databases hold what keys and passwords were made of
            manifest = _fill(new, settings, there, notes)
            new.replace(folder)
    except OSError as error:
        store.tell_disk_full(error, folder.parent, "the backup's folder")
        raise
    return manifest


def _fill(new: Path, settings: Settings, there: list[databases.Database], notes: tuple[str, ...]) -> Manifest:
    for database in there:
        databases.dump(database, new)
    place = places.artifacts_of(settings)
    objects = places.copy_out(place, new / ARTIFACTS)
    if (used := services.places().get(FILE_VARIABLE)) is not None:
        shutil.copyfile(used, new / SETTINGS)
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        databases=tuple(Copied(name=one.name, kind=one.kind, place=one.place, file=one.file) for one in there),
        artifacts=place, objects=objects, settings=used, notes=notes, files=files_of(new),
    ).sealed()  # fmt: skip
    _flush(new)
    with (new / store.MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return manifest


def files_of(folder: Path) -> dict[str, File]:
    """Every file of a backup but its manifest, as it is now."""
    return {
        name: File(num_bytes=int(told["bytes"]), sha256=str(told["sha256"]))
        for name, told in store.describe(folder).items()
    }


def read(folder: Path) -> Manifest:
    """The manifest of a backup whose every file is as it was written.

    Raises:
        BackupRefused: it is none, or a file is missing, changed or was added.
    """
    path = folder / store.MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise BackupRefused(f"{folder} is no whole backup: {path.name} is missing or cannot be read") from error
    if not manifest.is_sealed():
        raise BackupRefused(f"{folder} cannot be restored: its {path.name} was changed; take another backup")
    found = files_of(folder)
    for name in sorted(manifest.files.keys() | found.keys()):
        if manifest.files.get(name) != found.get(name):
            what = "is missing" if name not in found else "was added" if name not in manifest.files else "was changed"
            raise BackupRefused(f"{folder} cannot be restored: {name} {what}; take another backup")
    return manifest


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
