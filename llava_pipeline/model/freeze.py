"""Freezing as a visible act: what is frozen, what is trainable, and a digest that proves it stayed so."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

PROJECTOR = "multi_modal_projector."


def freeze_backbones(model: nn.Module) -> None:
    """Only the projector keeps its gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(PROJECTOR in name)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(total, trainable) parameters of each part. Tied weights count once."""
    counts = {"vision tower": [0, 0], "projector": [0, 0], "language model": [0, 0]}
    for name, parameter in model.named_parameters():
        part = "projector" if PROJECTOR in name else "vision tower" if "vision_tower." in name else "language model"
        counts[part][0] += parameter.numel()
        counts[part][1] += parameter.numel() if parameter.requires_grad else 0
    return {part: (total, trainable) for part, (total, trainable) in counts.items()}


def frozen_digest(model: nn.Module) -> str:
    """sha256 over names and bytes of every frozen parameter, in name order."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if PROJECTOR not in name:
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
            data = parameter.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            digest.update(data.numpy().data)
    return digest.hexdigest()
