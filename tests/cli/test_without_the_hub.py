"""The seed's recipe runs against a folder laid out as the hub lays it, with weights of any size."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import AssembledModel, ValidatedData
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.store import open_artifact
from tests.cli.conftest import Command
from tests.cli.test_failures import first_stages
from tests.data.test_sources import shard, vsft_row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiny parts and five rows, under the names and in the formats of the profile's repositories."""
    root = tmp_path / "hub"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    clip = root / "openai" / "clip-vit-base-patch32"
    config.save_pretrained(clip)
    torch.save(CLIPModel(config).state_dict(), clip / "pytorch_model.bin")
    language = fetch(load_spec("tiny").backbones.language_model, None, 0)
    shutil.copytree(open_artifact(language.files), root / "TinyLlama" / "TinyLlama-1.1B-Chat-v1.0")
    data = root / "HuggingFaceH4" / "llava-instruct-mix-vsft" / "data"
    for number in range(3):
        shard(data / f"train-{number:05}-of-00003-9f3c1e7d2b5a4c68.parquet", [vsft_row(number)])
    shard(data / "test-00000-of-00001-0a1b2c3d4e5f6a7b.parquet", [vsft_row(3), vsft_row(4)])
    return root


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
    assert (data.train.origin, data.train.num_kept) == ("folder:llava-instruct-mix-vsft/train", 3)
    assert (data.held_out.origin, data.held_out.num_kept) == ("folder:llava-instruct-mix-vsft/test", 2)
    planned = command("plan", *arguments).document
    assert (planned["downloads"], planned["num_trainable"]) == ([], model.num_trainable)
