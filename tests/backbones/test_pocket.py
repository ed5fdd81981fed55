"""The pocket parts are what their cards say: digests, sizes and scores, each part alone."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from llava_pipeline.data import scenes
from pretraining import language_model, vision_tower

POCKET = Path(str(resources.files("llava_pipeline.backbones"))) / "pocket"
PARTS = ("vision_tower", "language_model")


def card(part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((POCKET / part / "pretraining.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module", autouse=True)
def one_thread_count() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("part", PARTS)
def test_the_weights_are_those_of_the_card(part: str) -> None:
    weights = POCKET / part / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == card(part)["sha256"]


def test_the_shipped_parts_are_small() -> None:
    assert sum(path.stat().st_size for path in POCKET.rglob("*") if path.is_file()) < 24_000_000
    assert 2e6 <= card("vision_tower")["num_parameters"] <= 6e6
    assert 2e6 <= card("language_model")["num_parameters"] <= 8e6


@pytest.fixture(scope="module")
def reader() -> tuple[LlamaForCausalLM, Any]:
    folder = POCKET / "language_model"
    return LlamaForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("form", "least"), [("merged", 0.9), ("text", 0.85)])
def test_the_language_model_alone_answers_questions_about_described_scenes(
    reader: tuple[LlamaForCausalLM, Any], form: str, least: float
) -> None:
    scores = language_model.evaluate(*reader, form, num_batches=3)
    assert scores["all"] >= least
    assert scores["all"] == pytest.approx(card("language_model")["scores"][form]["all"], abs=0.03)


def test_a_linear_probe_reads_every_attribute_from_the_tower_s_patches() -> None:
    """A reader fitted here on 1024 pictures: what a projector can reach, with nothing kept from training."""
    tower = CLIPVisionModel.from_pretrained(POCKET / "vision_tower").float().eval()
    scores = vision_tower.probe(tower, num_train=1024, num_test=256)
    assert min(scores.values()) >= 0.95, scores
    assert scores["all"] == pytest.approx(card("vision_tower")["scores"]["all"], abs=0.03)


@pytest.mark.parametrize("word", [*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.COUNTS, "yes", "no"])
def test_every_answer_is_one_token(reader: tuple[LlamaForCausalLM, Any], word: str) -> None:
    assert len(reader[1](" " + word, add_special_tokens=False)["input_ids"]) == 1
