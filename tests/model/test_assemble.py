"""Two pretrained parts go in whole and unchanged, or not at all; only the projector between them learns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
)

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.backbones.weights import read_state_dict
from llava_pipeline.contracts import AssembledModel, Backbones, FetchedBackbone
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.model.assemble import (
    Llava,
    State,
    assemble,
    check_image_tokens,
    describe,
    fit_rows,
    load,
)
from llava_pipeline.model.families import CLIP_MEAN, num_image_tokens
from llava_pipeline.model.freeze import count_parameters, freeze_backbones, frozen_digest
from llava_pipeline.model.processor import IMAGE_TOKEN, Processor
from llava_pipeline.model.projector import digest_of, state_of
from llava_pipeline.model.read_processor import add_tokens, load_tokenizer, processor_of
from llava_pipeline.spec import FolderBackbone, HubBackbone, ModelSpec, load_spec
from llava_pipeline.store import open_artifact
from tests.tiny import SPEC, talk

PROJECTOR = {f"model.multi_modal_projector.linear_{k}.{name}" for k in (1, 2) for name in ("weight", "bias")}
Change = Callable[[State], object]
EMBEDDING = "model.embed_tokens.weight"


def nothing(_: State) -> None:
    pass


def weights_of(part: FetchedBackbone) -> State:
    return read_state_dict(open_artifact(part.files) / part.weights)


def altered(part: FetchedBackbone, path: Path, change: Change = nothing, **config: Any) -> FetchedBackbone:
    """The part with other weights, and other values in its configuration."""
    shutil.copytree(open_artifact(part.files), path, dirs_exist_ok=True)
    state = load_file(path / part.weights)
    change(state)
    save_file(state, path / part.weights)
    content = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(content))
    return fetch(FolderBackbone(path=str(path)), None, 0)


def with_tower(backbones: Backbones, tower: FetchedBackbone) -> Backbones:
    return backbones.model_copy(update={"vision_tower": tower})


def with_language(backbones: Backbones, language: FetchedBackbone) -> Backbones:
    return backbones.model_copy(update={"language_model": language})


def untie(state: State) -> None:
    state["lm_head.weight"] = torch.randn(state[EMBEDDING].shape, generator=torch.Generator().manual_seed(3))


# --------------------------------------------------------------------------------------------- what learns


def test_the_projector_alone_is_trainable(shared: Llava) -> None:
    trainable = {name for name, parameter in shared.model.named_parameters() if parameter.requires_grad}
    assert trainable == PROJECTOR


def test_the_counts_add_up(shared: Llava, backbones: Backbones, assembled: AssembledModel) -> None:
    counts = count_parameters(shared.model)
    tower, width = shared.model.config.vision_config.hidden_size, shared.model.config.text_config.hidden_size
    projector = tower * width + width + width * width + width
    assert counts["projector"] == (projector, projector)
    assert counts["vision tower"] == (sum(w.numel() for w in weights_of(backbones.vision_tower).values()), 0)
    grown = len(shared.processor.tokenizer) - weights_of(backbones.language_model)[EMBEDDING].shape[0]
    language = sum(w.numel() for w in weights_of(backbones.language_model).values()) + grown * width
    assert counts["language model"] == (language, 0)
    assert (assembled.num_trainable, assembled.num_frozen) == (projector, assembled.num_total - projector)
    assert assembled.num_total == sum(parameter.numel() for parameter in shared.model.parameters())


def test_the_budget_profile_trains_5771264_numbers() -> None:
    parts = load_spec("budget").backbones
    assert isinstance(parts.vision_tower, HubBackbone)
    assert isinstance(parts.language_model, HubBackbone)
    vision = CLIPVisionConfig(**parts.vision_tower.shape)
    text = LlamaConfig(**{key: size for key, size in parts.language_model.shape.items() if key != "tied"})
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    freeze_backbones(model)
    counts = count_parameters(model)
    assert counts["projector"] == (5_771_264, 5_771_264)
    assert counts["vision tower"] == (87_456_000, 0)
    assert counts["language model"] == (1_100_048_384, 0)


def test_the_digest_sees_one_changed_frozen_number(llava: Llava) -> None:
    before = frozen_digest(llava.model)
    for name, parameter in llava.model.named_parameters():
        if name in PROJECTOR:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
            assert frozen_digest(llava.model) != before, name
            parameter.copy_(kept)
    assert frozen_digest(llava.model) == before


def test_the_digest_does_not_see_the_projector(llava: Llava) -> None:
    before = frozen_digest(llava.model)
    with torch.no_grad():
        for parameter in llava.model.model.multi_modal_projector.parameters():
            parameter.fill_(9)
    assert frozen_digest(llava.model) == before


def test_the_first_projector_depends_on_its_seed_alone(backbones: Backbones, tmp_path: Path) -> None:
    def first(seed: int, parts: Backbones = backbones) -> str:
        model = assemble(parts, SPEC.model.model_copy(update={"projector_seed": seed})).model
        return digest_of(state_of(model))

    one = first(1)
    torch.rand(5)
    assert first(1) == one
    assert first(2) != one
    larger = altered(backbones.language_model, tmp_path, lambda state: state[EMBEDDING].mul_(3))
    assert first(1, with_language(backbones, larger)) == one


def test_it_loads_again_as_it_was(shared: Llava, assembled: AssembledModel) -> None:
    again = load(AssembledModel.model_validate_json(assembled.model_dump_json())).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in shared.model.state_dict().items())


# --------------------------------------------------------------------------------------------- tokens


def test_there_is_one_embedding_row_per_token(shared: Llava) -> None:
    length = len(shared.processor.tokenizer)
    assert shared.model.get_input_embeddings().weight.shape[0] == length
    assert shared.model.lm_head.weight.shape[0] == length
    assert shared.model.config.text_config.vocab_size == length


def test_the_image_token_is_added_once(shared: Llava, backbones: Backbones) -> None:
    own = load_tokenizer(backbones.language_model)
    assert len(shared.processor.tokenizer) == len(own) + 1
    assert shared.processor.image_token_id == len(own) == shared.model.config.image_token_index
    assert IMAGE_TOKEN in shared.processor.tokenizer.all_special_tokens
    assert set(own.all_special_tokens) < set(shared.processor.tokenizer.all_special_tokens)


def test_a_padding_token_is_added_only_where_there_is_none(backbones: Backbones) -> None:
    padded, bare = load_tokenizer(backbones.language_model), load_tokenizer(backbones.language_model)
    bare.pad_token = None
    known, length = padded.pad_token_id, len(padded)
    for tokenizer in (padded, bare):
        add_tokens(tokenizer, "origin")
    assert (padded.pad_token_id, len(padded)) == (known, length + 1)
    assert bare.pad_token == "<pad>"
    assert bare.pad_token_id is not None


def test_a_tokenizer_that_owns_the_image_token_is_refused(backbones: Backbones) -> None:
    tokenizer = load_tokenizer(backbones.language_model)
    add_tokens(tokenizer, "hub:owner/name")
    with pytest.raises(IncompatibleParts, match="tokenizer of hub:owner/name already owns <image>"):
        add_tokens(tokenizer, "hub:owner/name")


@pytest.mark.parametrize(("rows", "wanted"), [(4, 6), (4, 4), (8, 6)])
def test_rows_are_cut_or_extended_by_their_mean(rows: int, wanted: int) -> None:
    weight = torch.randn(rows, 3).half()
    fitted = fit_rows(weight, wanted)
    kept = min(rows, wanted)
    assert fitted.shape == (wanted, 3)
    assert fitted.dtype == weight.dtype
    assert torch.equal(fitted[:kept], weight[:kept])
    assert torch.equal(fitted[kept:], weight.float().mean(0).half().expand(wanted - kept, -1))


def test_the_processor_alone_is_the_same(shared: Llava, assembled: AssembledModel) -> None:
    alone = processor_of(assembled)
    messages = talk("What color is the circle?", "red", "And the square?", "blue")
    assert alone.encode(messages) == shared.processor.encode(messages)
    assert (alone.images, alone.num_image_tokens) == (shared.processor.images, shared.processor.num_image_tokens)


# --------------------------------------------------------------------------------------------- weights go in


def test_weights_are_the_checkpoints_bit_for_bit(shared: Llava, backbones: Backbones) -> None:
    parts = shared.model.model
    tower, language = weights_of(backbones.vision_tower), weights_of(backbones.language_model)
    found = parts.vision_tower.state_dict()
    assert {name.removeprefix("vision_model.") for name in tower} == found.keys()
    assert all(torch.equal(found[name.removeprefix("vision_model.")], tensor) for name, tensor in tower.items())
    found = parts.language_model.state_dict()
    assert {name.removeprefix("model.") for name in language if name != "lm_head.weight"} == found.keys()
    for name, tensor in language.items():
        if name != "lm_head.weight":
            assert torch.equal(found[name.removeprefix("model.")][: len(tensor)], tensor), name


def test_half_precision_goes_in_without_a_rounding(backbones: Backbones, tmp_path: Path) -> None:
    def halve(state: State) -> None:
        for name in state:
            state[name] = state[name].half()

    part = altered(backbones.vision_tower, tmp_path, halve)
    found = assemble(with_tower(backbones, part), SPEC.model).model.model.vision_tower.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[n.removeprefix("vision_model.")], t.float()) for n, t in weights_of(part).items())


def test_a_tied_head_is_the_embedding(shared: Llava) -> None:
    assert shared.model.lm_head.weight is shared.model.get_input_embeddings().weight


def test_an_untied_head_is_its_own(backbones: Backbones, tmp_path: Path) -> None:
    part = altered(backbones.language_model, tmp_path, untie, tie_word_embeddings=False)
    llava = assemble(with_language(backbones, part), SPEC.model)
    check_image_tokens(llava)
    weights = weights_of(part)
    head, embedding = llava.model.lm_head.weight, llava.model.get_input_embeddings().weight
    assert head is not embedding
    assert not head.requires_grad
    for found, name in ((head, "lm_head.weight"), (embedding, EMBEDDING)):
        assert found.shape[0] == len(llava.processor.tokenizer)
        assert torch.equal(found[: len(weights[name])], weights[name])
        assert torch.allclose(found[-1], weights[name].mean(0))


def test_an_untied_model_without_a_head_is_refused(backbones: Backbones, tmp_path: Path) -> None:
    part = altered(backbones.language_model, tmp_path, tie_word_embeddings=False)
    with pytest.raises(WeightsMismatch, match=r"lacks lm_head\.weight, and its configuration does not tie it"):
        assemble(with_language(backbones, part), SPEC.model)


@pytest.mark.parametrize(
    ("which", "key"),
    [
        ("vision_tower", "pre_layrnorm.weight"),
        ("language_model", "layers.1.mlp.up_proj.weight"),
        ("language_model", "embed_tokens.weight"),
    ],
)
def test_a_missing_weight_is_named(backbones: Backbones, tmp_path: Path, which: str, key: str) -> None:
    def drop(state: State) -> None:
        del state[next(name for name in state if name.endswith(key))]

    part = altered(getattr(backbones, which), tmp_path, drop)
    with pytest.raises(WeightsMismatch, match=f"{part.origin} lacks 1 weights: {key}"):
        assemble(backbones.model_copy(update={which: part}), SPEC.model)


def test_of_many_missing_weights_the_first_are_named(backbones: Backbones, tmp_path: Path) -> None:
    def drop(state: State) -> None:
        for name in [name for name in state if ".layers.1." in name]:
            del state[name]

    part = altered(backbones.language_model, tmp_path, drop)
    with pytest.raises(WeightsMismatch, match=r"lacks 9 weights: layers\.1\.\S+, .* and 4 more"):
        assemble(with_language(backbones, part), SPEC.model)


@pytest.mark.parametrize("which", ["vision_tower", "language_model"])
def test_an_unexpected_weight_is_named(backbones: Backbones, tmp_path: Path, which: str) -> None:
    part = altered(getattr(backbones, which), tmp_path, lambda state: state.update({"adapter.weight": torch.ones(2)}))
    with pytest.raises(WeightsMismatch, match=r"holds 'adapter\.weight', which the model does not have"):
        assemble(backbones.model_copy(update={which: part}), SPEC.model)


@pytest.mark.parametrize(
    ("which", "key"),
    [("vision_tower", "post_layernorm.bias"), ("language_model", "norm.weight"), ("language_model", EMBEDDING)],
)
def test_a_wrong_shape_is_told_with_both(backbones: Backbones, tmp_path: Path, which: str, key: str) -> None:
    def grow(state: State) -> None:
        name = next(name for name in state if name.endswith(key))
        state[name] = torch.cat([state[name], state[name]], -1)

    part = altered(getattr(backbones, which), tmp_path, grow)
    with pytest.raises(WeightsMismatch, match=r"is \(.*64.*\), the configuration asks for \(.*32.*\)"):
        assemble(backbones.model_copy(update={which: part}), SPEC.model)


def test_what_older_checkpoints_hold_besides_is_counted(backbones: Backbones, tmp_path: Path) -> None:
    tower = altered(
        backbones.vision_tower,
        tmp_path / "tower",
        lambda state: state.update({"vision_model.embeddings.position_ids": torch.arange(5)}),
    )
    frequencies = {f"model.layers.{k}.self_attn.rotary_emb.inv_freq": torch.ones(4) for k in range(2)}
    language = altered(backbones.language_model, tmp_path / "language", lambda state: state.update(frequencies))
    both = Backbones(vision_tower=tower, language_model=language)
    llava = assemble(both, SPEC.model)
    assert llava.num_ignored_weights == {"position ids": 1, "rotary frequencies": 2}
    assert describe(llava, both, SPEC.model).num_ignored_weights == llava.num_ignored_weights


# --------------------------------------------------------------------------------------------- a whole CLIP


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    """A tiny CLIP as openai/clip-vit-base-patch32 lies on the hub: both halves in one pickled file."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)
    torch.manual_seed(0)
    state = dict(CLIPModel(config).state_dict())
    assert any(name.startswith("vision_model.encoder.") for name in state)
    state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    config.save_pretrained(tmp_path / "clip")
    torch.save(state, tmp_path / "clip" / "pytorch_model.bin")
    return tmp_path / "clip"


def test_a_whole_clip_gives_the_output_of_its_vision_half(backbones: Backbones, clip_folder: Path) -> None:
    part = fetch(FolderBackbone(path=str(clip_folder), weights="pytorch_model.bin"), None, 0)
    llava = assemble(with_tower(backbones, part), SPEC.model)
    check_image_tokens(llava)
    assert llava.processor.num_image_tokens == 16
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = llava.model.model.vision_tower(pixels, output_hidden_states=True)
        theirs = CLIPVisionModel.from_pretrained(clip_folder).eval()(pixels, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


def test_the_text_half_of_a_clip_is_counted(backbones: Backbones, clip_folder: Path) -> None:
    part = fetch(FolderBackbone(path=str(clip_folder), weights="pytorch_model.bin"), None, 0)
    ours = ("text_model.", "logit_scale", "text_projection.", "visual_projection.")
    expected = sum(name.startswith(ours) for name in weights_of(part))
    assert expected > 30
    found = assemble(with_tower(backbones, part), SPEC.model).num_ignored_weights
    assert found == {"CLIP text half": expected, "position ids": 1}


def test_without_an_image_processor_clips_own_colours_are_taken(backbones: Backbones, clip_folder: Path) -> None:
    part = fetch(FolderBackbone(path=str(clip_folder), weights="pytorch_model.bin"), None, 0)
    assert assemble(with_tower(backbones, part), SPEC.model).processor.images.mean == CLIP_MEAN


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_colours_of_an_image_processor_are_taken(backbones: Backbones, clip_folder: Path, name: str) -> None:
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    content = colours if name.startswith("pre") else {"image_processor": colours}
    (clip_folder / name).write_text(json.dumps(content))
    part = fetch(FolderBackbone(path=str(clip_folder), weights="pytorch_model.bin"), None, 0)
    images = assemble(with_tower(backbones, part), SPEC.model).processor.images
    assert (images.side, images.mean, images.std) == (32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# --------------------------------------------------------------------------------------------- parts that do not fit


@pytest.mark.parametrize(
    ("side", "patch", "strategy", "expected"),
    [(224, 32, "default", 49), (224, 32, "full", 50), (224, 16, "default", 196), (336, 14, "default", 576)],
)
def test_image_tokens_by_configuration(side: int, patch: int, strategy: Any, expected: int) -> None:
    spec = ModelSpec(vision_feature_select_strategy=strategy)
    assert num_image_tokens(CLIPVisionConfig(image_size=side, patch_size=patch), spec) == expected


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_tower_gives_what_the_processor_writes(backbones: Backbones, strategy: Any) -> None:
    llava = assemble(backbones, ModelSpec(vision_feature_select_strategy=strategy))
    check_image_tokens(llava)
    assert llava.processor.num_image_tokens == llava.model.config.image_seq_length


def test_other_image_tokens_than_features_are_told_with_both_numbers(shared: Llava) -> None:
    own = shared.processor
    wrong = Processor(own.tokenizer, own.template, own.images, own.num_image_tokens + 3)
    message = f"gives {own.num_image_tokens} features per image, the processor writes {own.num_image_tokens + 3} image"
    with pytest.raises(IncompatibleParts, match=message):
        check_image_tokens(replace(shared, processor=wrong))


def test_a_model_that_answers_with_no_numbers_is_refused(llava: Llava) -> None:
    with torch.no_grad():
        llava.model.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(IncompatibleParts, match="not finite"):
        check_image_tokens(llava)


@pytest.mark.parametrize("config", [ViTConfig(), BertConfig(), LlamaConfig()])
def test_a_tower_of_no_known_family_is_refused(backbones: Backbones, tmp_path: Path, config: Any) -> None:
    shutil.copytree(open_artifact(backbones.vision_tower.files), tmp_path / "tower")
    config.save_pretrained(tmp_path / "tower")
    part = fetch(FolderBackbone(path=str(tmp_path / "tower")), None, 0)
    with pytest.raises(IncompatibleParts, match=f"folder:tower is a {config.model_type}, not a vision tower"):
        assemble(with_tower(backbones, part), SPEC.model)


def test_a_language_model_that_is_none_is_refused(backbones: Backbones) -> None:
    with pytest.raises(IncompatibleParts, match="is a clip_vision_model, not a language model"):
        assemble(with_language(backbones, backbones.vision_tower), SPEC.model)


def test_a_language_model_without_a_tokenizer_is_refused(backbones: Backbones, tmp_path: Path) -> None:
    for path in open_artifact(backbones.language_model.files).iterdir():
        if "token" not in path.name:
            shutil.copy(path, tmp_path)
    part = fetch(FolderBackbone(path=str(tmp_path)), None, 0)
    with pytest.raises(IncompatibleParts, match=r"has no tokenizer\.json .* put the model's tokenizer\.json beside"):
        assemble(with_language(backbones, part), SPEC.model)


def test_a_feature_layer_the_tower_does_not_have_is_refused(backbones: Backbones) -> None:
    with pytest.raises(IncompatibleParts, match="vision_feature_layer=-4, but the tower has 2 layers"):
        assemble(backbones, ModelSpec(vision_feature_layer=-4))
    check_image_tokens(assemble(backbones, ModelSpec(vision_feature_layer=-3)))
