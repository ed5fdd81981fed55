"""A real home of the tiny profile: one training, and four versions of it that answer differently."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pipeline import store
from llava_pipeline.contracts import AssembledModel, Cursor, TrainedProjector, ValidatedData
from llava_pipeline.model import projector
from llava_pipeline.spec import load_spec
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.evaluate import evaluate_generations
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.train import train_projector
from llava_pipeline.stages.validate import validate_stream
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.run import record
from llava_pipeline.tracking.settings import FILE_VARIABLE, URI_VARIABLE, Settings

NAME = "llava-projector-tiny"
SPEC = load_spec(
    "tiny",
    [
        *("training.device=cpu", "training.max_steps=2", "training.held_out_samples=0", "data.max_samples=16"),
        "evaluation.max_samples=8",
    ],
)
OTHER_ROWS = load_spec("tiny", ["data.max_samples=8", "evaluation.max_samples=4", "data.source.seed=7"])
ALIASES = {"previous": "1", "champion": "2", "challenger": "4"}


def train_here() -> tuple[AssembledModel, ValidatedData, TrainedProjector]:
    """The stages up to the training, in the home of the environment."""
    model = assemble_and_freeze(fetch_backbones(SPEC.backbones), SPEC.model)
    data = validate_stream(model, SPEC.data, SPEC.evaluation.max_samples, lambda *_: Cursor())
    return model, data, train_projector(model, data, SPEC.training)


def record_here(trained: TrainedProjector, data: ValidatedData, settings: Settings, **tags: str) -> Any:
    """Evaluate and record, as every run does."""
    return record(SPEC, evaluate_generations(trained, data.held_out, SPEC.evaluation), settings, tags)


def make_home(folder: Path) -> None:
    """Four versions, three of them behind aliases, and rows that no run refers to."""
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(folder))
        for variable in (URI_VARIABLE, FILE_VARIABLE, "MLFLOW_REGISTRY_URI"):
            patch.delenv(variable, raising=False)
        (folder / "work").mkdir()
        patch.chdir(folder / "work")
        model, data, trained = train_here()
        for seed in range(4):
            record_here(with_noise(trained, seed), data, Settings())
            time.sleep(0.01)
        for alias, version in ALIASES.items():
            connect(Settings()).set_registered_model_alias(NAME, alias, version)
        validate_stream(model, OTHER_ROWS.data, OTHER_ROWS.evaluation.max_samples, lambda *_: Cursor())


def with_noise(trained: TrainedProjector, seed: int) -> TrainedProjector:
    """One that answers otherwise, saved as every projector is."""
    state = projector.load(store.open_artifact(trained.projector), trained.model)
    generator = torch.Generator().manual_seed(seed)
    noisy = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
    with store.writing("projector") as (folder, done):
        projector.save(folder, noisy, trained.model, {})
    return trained.model_copy(update={"projector": done[0]})


def age(root: Path, days: float) -> None:
    """Let everything below a folder be so many days older than now."""
    then = time.time() - days * 24 * 60 * 60
    for path in (root, *root.rglob("*")):
        os.utime(path, (then, then), follow_symlinks=False)


def files_below(root: Path, *besides: str) -> dict[str, int]:
    """Every file with its size, but for those whose names begin so."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(besides)
    }
