"""A ``LlavaForConditionalGeneration`` from two pretrained parts and a fresh projector, everything else frozen.

transformers 5 moved the parts: the seed's ``model.vision_tower`` and ``model.language_model`` are gone, and assigning
to them adds a second model silently. Here weights go in by name, strictly: a missing key refuses, an unexpected one
of a known kind is counted, any other refuses.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from llava_pipeline.backbones.configuration import read_config, usable
from llava_pipeline.backbones.converted import plain
from llava_pipeline.backbones.weights import read_gguf, read_state_dict
from llava_pipeline.contracts import AssembledModel, Backbones, FetchedBackbone
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.model.families import (
    check_context,
    family_of,
    image_side,
    num_image_tokens,
    tower_keys,
    vision_config_of,
)
from llava_pipeline.model.freeze import count_parameters, freeze_backbones, frozen_digest
from llava_pipeline.model.processor import IMAGE_TOKEN, ImageSettings, Processor
from llava_pipeline.model.read_processor import add_tokens, image_settings, load_tokenizer
from llava_pipeline.model.template import chat_template
from llava_pipeline.model.tower import empty_llava, tower_features
from llava_pipeline.spec import ModelSpec
from llava_pipeline.store import open_artifact

State = dict[str, torch.Tensor]
IGNORED_OF_TEXT = {"rotary_emb.inv_freq": "rotary frequencies"}  # suffix of a checkpoint's key -> how it is told


@dataclass(frozen=True)
class Llava:
    """A live model with its processor; never crosses a stage boundary."""

    model: LlavaForConditionalGeneration
    processor: Processor
    num_ignored_weights: dict[str, int]


def load_language_model(part: FetchedBackbone) -> tuple[Any, PreTrainedTokenizerFast, State]:
    """Configuration, tokenizer and weights of a causal language model."""
    folder, weights = plain(part)
    if weights.endswith(".gguf"):
        return read_gguf(folder, weights)
    config = read_config(folder, weights, part.origin)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise IncompatibleParts(f"{part.origin} is a {config.model_type}, not a language model; choose another one")
    return config, load_tokenizer(part), read_state_dict(folder / weights)


def load_vision_tower(part: FetchedBackbone, spec: ModelSpec) -> tuple[Any, ImageSettings, State]:
    """Configuration, image settings and weights of a vision tower; a whole CLIP or SigLIP gives its vision half."""
    if part.weights.endswith(".gguf"):
        raise IncompatibleParts(
            f"{part.origin}: a vision tower is not read from a GGUF file such as {part.weights}; "
            "name its .safetensors or .bin file as `weights`"
        )
    folder = open_artifact(part.files)
    config = vision_config_of(read_config(folder, part.weights, part.origin), part.origin)
    state = tower_keys(read_state_dict(folder / part.weights), family_of(config))
    return config, image_settings(part, image_side(config, spec)), state


def llava_config(vision: Any, text: Any, tokenizer: PreTrainedTokenizerFast, spec: ModelSpec) -> LlavaConfig:
    """One configuration of both parts; copies, because resizing embeddings writes into a shared one."""
    text = copy.deepcopy(text)
    text.vocab_size = len(tokenizer)
    text.pad_token_id = tokenizer.pad_token_id
    return LlavaConfig(
        vision_config=copy.deepcopy(vision),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_image_tokens(vision, spec),
        vision_feature_layer=spec.vision_feature_layer,
        vision_feature_select_strategy=spec.vision_feature_select_strategy,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **({"pixel_shuffle": spec.pixel_shuffle} if spec.pixel_shuffle > 1 else {}),
    )


def fit_rows(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Embedding rows cut or extended (by their mean) to the tokenizer's length."""
    if weight.shape[0] >= num_rows:
        return weight[:num_rows].clone()
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - weight.shape[0], -1)])


def inject(module: torch.nn.Module, state: State, origin: str, ignored: Mapping[str, str]) -> dict[str, int]:
    """Copy a checkpoint into a module; the counts of what was left out, by kind. ``ignored`` are marks of keys that may
    be (prefix or suffix), with their kind.

    Raises:
        WeightsMismatch: a key is missing, an unexpected one is of no known kind, or a shape differs.
    """
    wanted = dict(module.state_dict())
    left_out: dict[str, int] = {}
    for key in sorted(set(state) - set(wanted)):
        kind = next((k for mark, k in ignored.items() if key.startswith(mark) or key.endswith(mark)), None)
        if kind is None:
            raise WeightsMismatch(
                f"{origin} holds {key!r}, which the model does not have; is this the right checkpoint?"
            )
        left_out[kind] = left_out.get(kind, 0) + 1
    if missing := sorted(set(wanted) - set(state)):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise WeightsMismatch(f"{origin} lacks {len(missing)} weights: {shown}; is this the right checkpoint?")
    with torch.no_grad():
        for key, target in wanted.items():
            if state[key].shape != target.shape:
                raise WeightsMismatch(
                    f"{origin}: {key} is {tuple(state[key].shape)}, the configuration asks for {tuple(target.shape)}"
                )
            target.copy_(state[key])
    return left_out


def init_projector(projector: torch.nn.Module, seed: int) -> None:
    """The projector's first weights: torch's own initialisation of a linear layer, a function of the seed alone.

    Its output is about ten times as large as a word's embedding. Scaled down to a word's size it learned more slowly
    (docs/decisions.md).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in projector.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.reset_parameters()


def assemble(backbones: Backbones, spec: ModelSpec) -> Llava:
    """The frozen parts joined by a fresh projector, in float32 on the CPU.

    Raises:
        IncompatibleParts: parts that cannot be joined.
        WeightsMismatch: a checkpoint that does not fit its configuration.
    """
    vision_config, images, vision_state = load_vision_tower(backbones.vision_tower, spec)
    text_config, tokenizer, text_state = load_language_model(backbones.language_model)
    template = chat_template(spec.chat_template, tokenizer)
    add_tokens(tokenizer, backbones.language_model.origin)
    origins = f"{backbones.vision_tower.origin} or {backbones.language_model.origin}"
    with usable(origins, "config.json"):
        config = llava_config(vision_config, text_config, tokenizer, spec)
    check_context(text_config, config.image_seq_length)
    if not -vision_config.num_hidden_layers - 1 <= spec.vision_feature_layer <= -1:
        raise IncompatibleParts(
            f"model.vision_feature_layer={spec.vision_feature_layer}, but the tower has "
            f"{vision_config.num_hidden_layers} layers"
        )
    with usable(origins, "config.json"), no_init_weights():
        model = empty_llava(config)
    model = model.to(torch.float32).eval()
    parts = model.model
    ignored = inject(parts.vision_tower, vision_state, backbones.vision_tower.origin, family_of(vision_config).ignored)
    text = {key.removeprefix("model."): value for key, value in text_state.items() if key != "lm_head.weight"}
    if "embed_tokens.weight" in text:  # if not, inject says so
        text["embed_tokens.weight"] = fit_rows(text["embed_tokens.weight"], len(tokenizer))
    ignored |= inject(parts.language_model, text, backbones.language_model.origin, IGNORED_OF_TEXT)
    if config.tie_word_embeddings:
        model.lm_head.weight = parts.language_model.embed_tokens.weight
    else:
        if "lm_head.weight" not in text_state:
            raise WeightsMismatch(
                f"{backbones.language_model.origin} lacks lm_head.weight, and its configuration does not tie it to the "
                "embeddings; is this the right checkpoint?"
            )
        head = fit_rows(text_state["lm_head.weight"], len(tokenizer))
        inject(model.lm_head, {"weight": head}, backbones.language_model.origin, {})
    init_projector(parts.multi_modal_projector, spec.projector_seed)
    freeze_backbones(model)
    return Llava(model, Processor(tokenizer, template, images, config.image_seq_length), ignored)


@torch.no_grad()
def check_image_tokens(llava: Llava) -> None:
    """One forward pass: as many features come out as image tokens go in, and the loss-bearing part stays finite.

    Raises:
        IncompatibleParts: the counts differ.
    """
    side = llava.processor.images.side
    features = tower_features(llava.model, torch.zeros(1, 3, side, side))
    found = features.shape[1]
    if found != llava.processor.num_image_tokens:
        raise IncompatibleParts(
            f"the vision tower gives {found} features per image, the processor writes "
            f"{llava.processor.num_image_tokens} image tokens; check model.vision_feature_select_strategy and the "
            "tower's image and patch size"
        )
    ids = torch.tensor([llava.processor.prompt("?")])
    embeddings = llava.model.get_input_embeddings()(ids)
    embeddings[ids == llava.processor.image_token_id] = llava.model.model.multi_modal_projector(features)[0]
    logits = llava.model(inputs_embeds=embeddings).logits
    if not torch.isfinite(logits).all():
        raise IncompatibleParts("the assembled model answers with numbers that are not finite; check both checkpoints")


def describe(llava: Llava, backbones: Backbones, spec: ModelSpec) -> AssembledModel:
    """The facts of an assembled model that cross the stage boundary."""
    counts = count_parameters(llava.model)
    total = sum(both[0] for both in counts.values())
    trainable = sum(both[1] for both in counts.values())
    return AssembledModel(
        backbones=backbones,
        spec=spec,
        image_size=llava.processor.images.side,
        num_image_tokens=llava.processor.num_image_tokens,
        num_total=total,
        num_trainable=trainable,
        num_frozen=total - trainable,
        frozen_digest=frozen_digest(llava.model),
        chat_template_digest=hashlib.sha256(llava.processor.template.encode()).hexdigest(),
        num_ignored_weights=llava.num_ignored_weights,
    )


def load(model: AssembledModel) -> Llava:
    """The live model of an assembled one, with its first projector."""
    return assemble(model.backbones, model.spec)
