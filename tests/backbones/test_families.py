"""Every family of towers joins every family of language models, and all that reads them gives the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.evaluation.read import Job, Limits, read, stop_ids
from llava_pipeline.model.assemble import Llava, assemble, check_image_tokens, describe
from llava_pipeline.model.families import num_image_tokens
from llava_pipeline.model.projector import identity
from llava_pipeline.model.tower import feature_width, pixel_shuffle, tower_features
from llava_pipeline.serving.engine import Engine
from llava_pipeline.spec import FolderBackbone, ModelSpec, StepSpec
from llava_pipeline.training.step import PackedStep, PlainStep, make_step
from tests.backbones.families import FULL, LANGUAGE_MODELS, TOWER, TOWERS, fetched, joined, lively
from tests.evaluation.test_read import MAX_NEW_TOKENS, one_by_one, prompts_of, question_of
from tests.serving.test_engine import asked, generated
from tests.tiny import CONVERSATIONS, NUM_PICTURES, features_of, pictures, samples_of
from tests.training.test_lora import LORA, with_adapter
from tests.training.test_lora import assert_same as assert_same_learning
from tests.training.test_lora import gradients as learned_by
from tests.training.test_step import ALL, Case, assert_same, gradients, ours, plain

PAIRS = [(tower, "llama") for tower in TOWERS] + [("dinov2", name) for name in LANGUAGE_MODELS if name != "llama"]
IMAGE = [k % NUM_PICTURES for k in range(len(CONVERSATIONS))]


@dataclass(frozen=True)
class Pair:
    """A tower and a language model, and what was joined from them."""

    tower: str
    language_model: str
    llava: Llava


@pytest.fixture(scope="module", params=PAIRS, ids="+".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    tower, language_model = request.param
    make, spec, _ = TOWERS[tower]
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(folder / "home"))
        yield Pair(tower, language_model, joined(make, LANGUAGE_MODELS[language_model], spec, folder))


# --------------------------------------------------------------------------------------------- parity


def test_the_features_are_those_that_transformers_projects(pair: Pair) -> None:
    model, pixels = pair.llava.model, pictures(pair.llava)
    features = tower_features(model, pixels)
    assert features.shape == (NUM_PICTURES, TOWERS[pair.tower][2], 24)
    config = model.config
    with torch.no_grad():
        expected = model.model.get_image_features(
            pixels, vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output  # fmt: skip
        assert torch.equal(model.model.multi_modal_projector(features), torch.stack(tuple(expected)))


def test_the_tower_holds_what_its_folder_holds(pair: Pair) -> None:
    tower = lively(TOWERS[pair.tower][0]).eval()
    tower = getattr(tower, "vision_model", getattr(tower, "dinov2", tower))
    pixels = pictures(pair.llava)
    with torch.no_grad():
        found, expected = (
            part(pixels, output_hidden_states=True) for part in (pair.llava.model.model.vision_tower, tower)
        )
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))


def test_a_packed_step_has_the_loss_and_gradient_of_the_plain_forward(pair: Pair) -> None:
    llava = pair.llava
    case = Case(llava.model, samples_of(llava), pictures(llava))
    expected = plain(case, ALL)
    made = make_step(case.model, case.samples, case.features, torch.float32, StepSpec())
    assert isinstance(made, PackedStep)
    assert_same(ours(case, made, ALL), expected)
    assert_same(ours(case, made, ALL, most=60), expected)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral"])
def test_an_adapter_learns_in_the_packed_step_as_peft_does(name: str, tmp_path: Path) -> None:
    llava = with_adapter(joined(TOWERS["siglip"][0], LANGUAGE_MODELS[name], FULL, tmp_path), LORA)
    samples, features = samples_of(llava), features_of(llava)
    expected = learned_by(llava, PlainStep(llava.model, samples, lambda images: features[images]), LORA)
    made = make_step(llava.model, samples, lambda images: features[images], torch.float32, StepSpec())
    assert isinstance(made, PackedStep)
    found = learned_by(llava, made, LORA)
    assert_same_learning(found, expected)


def test_generation_with_a_cache_is_generation_without(pair: Pair) -> None:
    llava = pair.llava
    prompt = torch.tensor([llava.processor.prompt("\nWhich color?")])
    answers = [
        llava.model.generate(
            input_ids=prompt,
            pixel_values=pictures(llava)[:1],
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=None,
            use_cache=use_cache,
            pad_token_id=0,
        )
        for use_cache in (True, False)
    ]
    assert answers[0].shape[1] == prompt.shape[1] + 12
    assert torch.equal(*answers)


def test_evaluation_and_serving_answer_as_generate_does(pair: Pair) -> None:
    llava = pair.llava
    expected = one_by_one(llava, sorted(stop_ids(llava)))
    jobs = [Job(question_of(llava, prompt), k, True) for prompt, k in zip(prompts_of(llava), IMAGE, strict=True)]
    limits = Limits(8, MAX_NEW_TOKENS, stop_ids(llava))
    told = read(llava, jobs, tower_features(llava.model, pictures(llava)), limits, lambda _: None)
    assert [list(one.answer or ()) for one in told] == [
        [k for k in ids if k not in stop_ids(llava)] for ids in expected
    ]
    engine = Engine(llava)
    try:
        for one in (asked(llava), asked(llava, "How many?", (1,)), asked(llava, "Hello", ())):
            engine.submit(one.ask)
            assert one.text() == generated(llava, one)
    finally:
        engine.close(0.0)


def test_what_a_checkpoint_holds_besides_is_told_by_kind(pair: Pair) -> None:
    expected = {
        "whole-clip": {"CLIP text half"}, "siglip": {"pooling head"}, "siglip2": {"pooling head", "SigLIP text half"},
        "dinov2": {"mask token"}, "dinov2-smaller": {"mask token"}, "dinov2-giant": {"mask token"},
        "dinov2-classifier": {"mask token", "classifier"},
    }  # fmt: skip
    assert pair.llava.num_ignored_weights.keys() == expected.get(pair.tower, set())


def test_colours_are_those_of_the_family_where_none_are_told(pair: Pair) -> None:
    images = pair.llava.processor.images
    expected = {"c": 0.48145466, "w": 0.48145466, "s": 0.5, "d": 0.485}[pair.tower[0]]
    assert (images.mean[0], images.side) == (expected, TOWERS[pair.tower][1].image_size or images.side)


# --------------------------------------------------------------------------------------------- pixel shuffle


def test_pixel_shuffle_is_that_of_idefics3() -> None:
    features = torch.randn(2, 36, 8)
    for r in (1, 2, 3, 6):
        found = pixel_shuffle(features, r)
        assert torch.equal(found, Idefics3Connector.pixel_shuffle(None, features, r))  # type: ignore[arg-type]
        assert found.shape == (2, 36 // r**2, 8 * r**2)


@pytest.fixture
def shuffled(tmp_path: Path) -> Llava:
    """SigLIP's 16 patches as four tokens."""
    spec = FULL.model_copy(update={"pixel_shuffle": 2})
    return joined(TOWERS["siglip"][0], LANGUAGE_MODELS["smollm2"], spec, tmp_path)


def embedded(llava: Llava, input_ids: Tensor, pixels: Tensor) -> Tensor:
    """Embeddings of padded rows, with the projected features of a shuffled grid, each laid in by hand."""
    hidden = llava.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    grid = hidden.view(len(pixels), 4, 4, 24)
    tokens = [grid[:, y : y + 2, x : x + 2].reshape(len(pixels), 96) for y in (0, 2) for x in (0, 2)]
    projected = llava.model.model.multi_modal_projector(torch.stack(tokens, 1))
    embeddings = llava.model.get_input_embeddings()(input_ids)
    at_image = (input_ids == llava.processor.image_token_id)[..., None].expand_as(embeddings)
    return embeddings.masked_scatter(at_image, projected)


def test_shuffled_features_are_learned_from_and_answered_from(shuffled: Llava) -> None:
    model = shuffled.model
    assert shuffled.processor.num_image_tokens == model.config.image_seq_length == 4
    assert feature_width(model.config) == model.model.multi_modal_projector.linear_1.in_features == 96
    case = Case(model, samples_of(shuffled), pictures(shuffled))
    rows = [case.samples.of(k) for k in ALL]
    width = max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.stack([torch.nn.functional.pad(row[part], (0, width - len(row[part])), value=fill) for row in rows])
        for part, fill in ((0, 0), (1, -100))
    )
    pixels = case.pixels[case.samples.images_of(ALL)]
    mask = torch.tensor([[k < len(row[0]) for k in range(width)] for row in rows])
    loss = model(inputs_embeds=embedded(shuffled, ids, pixels), attention_mask=mask, labels=labels).loss
    loss.backward()
    expected = loss.item(), gradients(model)
    assert_same(ours(case, make_step(model, case.samples, case.features, torch.float32, StepSpec()), ALL), expected)
    one = asked(shuffled)
    prompt = torch.tensor([one.ask.prompt])
    seen = torch.stack([torch.from_numpy(picture.pixels.copy()) for picture in one.ask.pictures])
    with torch.no_grad():
        embeddings = embedded(shuffled, prompt, shuffled.processor.normalise(seen))
        answer = model.generate(
            inputs_embeds=embeddings, do_sample=False, max_new_tokens=10, eos_token_id=sorted(stop_ids(shuffled)),
            pad_token_id=0,
        )  # fmt: skip
    engine = Engine(shuffled)
    engine.submit(one.ask)
    assert one.text() == shuffled.processor.decode(answer[0].tolist())
    engine.close(0.0)


def test_what_a_projector_depends_on_names_size_and_shuffle_where_they_are_used(tmp_path: Path) -> None:
    parts = Backbones(
        vision_tower=fetched(TOWERS["dinov2"][0], tmp_path / "tower"),
        language_model=fetched(LANGUAGE_MODELS["llama"], tmp_path / "language_model", with_tokenizer=True),
    )
    known = []
    for spec in (ModelSpec(), ModelSpec(image_size=28), ModelSpec(image_size=56, pixel_shuffle=2)):
        llava = assemble(parts, spec)
        known.append(identity(describe(llava, parts, spec)))
    assert not known[0].keys() & {"image_size", "pixel_shuffle"}
    assert (known[1]["image_size"], "pixel_shuffle" in known[1]) == (28, False)
    assert (known[2]["image_size"], known[2]["pixel_shuffle"]) == (56, 2)
    assert known[1]["num_image_tokens"] == known[2]["num_image_tokens"] == 4


# --------------------------------------------------------------------------------------------- image tokens


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (SiglipVisionConfig(image_size=224, patch_size=16), {}, 196),
        (SiglipVisionConfig(image_size=384, patch_size=14), {}, 729),
        (SiglipVisionConfig(image_size=384, patch_size=14), {"pixel_shuffle": 3}, 81),
        (SiglipVisionConfig(image_size=512, patch_size=16), {"pixel_shuffle": 4}, 64),
        (Dinov2Config(image_size=518, patch_size=14), {"image_size": 70}, 26),
        (Dinov2Config(image_size=518, patch_size=14), {"image_size": 518}, 1370),
        (Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_register_tokens=4), {"image_size": 224}, 261),
        (CLIPVisionConfig(image_size=336, patch_size=14), {"image_size": 336}, 577),
    ],
)
def test_image_tokens_of_all_families(config: Any, changes: dict[str, int], expected: int) -> None:
    assert num_image_tokens(config, FULL.model_copy(update=changes)) == expected


@pytest.mark.parametrize(
    ("config", "spec", "told"),
    [
        (SiglipVisionConfig(), ModelSpec(), r"SigLIP tower has no class token to drop; set .*strategy=full"),
        (CLIPVisionConfig(), ModelSpec(image_size=336), r"but a CLIP tower has positions for 224 pixels only"),
        (SiglipVisionConfig(), FULL.model_copy(update={"image_size": 384}), r"a SigLIP tower has positions for 224"),
        (Dinov2Config(), ModelSpec(image_size=100), r"image_size=100 is not divided .* 14 pixels; set 98 or 112"),
        (Dinov2Config(), ModelSpec(image_size=7), r"patches of 14 pixels; set 14$"),
        (CLIPVisionConfig(), ModelSpec(pixel_shuffle=2), r"=2 does not divide the tower's 7 x 7 .* one of 1, 7"),
        (CLIPVisionConfig(), FULL.model_copy(update={"pixel_shuffle": 7}), r"1 of the tower's features is no patch"),
        (Dinov2WithRegistersConfig(), ModelSpec(pixel_shuffle=2), r"4 of the tower's features are no patches"),
        (SiglipVisionConfig(image_size=[224, 448]), FULL, r"image_size is \[224, 448\], which is no square"),
    ],
)  # fmt: skip
def test_features_that_a_tower_does_not_give_are_refused(config: Any, spec: ModelSpec, told: str) -> None:
    with pytest.raises(IncompatibleParts, match=told):
        num_image_tokens(config, spec)


# --------------------------------------------------------------------------------------------- parts that do not fit


def parts_of(tmp_path: Path, language_model: str = "llama") -> Backbones:
    return Backbones(
        vision_tower=fetched(TOWERS["clip"][0], tmp_path / "tower"),
        language_model=fetched(LANGUAGE_MODELS[language_model], tmp_path / "language_model", with_tokenizer=True),
    )


def test_a_tower_for_pictures_of_every_shape_is_refused(tmp_path: Path) -> None:
    tower = fetched(
        lambda: Siglip2VisionModel(Siglip2VisionConfig(**{k: v for k, v in TOWER.items() if k != "image_size"})),
        tmp_path / "naflex",
    )
    with pytest.raises(
        IncompatibleParts, match=r"folder:naflex is a siglip2_vision_model, .* choose a SigLIP2 of fixed"
    ):
        assemble(parts_of(tmp_path).model_copy(update={"vision_tower": tower}), FULL)


@pytest.mark.parametrize("swapped", [False, True])
def test_parts_in_each_others_place_are_refused(tmp_path: Path, swapped: bool) -> None:
    parts = parts_of(tmp_path)
    one = {"language_model": parts.vision_tower} if swapped else {"vision_tower": parts.language_model}
    told = (
        "is a clip_vision_model, not a language model" if swapped else "is a llama, not a vision tower of one of CLIP"
    )
    with pytest.raises(IncompatibleParts, match=told):
        assemble(parts.model_copy(update=one), ModelSpec())


def test_a_context_shorter_than_a_picture_is_refused(tmp_path: Path) -> None:
    def short() -> Any:
        config = LANGUAGE_MODELS["llama"]().config
        config.max_position_embeddings = 31
        return type(LANGUAGE_MODELS["llama"]())(config)

    parts = parts_of(tmp_path).model_copy(
        update={"language_model": fetched(short, tmp_path / "short", with_tokenizer=True)}
    )
    told = r"a picture takes 16 tokens and its question some 16 more, but the language model reads 31 at most; set"
    with pytest.raises(IncompatibleParts, match=told):
        assemble(parts, ModelSpec())
    assert assemble(parts, ModelSpec(pixel_shuffle=2)).processor.num_image_tokens == 4


@pytest.mark.parametrize("template", ["llava", "zephyr", "plain"])
@pytest.mark.parametrize("without", [["bos_token"], ["pad_token"], ["bos_token", "pad_token"]], ids="+".join)
def test_a_tokenizer_may_lack_a_beginning_and_padding(tmp_path: Path, without: list[str], template: Any) -> None:
    parts_of(tmp_path)
    path = tmp_path / "language_model" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in without}))
    language_model = fetch(FolderBackbone(path=str(tmp_path / "language_model")), None, 0)
    tower = fetched(TOWERS["siglip"][0], tmp_path / "siglip")
    spec = FULL.model_copy(update={"chat_template": template})
    llava = assemble(Backbones(vision_tower=tower, language_model=language_model), spec)
    check_image_tokens(llava)
    tokenizer = llava.processor.tokenizer
    assert tokenizer.pad_token_id == llava.model.config.pad_token_id is not None
    assert len(tokenizer) == llava.model.config.text_config.vocab_size
    begins = tokenizer.decode(llava.processor.prompt("?")[:1])
    assert (begins == "<s>") == ("bos_token" not in without)
    case = Case(llava.model, samples_of(llava), pictures(llava))
    assert_same(
        ours(case, make_step(case.model, case.samples, case.features, torch.float32, StepSpec()), ALL), plain(case, ALL)
    )


def test_a_tokenizer_that_owns_the_image_token_is_refused(tmp_path: Path) -> None:
    parts = parts_of(tmp_path)
    llava = assemble(parts, ModelSpec())
    llava.processor.tokenizer.save_pretrained(tmp_path / "language_model")
    owner = fetch(FolderBackbone(path=str(tmp_path / "language_model")), None, 0)
    with pytest.raises(IncompatibleParts, match=r"folder:language_model already owns <image>; use the model it came"):
        assemble(parts.model_copy(update={"language_model": owner}), ModelSpec())


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{{ messages }}",
            r"no <image> slot or no \{% generation %\} marks; choose .*--set model\.chat_template=llava or",
        ),
        ("<image>{% for m in messages %}{{ m }}{% endfor %}", r"no <image> slot or no \{% generation %\} marks"),
        (None, r"no <image> slot"),
    ],
)
def test_a_template_without_a_slot_or_marks_is_refused(tmp_path: Path, template: str | None, told: str) -> None:
    parts_of(tmp_path)
    path = tmp_path / "language_model" / "chat_template.jinja"
    if template is None:
        path.unlink()
    else:
        path.write_text(template)
    part = fetch(FolderBackbone(path=str(tmp_path / "language_model")), None, 0)
    tower = fetched(TOWERS["clip"][0], tmp_path / "tower")
    parts = Backbones(vision_tower=tower, language_model=part)
    with pytest.raises(IncompatibleParts, match=told):
        assemble(parts, ModelSpec())
    assert assemble(parts, ModelSpec(chat_template="zephyr")).processor.prompt("?")


@pytest.mark.parametrize("key", ["embeddings.cls_token", "encoder.layer.1.attention.attention.key.bias"])
def test_a_tower_that_lacks_a_weight_is_refused(tmp_path: Path, key: str) -> None:
    parts = parts_of(tmp_path)
    fetched(TOWERS["dinov2"][0], tmp_path / "dino")
    state = load_file(tmp_path / "dino" / "model.safetensors")
    del state[key]
    save_file(state, tmp_path / "dino" / "model.safetensors", metadata={"format": "pt"})
    tower = fetch(FolderBackbone(path=str(tmp_path / "dino")), None, 0)
    with pytest.raises(WeightsMismatch, match="folder:dino lacks 1 weights: "):
        assemble(parts.model_copy(update={"vision_tower": tower}), ModelSpec())
