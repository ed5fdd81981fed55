"""transformers, in a fresh process, from the exported folder alone; and what stands in it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor

from llava_pipeline.errors import ExportRefused
from llava_pipeline.export.card import Facts
from llava_pipeline.export.huggingface import exported_weights
from llava_pipeline.export.template import exported_template, without_marks
from llava_pipeline.export.verify import LEAST, TOP, Question, expect, picture_difference
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.serving.conversation import Turn, prompt_of
from llava_pipeline.spec import LoraSpec
from llava_pipeline.stages.export import Exported, export, put_plain
from llava_pipeline.store import MANIFEST, describe
from tests.backbones.families import LANGUAGE_MODELS, TOWERS, joined


@pytest.fixture(scope="module")
def exported(
    pocket: Llava, facts: Facts, questions: list[Question], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    return export(pocket, facts, "hf", tmp_path_factory.mktemp("hf") / "out", "f16", questions)


def test_transformers_answers_as_the_model_here(exported: Exported, questions: list[Question]) -> None:
    assert (exported.problem, exported.verified) == ("", True)
    (check,) = exported.checks
    assert check.num_same_ids == check.num_same_first == len(questions)
    assert check.largest_top < 0.05


def test_only_tokens_that_may_follow_are_compared_and_the_first_always(
    pocket: Llava, questions: list[Question]
) -> None:
    for sharpened in (1.0, 50.0):  # as it answers, and so surely that one token is left
        surer = copy.deepcopy(pocket)
        with torch.no_grad():
            surer.model.model.language_model.norm.weight.mul_(sharpened)
        for ours in expect(surer, questions):
            best = ours.logprobs.topk(TOP)
            likely = [
                int(token) for token, value in zip(best.indices, best.values, strict=True) if value.exp() >= LEAST
            ]
            assert list(ours.tokens) == (likely or [int(best.indices[0])])
    assert len(ours.tokens) == 1


def test_the_weights_have_the_names_that_every_reader_knows(exported: Exported, pocket: Llava) -> None:
    with safe_open(Path(exported.folder) / "model.safetensors", "pt") as file:
        names, rows = set(file.keys()), file.get_slice("language_model.model.embed_tokens.weight").get_shape()[0]
        assert file.metadata() == {"format": "pt"}
    starts = {"language_model.model.", "multi_modal_projector.linear_", "vision_tower.vision_model."}
    assert all(name.startswith(tuple(starts)) for name in names)
    config = json.loads((Path(exported.folder) / "config.json").read_text())
    text = config["text_config"]
    assert rows == text["vocab_size"] == len(pocket.processor.tokenizer)
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["image_token_index"] == pocket.processor.image_token_id


def test_every_file_is_in_the_manifest_with_its_digest(exported: Exported) -> None:
    folder = Path(exported.folder)
    assert json.loads((folder / MANIFEST).read_text()) == describe(folder)
    assert {
        "README.md", "LICENSES.md", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
        "generation_config.json", "special_tokens_map.json", "verification.json",
    } <= set(exported.files)  # fmt: skip
    licences = (folder / "LICENSES.md").read_text()
    assert licences.count("Apache-2.0") == 2
    assert "embedded:pocket/vision_tower" in licences


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (300, 100), (101, 300)])
def test_its_processor_does_to_a_picture_what_is_done_here(
    exported: Exported, pocket: Llava, size: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    asked = [Question("?", Image.fromarray(noise))]
    # transformers cuts the mean colour off where we round it: one grey level of what is added, two at its edge.
    most = 0.01 if size[0] == size[1] else 2.01
    assert picture_difference(Path(exported.folder), pocket, asked) <= most


def test_what_others_write_is_read_as_serving_reads_it(exported: Exported, pocket: Llava) -> None:
    processor = AutoProcessor.from_pretrained(exported.folder)
    picture = Image.new("RGB", (64, 64))
    words_first = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "text", "text": "Look:"}, {"type": "image", "image": picture}, {"type": "text", "text": "a?"},
        ]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "And b?"},
    ]  # fmt: skip
    turns = [Turn("user", "Be brief.\nLook:\na?", 1), Turn("assistant", "yes"), Turn("user", "And b?")]
    ids = processor.apply_chat_template(words_first, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids["input_ids"][0] == prompt_of(pocket.processor, turns)


def test_marks_of_training_do_not_travel(pocket: Llava) -> None:
    for llama_cpp in (True, False):
        assert "generation %}" not in exported_template(pocket.processor.template, llama_cpp)
    assert without_marks("a {%- generation -%} b {% endgeneration -%}\nc") == "a {{-''}} b {{''-}}\nc"


def test_a_folder_that_is_not_empty_is_left_alone(pocket: Llava, facts: Facts, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ExportRefused, match="exists already; name a new folder"):
        export(pocket, facts, "hf", tmp_path / "out", "f16", [])
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_pixel_shuffle_is_refused(facts: Facts, tmp_path: Path) -> None:
    make, spec, _ = TOWERS["siglip"]
    llava = joined(make, LANGUAGE_MODELS["llama"], spec.model_copy(update={"pixel_shuffle": 2}), tmp_path)
    with pytest.raises(ExportRefused, match=r"model.pixel_shuffle=1 to export"):
        export(llava, facts, "hf", tmp_path / "out", "f16", [])


def test_an_adapter_is_folded_into_the_weights(pocket: Llava, questions: list[Question]) -> None:
    with_adapter = replace(pocket, model=copy.deepcopy(pocket.model))
    language_model = with_adapter.model.model.language_model
    adapter.inject(language_model, LoraSpec(), 0)
    with torch.no_grad():
        for name, parameter in adapter.parameters(language_model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    folded = replace(pocket, model=copy.deepcopy(pocket.model))
    learned = {name: parameter.detach() for name, parameter in adapter.parameters(language_model).items()}
    own = projector.state_of(with_adapter.model)
    put_plain(folded, own | learned | {adapter.SCALE: adapter.scale(language_model)})
    names = [name for name, _ in exported_weights(folded)]
    assert names == [name for name, _ in exported_weights(pocket)]
    told = [[one.logprobs for one in expect(llava, questions[:2])] for llava in (pocket, with_adapter, folded)]
    for before, here, there in zip(*told, strict=True):
        assert (here - before).abs().max() > 0.1
        torch.testing.assert_close(there, here, atol=1e-3, rtol=0)
