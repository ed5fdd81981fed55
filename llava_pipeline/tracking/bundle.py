"""A registered version as serving keeps it on disk, so that it starts while MLflow is away.

<home>/serving/<registered model>/<version>-<digest>/    projector/, golden/, samples/, spec.yaml, and bundle.json last
<home>/serving/<registered model>/<alias>.json           the bundle that answered under this alias last
<home>/serving/<registered model>/.lock                  held shared by who loads a version, alone by who removes files
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import Field, ValidationError

from llava_pipeline import store
from llava_pipeline.errors import DamagedArtifact, TrackingError
from llava_pipeline.spec import Frozen, RunSpec, Sha256
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.client import connect, first_line, refusals
from llava_pipeline.tracking.settings import Settings, run_address

if TYPE_CHECKING:
    from mlflow import MlflowClient

BUNDLE, LOCK = "bundle.json", ".lock"
TEMPORARY = (".fetching-*", ".gone-*", ".writing-*")  # folders that a killed process leaves
SCORES = ("exact_match", "exact_match_shuffled", "likelihood", "grounding_gain")


class Bundle(Frozen):
    """What a version is and what it scored."""

    registered_model: str = Field(pattern=r"^[\w.-]+$")
    version: str = Field(pattern=r"^\d+$")
    run_id: str
    run_address: str
    projector_digest: Sha256
    scores: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return _root(self.registered_model) / f"{self.version}-{self.projector_digest[:12]}"

    @property
    def projector(self) -> Path:
        """The folder with the weights and their manifest."""
        return self.folder / "projector"

    def spec(self) -> RunSpec:
        """The spec of its run.

        Raises:
            DamagedArtifact: it cannot be read by this version.
        """
        try:
            return RunSpec.model_validate(yaml.safe_load((self.folder / "spec.yaml").read_text(encoding="utf-8")))
        except (OSError, ValidationError, yaml.YAMLError) as error:
            raise DamagedArtifact(
                f"the spec of version {self.version} cannot be read ({first_line(error)}); train it again"
            ) from error

    def check(self) -> None:
        """Refuse weights that are not those that were registered.

        Raises:
            DamagedArtifact: they differ.
        """
        if not self.is_whole(self.projector):
            raise DamagedArtifact(
                f"the projector of version {self.version} is not the one that was registered (digest "
                f"{self.projector_digest[:12]}); train again or choose another version"
            )

    def is_whole(self, projector: Path) -> bool:
        """Whether a folder holds the weights that were registered."""
        return store.digest_of(store.describe(projector)) == self.projector_digest


def fetch(name: str, version: str, settings: Settings) -> Bundle:
    """A version's files, from MLflow or as they were fetched before; their digest is checked.

    Raises:
        NoSuchRun: there is no such version.
        DamagedArtifact: its files are not those that were registered.
        DiskFull: no space left for them.
        TrackingError: MLflow cannot be reached, or refuses, or the version does not say what it is.
    """
    attempt = f"fetch version {version} of {name}"
    with refusals(attempt):
        client = connect(settings)
        bundle = _described(client, name, version, settings)
    if (bundle.folder / BUNDLE).is_file() and bundle.is_whole(bundle.projector):
        return bundle
    try:
        with refusals(attempt):
            _download(client, bundle)
    except OSError as error:
        store.tell_disk_full(error, _root(name))
        raise TrackingError(f"cannot {attempt}: {first_line(error)}") from error
    return bundle


def _described(client: MlflowClient, name: str, version: str, settings: Settings) -> Bundle:
    found = registry.require_version(client, name, version)
    run_id = str(found.run_id)
    run = client.get_run(run_id)
    digest = found.tags.get("llava.projector_digest")
    if digest is None:
        raise TrackingError(f"version {version} of {name} was not registered by this pipeline; choose another one")
    try:
        return Bundle(
            registered_model=name,
            version=version,
            run_id=run_id,
            run_address=run_address(settings, run.info.experiment_id, run_id),
            projector_digest=digest,
            scores={key: found.tags[f"llava.{key}"] for key in SCORES if f"llava.{key}" in found.tags},
        )
    except ValidationError as error:
        raise TrackingError(
            f"the tags of version {version} of {name} do not say what it is ({first_line(error)}); choose another one"
        ) from error


def kept(name: str, alias: str) -> Bundle | None:
    """What answered under an alias last, if its files are whole."""
    try:
        bundle = Bundle.model_validate_json((_root(name) / f"{alias}.json").read_text(encoding="utf-8"))
        bundle.check()
    except (OSError, ValueError, DamagedArtifact):
        return None
    return bundle


def keep(alias: str, bundle: Bundle) -> None:
    """Note that a bundle answers under an alias."""
    store.write_text(_root(bundle.registered_model) / f"{alias}.json", bundle.model_dump_json())


def forget(name: str, alias: str) -> None:
    """Note that nothing answers under an alias any more."""
    (_root(name) / f"{alias}.json").unlink(missing_ok=True)


@contextmanager
def in_use(name: str) -> Iterator[None]:
    """While versions are looked for and loaded: no process removes files meanwhile. Many may do so at once."""
    root = _root(name)
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def sweep(name: str) -> bool:
    """Remove the files of versions that answer under no alias; not, and False, while a process loads one."""
    root = _root(name)
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        found = (kept(name, path.stem) for path in root.glob("*.json"))
        needed = {bundle.folder for bundle in found if bundle is not None}
        for folder in list(root.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder not in needed:
                _remove(folder)
        for pattern in TEMPORARY:
            store.sweep(root, pattern)
    return True


def _remove(folder: Path) -> None:
    """Under another name first: what is left when this is killed is not taken for a whole bundle."""
    with (
        contextlib.suppress(FileNotFoundError),
        tempfile.TemporaryDirectory(prefix=".gone-", dir=folder.parent) as gone,
    ):
        folder.replace(Path(gone) / folder.name)


def _root(name: str) -> Path:
    return store.home() / "serving" / name


def _download(client: MlflowClient, bundle: Bundle) -> None:
    root = _root(bundle.registered_model)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root) as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        for path in ("projector", "spec.yaml"):
            client.download_artifacts(bundle.run_id, path, str(folder))
        if not bundle.is_whole(folder / "projector"):
            raise DamagedArtifact(
                f"the projector of version {bundle.version} in MLflow's artifact store is not the one that was "
                f"registered (digest {bundle.projector_digest[:12]}); train again or choose another version"
            )
        there = {item.path for item in client.list_artifacts(bundle.run_id, "evaluation")}
        for name in ("golden", "samples", "samples.json"):  # runs of former versions have none
            if f"evaluation/{name}" in there:
                fetched = Path(client.download_artifacts(bundle.run_id, f"evaluation/{name}", temporary))
                shutil.move(fetched, folder / name)
        (folder / BUNDLE).write_text(bundle.model_dump_json(), encoding="utf-8")
        if (bundle.folder / BUNDLE).is_file() and bundle.is_whole(bundle.projector):
            return  # another server has fetched it meanwhile, and may be reading it
        _remove(bundle.folder)
        folder.replace(bundle.folder)
