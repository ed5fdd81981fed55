from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.model.processor import Processor
from tests.tiny import assembled, backbones, home, lively, llava, processor, shared
from tests.training.job import Make, a_job, write_job

__all__ = ["assembled", "backbones", "home", "lively", "llava", "processor", "shared"]


@pytest.fixture
def make(assembled: AssembledModel, processor: Processor, tmp_path: Path) -> Make:
    """Job files of the tiny model, by what is different about them."""

    def made(updates: dict[str, Any] | None = None, **changes: Any) -> Path:
        return write_job(a_job(assembled, processor, **changes).model_copy(update=updates or {}), tmp_path)

    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the training under test is."""
    return tmp_path / "out"
