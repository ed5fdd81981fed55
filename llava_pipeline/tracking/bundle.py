"""A registered version as serving keeps it on disk, so that it starts while MLflow is away.

<home>/serving/<registered model>/<version>-<digest>/    projector/, golden/, samples/, spec.yaml, and bundle.json last
<home>/serving/<registered model>/<alias>.json           the bundle that answered under this alias last
"""

from __future__ import annotations

import shutil
import tempfile
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

BUNDLE = "bundle.json"
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
        if store.digest_of(store.describe(self.projector)) != self.projector_digest:
            raise DamagedArtifact(
                f"the projector of version {self.version} is not the one that was registered (digest "
                f"{self.projector_digest[:12]}); train again or choose another version"
            )


def fetch(name: str, version: str, settings: Settings) -> Bundle:
    """A version's files, from MLflow or as they were fetched before; their digest is checked.

    Raises:
        NoSuchRun: there is no such version.
        DamagedArtifact: its files are not those that were registered.
        TrackingError: MLflow cannot be reached, or refuses, or the version does not say what it is.
    """
    with refusals(f"fetch version {version} of {name}"):
        client = connect(settings)
        found = registry.require_version(client, name, version)
        run_id = str(found.run_id)
        run = client.get_run(run_id)
    digest = found.tags.get("llava.projector_digest")
    if digest is None:
        raise TrackingError(f"version {version} of {name} was not registered by this pipeline; choose another one")
    bundle = Bundle(
        registered_model=name,
        version=version,
        run_id=run_id,
        run_address=run_address(settings, run.info.experiment_id, run_id),
        projector_digest=digest,
        scores={key: found.tags[f"llava.{key}"] for key in SCORES if f"llava.{key}" in found.tags},
    )
    if not (bundle.folder / BUNDLE).is_file():
        with refusals(f"fetch version {version} of {name}"):
            _download(client, bundle)
    bundle.check()
    return bundle


def kept(name: str, alias: str) -> Bundle | None:
    """What answered under an alias last, if its files are whole."""
    try:
        bundle = Bundle.model_validate_json((_root(name) / f"{alias}.json").read_text(encoding="utf-8"))
        bundle.check()
    except (OSError, ValidationError, DamagedArtifact):
        return None
    return bundle


def keep(alias: str, bundle: Bundle) -> None:
    """Note that a bundle answers under an alias; the files of versions that answer under none go."""
    root = _root(bundle.registered_model)
    store.write_text(root / f"{alias}.json", bundle.model_dump_json())
    needed = {bundle.folder}
    for path in root.glob("*.json"):
        if (other := kept(bundle.registered_model, path.stem)) is not None:
            needed.add(other.folder)
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder not in needed:
            shutil.rmtree(folder, ignore_errors=True)


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
        there = {item.path for item in client.list_artifacts(bundle.run_id, "evaluation")}
        for name in ("golden", "samples", "samples.json"):  # runs of former versions have none
            if f"evaluation/{name}" in there:
                fetched = Path(client.download_artifacts(bundle.run_id, f"evaluation/{name}", temporary))
                shutil.move(fetched, folder / name)
        (folder / BUNDLE).write_text(bundle.model_dump_json(), encoding="utf-8")
        shutil.rmtree(bundle.folder, ignore_errors=True)
        folder.replace(bundle.folder)
