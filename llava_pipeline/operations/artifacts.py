"""Where MLflow's artifacts lie, a folder or an S3 bucket: a copy of them, and the way back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from llava_pipeline.errors import BackupFailed, BackupRefused
from llava_pipeline.operations.databases import mlflow_database
from llava_pipeline.spec import Frozen
from llava_pipeline.store import home
from llava_pipeline.tracking.settings import ARTIFACTS_VARIABLE, Settings

S3_VARIABLE = "MLFLOW_S3_ENDPOINT_URL"
ROOT_COLUMNS = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"),
    ("model_versions", "storage_location"), ("logged_models", "artifact_location"),
)  # fmt: skip
"""Where MLflow notes the places of artifacts; without a server they are absolute."""


class Artifacts(Frozen):
    """A place of artifacts."""

    kind: Literal["folder", "s3"]
    address: str  # a folder's path, or s3://bucket/prefix

    @property
    def bucket(self) -> str:
        """Of S3."""
        return urlsplit(self.address).netloc

    @property
    def prefix(self) -> str:
        """Of S3, with a slash at its end, or empty."""
        path = urlsplit(self.address).path.strip("/")
        return f"{path}/" if path else ""


class S3Object(Frozen):
    """An object as the store tells it."""

    num_bytes: int
    etag: str


def artifacts_of(settings: Settings) -> Artifacts:
    """Where the tracking server keeps artifacts, or runs do without a server.

    Raises:
        BackupRefused: in a place that cannot be backed up here.
    """
    named = os.environ.get(ARTIFACTS_VARIABLE) or settings.server.artifacts_destination
    if named is None:
        database = mlflow_database(settings)
        beside = database.path.parent if database.kind == "sqlite" else home()
        return Artifacts(kind="folder", address=str(beside / "mlartifacts"))
    scheme = urlsplit(named).scheme
    if scheme == "s3":
        return Artifacts(kind="s3", address=named.rstrip("/"))
    if scheme in ("", "file"):
        path = unquote(urlsplit(named).path) if scheme else named
        return Artifacts(kind="folder", address=str(Path(path).absolute()))
    raise BackupRefused(f"artifacts at {scheme}:// cannot be backed up here; use that store's own tools")


def is_empty(artifacts: Artifacts) -> bool:
    """Whether nothing lies there."""
    if artifacts.kind == "folder":
        return not any(path.is_file() for path in Path(artifacts.address).rglob("*"))
    return next(_listed(_client(), artifacts), None) is None


def copy_out(artifacts: Artifacts, folder: Path) -> dict[str, S3Object]:
    """Copy everything into a folder; gives what S3 says of each object.

    Raises:
        BackupFailed: S3 refuses, or what came is not as long as it says.
    """
    folder.mkdir()
    if artifacts.kind == "folder":
        if Path(artifacts.address).is_dir():
            shutil.copytree(artifacts.address, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        return {}
    client, found = _client(), {}
    with _told(artifacts):
        for name, told in _listed(client, artifacts):
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise BackupFailed(f"the object {name!r} in {artifacts.address} has a name that leads out of a folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(artifacts.bucket, artifacts.prefix + name, str(target))
            if target.stat().st_size != told.num_bytes:
                raise BackupFailed(f"{name} in {artifacts.address} changed while it was copied; back up again")
            found[name] = told
    return found


def copy_back(artifacts: Artifacts, folder: Path) -> None:
    """Put a copy where nothing is.

    Raises:
        BackupFailed: S3 refuses.
    """
    if artifacts.kind == "folder":
        target = Path(artifacts.address)
        new = target.with_name(f".writing-{target.name}")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(folder, new, copy_function=shutil.copyfile)
        if target.is_dir():  # with empty folders at most
            shutil.rmtree(target)
        new.replace(target)
        return
    client = _client()
    with _told(artifacts):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                key = artifacts.prefix + path.relative_to(folder).as_posix()
                client.upload_file(str(path), artifacts.bucket, key)


def put_aside(artifacts: Artifacts, suffix: str) -> str:
    """Make room: a folder is renamed, objects are moved below another prefix. Gives the place."""
    if artifacts.kind == "folder":
        target = Path(artifacts.address)
        aside = target.with_name(target.name + suffix)
        target.replace(aside)
        return str(aside)
    client, aside_prefix = _client(), f"{artifacts.prefix.rstrip('/')}{suffix}/".lstrip("/")
    with _told(artifacts):
        for name, _ in list(_listed(client, artifacts)):
            source = {"Bucket": artifacts.bucket, "Key": artifacts.prefix + name}
            client.copy(source, artifacts.bucket, aside_prefix + name)
            client.delete_object(**source)
    return f"s3://{artifacts.bucket}/{aside_prefix}"


def _listed(client: Any, artifacts: Artifacts) -> Iterator[tuple[str, S3Object]]:
    """Objects by their names below the prefix, without what an earlier restore put aside."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=artifacts.bucket, Prefix=artifacts.prefix)
    for page in pages:
        for one in page.get("Contents", ()):
            name = one["Key"].removeprefix(artifacts.prefix)
            if name and not name.endswith("/") and not name.startswith(".before-restore-"):
                yield name, S3Object(num_bytes=one["Size"], etag=one["ETag"].strip('"'))


def _client() -> Any:
    try:
        import boto3  # type: ignore[import-untyped]
    except ImportError as error:
        raise BackupFailed(
            "artifacts lie in S3 and boto3 is not installed; pip install 'llava-pipeline[servers]'"
        ) from error
    return boto3.client("s3", endpoint_url=os.environ.get(S3_VARIABLE) or None)


@contextmanager
def _told(artifacts: Artifacts) -> Iterator[None]:
    """Turn what boto3 raises into one sentence."""
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise BackupFailed(f"S3 refuses at {artifacts.address}: {error}; check {S3_VARIABLE} and the keys") from error
