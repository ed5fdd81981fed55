"""Freezing as a visible act: what is frozen, what learns, and a digest that proves that the rest stayed as it was."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from llava_pipeline.model import adapter
from llava_pipeline.spec import TrainingSpec

PROJECTOR = "multi_modal_projector."
LANGUAGE_MODEL = "language_model."


def freeze_backbones(model: nn.Module) -> None:
    """Only the projector keeps its gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PROJECTOR in name)


def let_learn(model: Any, spec: TrainingSpec) -> None:
    """Give those parts a gradient that learn, and a language model in mode lora its adapter, unless it has one.

    Raises:
        IncompatibleParts: the adapter finds no place, or is of another rank than the one that is there.
    """
    language_model = model.model.language_model
    if spec.language_mode == "lora":
        if not adapter.layers(language_model):
            adapter.inject(language_model, spec.lora, spec.seed)
        adapter.check(language_model, spec.lora)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learned(model, spec).values():
        parameter.requires_grad_(True)


def learned(model: Any, spec: TrainingSpec) -> dict[str, nn.Parameter]:
    """What training changes, by its name in what it leaves behind."""
    found: dict[str, nn.Parameter] = {}
    if spec.projector.learns:
        found |= dict(model.model.multi_modal_projector.named_parameters())
    if spec.language_mode == "lora":
        found |= adapter.parameters(model.model.language_model)
    elif spec.language_mode == "full":
        found |= full(model)
    return found


def is_of_language_model(name: str) -> bool:
    """Whether what is learned under this name is the language model's, in an adapter or whole, not the projector's."""
    return name.startswith((adapter.PREFIX, LANGUAGE_MODEL))


def full(model: Any) -> dict[str, nn.Parameter]:
    """All weights of the language model and, unless it is tied to the embeddings, its head."""
    found = {LANGUAGE_MODEL + name: value for name, value in model.model.language_model.named_parameters()}
    if model.lm_head.weight is not model.model.language_model.embed_tokens.weight:
        found[f"{LANGUAGE_MODEL}lm_head.weight"] = model.lm_head.weight
    return found


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(total, trainable) parameters of each part. Tied weights count once."""
    counts = {"vision tower": [0, 0], "projector": [0, 0], "language model": [0, 0]}
    for name, parameter in model.named_parameters():
        part = "projector" if PROJECTOR in name else "vision tower" if "vision_tower." in name else "language model"
        counts[part][0] += num_numbers(parameter)
        counts[part][1] += num_numbers(parameter) if parameter.requires_grad else 0
    return {part: (total, trainable) for part, (total, trainable) in counts.items()}


def num_numbers(parameter: Any) -> int:
    """Numbers in a parameter, in 4 bits too, where two lie in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if packed is None else packed.shape.numel())


def frozen_digest(model: nn.Module) -> str:
    """sha256 over names and bytes of every frozen parameter, in name order. The projector and an adapter are none."""
    digest = hashlib.sha256()
    named = {name.replace(".base_layer.", "."): value for name, value in model.named_parameters() if _is_base(name)}
    for name, parameter in sorted(named.items()):
        if parameter.requires_grad:  # of a language model that is trained whole
            continue
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        data = parameter.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _is_base(name: str) -> bool:
    return PROJECTOR not in name and ".lora_" not in name
