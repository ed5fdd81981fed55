"""The seed's recipe runs against a folder laid out as the hub lays it, with weights of any size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llava_pipeline.contracts import AssembledModel, ValidatedData
from llava_pipeline.spec import RunSpec
from tests.cli.conftest import Command
from tests.cli.test_failures import first_stages
from tests.hub_folder import lay_out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay_out(tmp_path / "hub")


def test_parts_and_data_come_from_the_folder_alone(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[AssembledModel, ValidatedData]] = []

    def run(spec: RunSpec, _: bool) -> dict[str, str]:
        made.append(first_stages(spec))
        return {}

    monkeypatch.setattr(sys.modules["llava_pipeline.cli.app"], "run_flow", run)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))
    arguments = ("--profile", "budget", "--set", f"backbones.source={folder}", "--json")
    assert command("run", *arguments).exit_code == 0
    ((model, data),) = made
    parts = model.backbones
    assert parts.vision_tower.origin == "folder:openai/clip-vit-base-patch32"
    assert parts.language_model.origin == "folder:TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert (data.train.origin, data.train.num_kept) == ("parquet:llava-instruct-mix-vsft/train", 3)
    assert (data.held_out.origin, data.held_out.num_kept) == ("parquet:llava-instruct-mix-vsft/test", 2)
    planned = command("plan", *arguments).document
    assert (planned["downloads"], planned["num_trainable"]) == ([], model.num_trainable)
