"""What a run begins with: which parts may be gone on with, and how a stage is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flows.form import Changes, spec_of
from llava_pipeline.errors import IncompatibleParts, SpecError
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.freeze import LANGUAGE_MODEL
from llava_pipeline.spec import PartSpec, TrainingSpec, load_spec, profile_names

PLAIN: projector.State = {"linear_1.weight": torch.zeros(1)}
LORA = PLAIN | {f"{adapter.PREFIX}layers.0.q.lora_A.weight": torch.zeros(1)}
FULL = PLAIN | {f"{LANGUAGE_MODEL}norm.weight": torch.zeros(1)}


def training(mode: Any, rate: float | None = None) -> TrainingSpec:
    return TrainingSpec(max_steps=1, language_model=PartSpec(mode=mode, learning_rate=rate))


@pytest.mark.parametrize(
    ("state", "spec"),
    [
        (PLAIN, training("frozen")), (PLAIN, training("lora")), (PLAIN, training("full")),
        (LORA, training("lora")), (FULL, training("full")),
    ],
)  # fmt: skip
def test_what_goes_on_learning_may_be_begun_with(state: projector.State, spec: TrainingSpec) -> None:
    projector.refuse_dropped(state, spec)


@pytest.mark.parametrize(
    ("state", "spec", "had"),
    [
        (LORA, training("frozen"), "lora"), (LORA, training("full"), "lora"), (LORA, training("lora", 0), "lora"),
        (FULL, training("frozen"), "full"), (FULL, training("lora"), "full"),
    ],
)  # fmt: skip
def test_what_would_be_left_behind_is_refused_with_the_remedy(
    state: projector.State, spec: TrainingSpec, had: str
) -> None:
    with pytest.raises(IncompatibleParts, match=f"mode {had}.*set the mode to {had}, or begin with a version"):
        projector.refuse_dropped(state, spec)


@pytest.mark.parametrize("profile", profile_names())
def test_every_profile_has_both_stages(profile: str) -> None:
    align, instruct = load_spec(profile), load_spec(profile, stage="instruct")
    assert (align.stage, align.begin_with) == ("align", None)
    assert not align.training.language_model.learns
    assert (instruct.stage, instruct.begin_with) == ("instruct", "champion")
    assert instruct.training.language_model.learns
    assert instruct.registered_model == align.registered_model


def test_a_stage_is_the_same_however_it_is_asked_for(tmp_path: Path) -> None:
    expected = load_spec("smol", stage="instruct")
    assert load_spec("smol", ["stage=instruct"]) == expected
    assert spec_of("smol", Changes.model_validate({"stage": "instruct"})) == expected
    begun = load_spec("smol", ["stage=instruct", "begin_with=3", "training.lora.rank=4"])
    assert (begun.begin_with, begun.training.lora.rank) == ("3", 4)


def test_what_is_set_for_one_run_is_not_set_for_the_next_in_the_same_process() -> None:
    expected = load_spec("tiny", stage="instruct")
    changes = {"training": {"lora": {"rank": 4}}}
    changed = ["training.language_model.mode=full", "training.lora.rank=8"]
    assert load_spec("tiny", changed, changes, stage="instruct").training.language_mode == "full"
    assert load_spec("tiny", stage="instruct") == expected
    assert changes == {"training": {"lora": {"rank": 4}}}


def test_a_stage_that_is_not_known_and_a_section_that_is_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="stage"):
        load_spec("smol", ["stage=pretrain"])
    path = tmp_path / "own.yaml"
    path.write_text("stages: {finetune: {}}\n")
    with pytest.raises(SpecError, match="no stage 'finetune'; there are align and instruct"):
        load_spec(str(path))
    path.write_text("stages: [instruct]\n")
    with pytest.raises(SpecError, match="must map align and instruct"):
        load_spec(str(path))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.projector.mode=frozen", "nothing learns"),
        ("training.projector.mode=lora", "a projector has no lora"),
        ("training.vision_tower.mode=full", "the vision tower is trained in no stage"),
        ("training.language_model.mode=half", "language_model.mode"),
        ("training.lora.rank=0", "lora.rank"),
    ],
)
def test_modes_that_make_no_sense_are_refused(override: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        load_spec("pocket", [override])


def test_fp16_of_a_whole_language_model_on_several_processes_is_refused_before_anything_is_fetched() -> None:
    whole = ["training.language_model.mode=full", "training.precision=fp16"]
    assert load_spec("pocket", whole).training.precision == "fp16"
    with pytest.raises(SpecError, match="no loss scale, which fp16 needs"):
        load_spec("pocket", [*whole, "training.num_processes=2"])
