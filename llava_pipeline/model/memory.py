"""How much memory training takes, from configurations alone: what ``plan`` tells and a run is measured against."""

from __future__ import annotations

from typing import Any

import torch

PROCESS_BYTES = 450_000_000  # a process that has loaded torch and transformers, measured
CPU_ACTIVATION_BYTES = 1_500_000_000  # that a pass on a CPU is sized for: larger ones are hardly faster
SHARE_OF_FREE_MEMORY = 0.6  # of a card, that activations may take
MOST_TOKENS, FEWEST_TOKENS = 1 << 15, 256


def bytes_per_token(text: Any, itemsize: int) -> int:
    """What one packed token leaves for the backward pass in all layers of a Llama: the residual stream twice in
    float32; rotated and unrotated heads, what attention gives, gate and up in the precision of products."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = (3 * text.num_attention_heads + 3 * (text.num_key_value_heads or text.num_attention_heads)) * head
    per_layer = 8 * text.hidden_size + itemsize * (heads + 2 * text.intermediate_size)
    passing = 6 * itemsize * text.intermediate_size  # of the layer at work
    return int(text.num_hidden_layers * per_layer + passing)


def tokens_per_pass(text: Any, itemsize: int, device: torch.device) -> int:
    """Tokens of one pass that a device has room for, by what is free on it now."""
    room = float(CPU_ACTIVATION_BYTES)
    if device.type == "cuda":
        room = SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]
    return int(min(MOST_TOKENS, max(FEWEST_TOKENS, room // bytes_per_token(text, itemsize))))


def training_bytes(
    text: Any, counts: dict[str, int], tokens: int, itemsize: int, stored_itemsize: int, on_cpu: bool
) -> int:
    """Bytes at the peak of training, on a card without, on a CPU with the process itself.

    Args:
        text: configuration of the language model.
        counts: parameters of ``vision tower``, ``projector`` and ``language model``.
        tokens: of one pass.
        itemsize: bytes of a number in matrix products.
        stored_itemsize: bytes of a number of the language model at rest.
        on_cpu: whether the process's own memory counts.
    """
    frozen = counts["language model"] * stored_itemsize + counts["vision tower"] * itemsize
    learned = counts["projector"] * 20  # weight, gradient and its two means, and a copy on the way
    layer = 0 if itemsize == stored_itemsize else 3 * text.hidden_size * text.intermediate_size * itemsize
    head = 256 * text.vocab_size * 12 + (0 if itemsize == stored_itemsize else text.vocab_size * text.hidden_size * 4)
    activations = tokens * bytes_per_token(text, itemsize)
    return int((PROCESS_BYTES if on_cpu else 0) + frozen + learned + layer + head + activations)
