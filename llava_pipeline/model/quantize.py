"""A frozen language model in 4 bits, for a LoRA beside it (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava_pipeline.errors import SpecError


def to_nf4(language_model: Any, dtype: torch.dtype) -> None:
    """Hold every matrix of its layers in NF4; products are computed in ``dtype``.

    Done on the CPU, before the model moves: a card need never hold it in 16 bits.

    Raises:
        SpecError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]  # its own way to import them
    except ImportError as error:
        raise SpecError(
            "training.lora.quantize=nf4 needs bitsandbytes; pip install 'llava-pipeline[qlora]', or leave it unset"
        ) from error
    for module in list(language_model.layers.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                sizes = layer.in_features, layer.out_features, layer.bias is not None
                small: Any = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")  # type: ignore[no-untyped-call]
                small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                small.bias = layer.bias
                setattr(module, name, small.to("cpu"))  # where it becomes 4 bits


def is_quantized(language_model: Any) -> bool:
    """Whether its matrices are no longer numbers to compute with."""
    return any(not parameter.dtype.is_floating_point for parameter in language_model.parameters())
