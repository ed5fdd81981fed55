"""Bare versions on a real registry: all that aliases need, without a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava_pipeline import store
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.settings import Settings
from tests.tracking.conftest import home, migrated_database, settings

__all__ = ["home", "migrated_database", "settings"]
NAME = "llava-projector-tiny"
Register = Callable[..., str]


@pytest.fixture
def register(settings: Settings, tmp_path: Path) -> Register:
    """Registers a version with a projector's files, as passed by the gate against ``champion``; returns it."""

    def make(champion: str = "none", gate: str | None = "passed", **rules: str) -> str:
        client = connect(settings)
        names = {model.name for model in client.search_registered_models()}
        if NAME not in names:
            client.create_registered_model(NAME)
        count = len(client.search_model_versions(f"name = '{NAME}'"))
        folder = tmp_path / f"projector-{count}"
        folder.mkdir()
        (folder / "projector.safetensors").write_bytes(f"weights {count}".encode())
        digest = store.digest_of(store.describe(folder))
        run = client.create_run(ensure_experiment(client, settings), tags={"llava.projector_digest": digest})
        client.log_artifacts(run.info.run_id, str(folder), "projector")
        tags = {"llava.projector_digest": digest, "llava.frozen_digest": "f" * 64}
        if gate is not None:
            tags |= {"llava.gate": gate, "llava.gate.champion": champion}
        tags |= {f"llava.gate.{rule}": told for rule, told in rules.items()}
        source = f"{run.info.artifact_uri}/projector"
        return str(client.create_model_version(NAME, source, run.info.run_id, tags=tags).version)

    return make
