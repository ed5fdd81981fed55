"""How fast a device can multiply."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llava_pipeline.model.memory import adapter_parameters, head_size, matrices
from llava_pipeline.spec import TrainingSpec


def measured_flops(device: torch.device, dtype: torch.dtype, side: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second of a square matrix product on this device, in this precision."""
    if device.type == "cuda":
        side = 4096
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    (matrix @ matrix).sum().item()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        for _ in range(4 if device.type == "cuda" else 1):
            product = matrix @ matrix
            count += 1
        product[0, 0].item()
    return count * 2 * side**3 / (time.monotonic() - started)


PROBE_FLOPS = 2e10  # of a probe on a CPU: a third of a second
PROBES = 3
clock = time.monotonic  # replaced where others' work on this machine must not count


def layer_flops(text: Any, spec: TrainingSpec, tokens: int, in_sample: int, attended: int, dtype: torch.dtype) -> float:
    """Useful operations per second of a step through one layer of a language model on this CPU.

    It runs what a step runs in every layer, forward and back, with random numbers of the layer's own shapes: products,
    norms, attention, and the adapter or the weights' own gradients where they learn. A sample adds ``in_sample`` tokens
    and has ``attended``, of which the others are another sample's too.
    A square product alone tells a small model's speed too high and says nothing of what lies between the products.
    """
    mode = spec.language_mode
    each = layer_operations(text, spec, 1)
    count = max(1, min(tokens, int(PROBE_FLOPS / each)) // in_sample)
    total = count * in_sample
    head, heads, keys = head_size(text), text.num_attention_heads, text.num_key_value_heads or text.num_attention_heads
    wide, inner, queries = text.hidden_size, text.intermediate_size, text.num_attention_heads * head_size(text)
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int, learns: bool) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).mul_(0.02).requires_grad_(learns)

    whole = mode == "full"
    shapes = {
        "qkv": (wide, queries + 2 * keys * head),
        "out": (queries, wide),
        "up": (wide, 2 * inner),
        "down": (inner, wide),
    }
    weights = {name: made(b, a, learns=whole) for name, (a, b) in shapes.items()}
    rank = spec.lora.rank if mode == "lora" else 0
    folded = {"qkv": 3, "up": 2}  # matrices of one product, each with thin ones of its own that are folded as well
    thin = {
        name: (made(rank * folded.get(name, 1), a, learns=True), made(b, rank * folded.get(name, 1), learns=True))
        for name, (a, b) in shapes.items()
    }

    def product(x: Tensor, name: str) -> Tensor:
        out = functional.linear(x, weights[name])
        return torch.addmm(out, functional.linear(x, thin[name][0]), thin[name][1].T) if rank else out

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if in_grid:
            whole = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != keys)
            return whole[:, :, -in_sample:]
        scores = q.unflatten(1, (keys, -1)).flatten(2, 3).flatten(0, 1) @ k.flatten(0, 1).transpose(1, 2)
        odds = (scores.view(count, heads, in_sample, attended) + hidden).softmax(-1)
        out: Tensor = odds.view(count * keys, -1, attended) @ v.flatten(0, 1)
        return out.view(count, heads, in_sample, head)

    in_grid = attended == in_sample or dtype != torch.float32  # as the step chooses
    hidden = torch.full((in_sample, attended), -torch.inf, dtype=dtype).triu(attended - in_sample + 1)
    own = torch.arange(total).unflatten(0, (count, in_sample))
    cells = torch.cat([own[:, :1].expand(-1, attended - in_sample), own], 1)

    def step() -> None:
        x = torch.ones(total, wide, requires_grad=True)
        normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        q, k, v = product(normed, "qkv").split([queries, keys * head, keys * head], -1)
        q, k, v = (
            (part.unflatten(-1, (-1, head)) * (1.0 + turned))[rows].transpose(1, 2)
            for turned, (part, rows) in enumerate(((q, cells if in_grid else own), (k, cells), (v, cells)))
        )
        y = x + product(attention(q, k, v).transpose(1, 2).reshape(total, queries), "out")
        normed = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
        gate, up = product(normed, "up").split([inner, inner], -1)
        (y + product(functional.silu(gate) * up, "down")).sum().backward()

    step()
    taken = []
    for _ in range(PROBES):
        started = clock()
        step()
        taken.append(clock() - started)
    return total * each / statistics.median(taken)


def layer_operations(text: Any, spec: TrainingSpec, tokens: int) -> float:
    """Operations of one layer's products for so many tokens, forward and back: the gradient with respect to the input
    always, with respect to the weights where they learn."""
    size = sum(a * b for a, b in matrices(text).values())
    adapter = adapter_parameters(text, spec) / text.num_hidden_layers
    return float(tokens * ((6 if spec.language_mode == "full" else 4) * size + 6 * adapter))
