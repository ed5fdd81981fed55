"""The seed's recipe, whole, on tiny weights in a folder laid out as the hub lays them: what a card will run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flows.train import train
from llava_pipeline.spec import load_spec
from llava_pipeline.tracking import listing, registry
from llava_pipeline.tracking.client import connect
from llava_pipeline.tracking.settings import Settings
from tests.hub_folder import lay_out


@pytest.mark.slow
def test_the_seed_s_recipe_runs_from_a_folder_and_asks_its_last_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "mona-lisa.png"
    Image.new("RGB", (60, 90), (90, 80, 40)).save(picture)
    source = lay_out(tmp_path / "hub")
    small = ("training.max_steps=2", "evaluation.max_new_tokens=3", f"evaluation.picture={picture}")
    verdict = train(load_spec("budget", [f"backbones.source={source}", *small]))
    row = listing.run(Settings(), verdict.run_id)
    assert (row["status"], row["frozen_digests_equal"]) == ("FINISHED", True)
    assert row["registered_model"] == "llava-projector-budget"
    (asked,) = registry.download_files(verdict.run_id, ["evaluation/asked.json"], tmp_path, Settings())
    assert list(json.loads(asked.read_text(encoding="utf-8"))) == ["What is represented in the image?"]
    parameters = connect(Settings()).get_run(verdict.run_id).data.params
    assert parameters["backbones.vision_tower.origin"] == "folder:openai/clip-vit-base-patch32"
    assert parameters["spec.model.chat_template"] == "llava"
