"""Every family of towers and language models at tiny size, laid out as the hub lays them, and joined."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones, FetchedBackbone
from llava_pipeline.model.assemble import Llava, assemble, check_image_tokens
from llava_pipeline.spec import FolderBackbone, ModelSpec

Make = Callable[[], PreTrainedModel]
NUM_TOKENS = 411  # of the pocket tokenizer, without <image>
VIT: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER = VIT | {"intermediate_size": 40, "image_size": 28, "patch_size": 7}
DINO = VIT | {"mlp_ratio": 2, "image_size": 70, "patch_size": 14}
HALF = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
TEXT: dict[str, Any] = {
    "vocab_size": NUM_TOKENS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

FULL = ModelSpec(vision_feature_select_strategy="full")
TOWERS: dict[str, tuple[Make, ModelSpec, int]] = {  # with image tokens
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)), ModelSpec(), 16),
    "clip-full": (lambda: CLIPVisionModel(CLIPVisionConfig(**TOWER)), FULL, 17),
    "whole-clip": (lambda: CLIPModel(CLIPConfig(text_config=HALF, vision_config=TOWER)), ModelSpec(), 16),
    "siglip": (lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)), FULL, 16),
    "siglip-without-head": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=False)),
        FULL.model_copy(update={"vision_feature_layer": -1}),
        16,
    ),
    # SigLIP2 of fixed resolution lies on the hub as a whole SigLIP.
    "siglip2": (lambda: SiglipModel(SiglipConfig(text_config=HALF, vision_config=TOWER)), FULL, 16),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**DINO)), ModelSpec(), 25),
    "dinov2-smaller": (lambda: Dinov2Model(Dinov2Config(**DINO)), ModelSpec(image_size=42), 9),
    "dinov2-classifier": (
        lambda: Dinov2ForImageClassification(Dinov2Config(**DINO, num_labels=3)),
        ModelSpec(vision_feature_layer=-1, image_size=28),
        4,
    ),
    "dinov2-giant": (lambda: Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=True)), ModelSpec(image_size=28), 4),
    "dinov2-registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
        ModelSpec(image_size=28),
        8,
    ),
}
LANGUAGE_MODELS: dict[str, Make] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False)),
    "smollm2": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "llama-3.1": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, rope_parameters=LLAMA31)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16, tie_word_embeddings=False)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TEXT, head_dim=8, sliding_window=None)),
}


def lively(make: Make) -> PreTrainedModel:
    """With random weights large enough that predictions differ by word, place and picture."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = make()
        for parameter in model.parameters():
            spread = 0.25 if parameter.dim() > 1 else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def fetched(make: Make, folder: Path, with_tokenizer: bool = False) -> FetchedBackbone:
    """A part from a folder as ``save_pretrained`` leaves it; the pocket tokenizer beside a language model."""
    lively(make).save_pretrained(folder)
    if with_tokenizer:
        own = resources.files("llava_pipeline.backbones") / "pocket" / "language_model"
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(str(own / name), folder)
    return fetch(FolderBackbone(path=str(folder)), None, 0)


def joined(tower: Make, language_model: Make, spec: ModelSpec, folder: Path) -> Llava:
    """Both parts and a projector, checked."""
    parts = Backbones(
        vision_tower=fetched(tower, folder / "tower"),
        language_model=fetched(language_model, folder / "language_model", with_tokenizer=True),
    )
    llava = assemble(parts, spec)
    check_image_tokens(llava)
    return llava
