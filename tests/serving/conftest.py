"""The tiny model, projectors and pictures for it, and real MLflow on SQLite to register versions in."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llava_pipeline.model.assemble import Llava
from llava_pipeline.serving.engine import Loaded
from llava_pipeline.serving.pictures import Picture, picture_of
from llava_pipeline.tracking.settings import FILE_VARIABLE, URI_VARIABLE, Settings
from tests.serving.served import served_home, shared_server, trained_home
from tests.tiny import assembled, backbones, home, lively, llava, processor, shared
from tests.tracking.conftest import migrated_database

__all__ = [
    "assembled", "backbones", "home", "lively", "llava", "migrated_database", "processor", "served_home", "shared",
    "shared_server", "trained_home",
]  # fmt: skip


def picture(llava: Llava, number: int) -> Picture:
    side = llava.processor.images.side
    return picture_of(np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8))


def own(llava: Llava) -> Loaded:
    """The model's own projector."""
    return Loaded("own", llava.model.model.multi_modal_projector)


def other(llava: Llava, seed: int = 5) -> Loaded:
    """Another projector between the same parts."""
    projector = copy.deepcopy(llava.model.model.multi_modal_projector)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return Loaded(f"other-{seed}", projector)


@pytest.fixture
def settings(shared: Llava, tmp_path: Path, migrated_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home of this test alone, with MLflow's tables in place."""
    for variable in (URI_VARIABLE, FILE_VARIABLE, "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(home))
    shutil.copy(migrated_database, home / "mlflow.db")
    return Settings()
