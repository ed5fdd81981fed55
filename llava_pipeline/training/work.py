"""How many operations a step needs, whatever tricks are used: the measure that throughput is told against.

Derived in docs/benchmarks.md: forward and the gradient to the input through the language model, no weight gradients
but the projector's, causal attention, the head where a label is, the tower once a sample.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_pipeline.model.freeze import num_numbers
from llava_pipeline.training.samples import NO_PICTURE, Samples


def useful_flops(model: LlavaForConditionalGeneration, samples: Samples, indices: Iterable[int]) -> float:
    """Floating-point operations of these samples as the plain model needs them, without padding; a picture counts once
    for samples about it that stand side by side."""
    config = model.config.text_config
    body = sum(factor(p) * num_numbers(p) for layer in model.model.language_model.layers for p in layer.parameters())
    head = factor(model.lm_head.weight) * model.lm_head.weight.numel()
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    places = int(model.config.image_seq_length)
    total, before = 0.0, NO_PICTURE
    for k in indices:
        image = int(samples.image[k])
        shown = image not in (NO_PICTURE, before)
        tokens, supervised = samples.num_tokens([k]), samples.num_supervised([k])
        if image == before != NO_PICTURE:
            tokens -= places
        before = image
        attention = 2 * config.hidden_size * config.num_hidden_layers * tokens**2
        total += body * tokens + 3 * attention + head * supervised
        if shown:
            total += 6 * projector * places + 2 * tower * (places + 1)
    return total


def factor(weight: Tensor) -> int:
    """Operations per number of a weight and token: forward, the gradient to the input and, where it learns, its own."""
    return 6 if weight.requires_grad else 4
