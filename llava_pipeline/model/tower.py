"""What a vision tower gives: one function for everything that reads features, whichever family the tower is of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration


def empty_llava(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """The model of a configuration. With pixel shuffle its projector reads wider features than transformers' own."""
    model = LlavaForConditionalGeneration(config)
    if shuffled(config) > 1:
        model.model.multi_modal_projector.linear_1 = nn.Linear(
            feature_width(config), config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )
    return model


def shuffled(config: LlavaConfig) -> int:
    """Neighbouring patches on a side that become one token; a key of our own, absent where it is 1."""
    return int(getattr(config, "pixel_shuffle", 1))


def feature_width(config: LlavaConfig) -> int:
    """D_vision of a token."""
    return int(config.vision_config.hidden_size) * shuffled(config) ** 2


@torch.no_grad()
def tower_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """(B, 3, S, S) to the hidden state that is projected, (B, P, D_vision); blocks behind it do not run."""
    tower, config = model.model.vision_tower, model.config
    features: Tensor = tower.embeddings(pixel_values.to(tower.dtype))
    if hasattr(tower, "pre_layrnorm"):  # CLIP's, as transformers spells it
        features = tower.pre_layrnorm(features)
    blocks = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
    for block in blocks[: len(blocks) + 1 + config.vision_feature_layer]:
        features = block(features, attention_mask=None)
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    return pixel_shuffle(features, shuffled(config))


def pixel_shuffle(features: Tensor, r: int) -> Tensor:
    """(B, g * g, D) patches in reading order to (B, g * g / r**2, r * r * D): Idefics3's, channels in its order."""
    if r == 1:
        return features
    side = round(features.shape[1] ** 0.5)
    cells = features.unflatten(1, (side // r, r, side // r, r))  # row, row within, column, column within
    joined: Tensor = cells.transpose(2, 3).flatten(3, 5).flatten(1, 2)
    return joined
