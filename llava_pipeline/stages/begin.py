"""What a training begins with: a fresh projector, or what an earlier run has left in the registry."""

from __future__ import annotations

import shutil

from llava_pipeline.contracts import ArtifactRef, AssembledModel, Beginning
from llava_pipeline.errors import StoreError
from llava_pipeline.model import projector
from llava_pipeline.spec import RunSpec
from llava_pipeline.store import open_artifact, writing
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.settings import Settings, load_settings


def find_beginning(spec: RunSpec, model: AssembledModel) -> Beginning | None:
    """The run that the spec begins with, as it is named now, with its files in the store; None begins afresh.

    Raises:
        NoSuchRun: there is no such run, version or alias.
        IncompatibleParts: it was trained between other parts, or trained one that this spec does not go on with.
        TrackingError: MLflow cannot be reached, or refuses.
    """
    if spec.begin_with is None:
        return None
    settings = load_settings()
    run_id = registry.resolve(spec.begin_with, spec.registered_model, settings)
    ref = stored(run_id, settings)
    # Here, before anything is read or trained.
    projector.refuse_dropped(projector.load(open_artifact(ref), model, spoken_otherwise=True), spec.training)
    version = registry.version_of_run(run_id, settings)
    return Beginning(registered_model=spec.registered_model, version=version, run_id=run_id, projector=ref)


def stored(run_id: str, settings: Settings) -> ArtifactRef:
    """What a run has left behind, as an artifact of the store: it may have been trained on another machine."""
    recorded = registry.recorded_evaluation(run_id, settings).projector.projector
    try:
        open_artifact(recorded)
        return recorded
    except StoreError:
        pass
    folder = registry.download_projector(run_id, None, settings)  # checked against the digest that was recorded
    with writing("projector") as (into, done):
        shutil.copytree(folder, into, dirs_exist_ok=True)
    return done[0]
