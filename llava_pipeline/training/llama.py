"""A frozen Llama over packed tokens: embeddings in, hidden states out where they are wanted, gradient to the input, and
to an adapter where it has one.

It computes what ``LlamaModel`` of transformers computes (``tests/training/test_step.py`` holds it to that), on the same
parameters, which it folds in place: q, k and v in one matrix, gate and up in another. Mistral, Qwen2 and Qwen3 are
Llamas here: what they add are biases, and norms of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llava_pipeline.model import adapter
from llava_pipeline.spec import StepSpec
from llava_pipeline.training import frozen
from llava_pipeline.training.attention import Attend, KeysValues, attention, lay_out

WORTH_HALVING_BYTES = 500_000_000
KINDS = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # whose angles depend on a token's position alone


def can_run(config: Any) -> bool:
    """Whether a language model of this configuration is one that this file knows how to compute."""
    return bool(
        config.model_type in KINDS
        and config.hidden_act == "silu"
        and getattr(config, "sliding_window", None) is None
        and config.rope_parameters["rope_type"] in ROPE_TYPES
    )


def learns_whole(model: Any) -> bool:
    """Whether the weights themselves are learned, which this file holds to be frozen."""
    return bool(model.get_input_embeddings().weight.requires_grad)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the tokens that every sample begins with leave behind: (P, H_kv, d) keys and values of each layer, and the
    log-probabilities (P, V) of the token after each. None of it depends on the projector."""

    layers: list[KeysValues]
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.log_probs)


class Product:
    """Matrices that take the same input: frozen, folded into one, with what an adapter adds to some of them.

    The adapter's thin matrices are folded too: a product by itself is so thin that a CPU gets a fifth of its speed.
    """

    def __init__(self, layers: list[Any], fold: bool) -> None:
        self.sizes = [len(layer.weight) for layer in layers]
        self.biases = [layer.bias for layer in layers]
        groups = [layers] if fold else [[layer] for layer in layers]
        self.groups = [(_folded(group), group if any(map(_has_adapter, group)) else []) for group in groups]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """(T, in) to (T, out) of each."""
        parts = [
            frozen.adapted_linear(x, weight, *_thin(layers)) if layers else frozen.linear(x, weight)
            for weight, layers in self.groups
        ]
        outs = parts if len(parts) == len(self.sizes) else parts[0].split(self.sizes, -1)
        return tuple(out if b is None else out + b.to(out.dtype) for out, b in zip(outs, self.biases, strict=True))


def _has_adapter(layer: Any) -> bool:
    return adapter.ONE in getattr(layer, "lora_A", ())


def _thin(layers: list[Any]) -> tuple[Tensor, Tensor]:
    """What an adapter adds to folded matrices: its (R, in) matrices one below the other, and as blocks of one (out, R)
    matrix those that bring each back, scaled. A matrix without one has no columns there."""
    first = [layer.lora_A[adapter.ONE].weight for layer in layers if _has_adapter(layer)]
    second = [
        layer.lora_B[adapter.ONE].weight * float(layer.scaling[adapter.ONE])
        if _has_adapter(layer)
        else first[0].new_zeros(len(layer.weight), 0)
        for layer in layers
    ]
    return torch.cat(first), torch.block_diag(*second)


class Layer:
    """The weights of one decoder layer."""

    def __init__(self, layer: Any, fold: bool) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.head_norms = [getattr(attn, name).weight if hasattr(attn, name) else None for name in ("q_norm", "k_norm")]
        self.qkv = Product([attn.q_proj, attn.k_proj, attn.v_proj], fold)
        self.gate_up = Product([mlp.gate_proj, mlp.up_proj], fold)
        self.out, self.down = Product([attn.o_proj], fold), Product([mlp.down_proj], fold)


def _folded(layers: list[Any]) -> Tensor:
    """The weights as one matrix whose rows they then are, so that nothing is held twice."""
    if len(layers) == 1:
        only: Tensor = layers[0].weight.data
        return only
    whole = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part  # peft's layers pass on the frozen matrix that they stand around
    return whole


class FrozenLlama:
    """``LlamaModel`` and its head, for training something in front of it.

    Args:
        language_model: transformers' ``LlamaModel``; its parameters are used in place.
        head: (V, D) weight of the language-model head.
        dtype: of matrix products; between layers everything is float32.
    """

    def __init__(self, language_model: Any, head: Tensor, dtype: torch.dtype, spec: StepSpec) -> None:
        config = language_model.config
        self.embeddings, self.head, self.rotary = language_model.embed_tokens.weight, head, language_model.rotary_emb
        self.final_norm, self.eps, self.dtype, self.spec = language_model.norm.weight, config.rms_norm_eps, dtype, spec
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kernels = frozen.compiled() if spec.compile else frozen.EAGER
        self.layers = [Layer(layer, spec.fold) for layer in language_model.layers]
        self.learns = any(parameter.requires_grad for parameter in language_model.parameters())

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T,) token ids to float32 (T, D)."""
        return F.embedding(input_ids, self.embeddings).float()

    def hidden(self, x: Tensor, positions: Tensor, attend: Attend, prefix: Prefix | None, rows: Tensor) -> Tensor:
        """Normed hidden states (S, D) of ``rows`` of packed embeddings x (T, D), in the model's precision.

        The last layer's projections and feed-forward run for those rows alone: nothing else reads them.
        """
        cos, sin = self.angles(x, positions)
        for number, layer in enumerate(self.layers):

            def through(x: Tensor, layer: Layer = layer, number: int = number) -> Tensor:
                q, k, v = self.heads(layer, x, cos, sin)
                seen = attend(q, k, v, prefix.layers[number] if prefix else None).flatten(1)
                if self.spec.select and layer is self.layers[-1]:
                    seen, x = seen[rows], x[rows]
                return self.rest(layer, x, seen)

            x = checkpoint(through, x, use_reentrant=False) if self.spec.recompute else through(x)
        if not self.spec.select:
            x = x[rows]
        return self.norm(x, self.final_norm)

    @torch.no_grad()
    def prefix(self, input_ids: Tensor) -> Prefix:
        """Keys, values and predictions of tokens (P,) that stand before everything that is learned."""
        x = self.embed(input_ids)
        attend = attention(lay_out((len(x),), 0, x.device), self.dtype)
        cos, sin = self.angles(x, torch.arange(len(x), device=x.device))
        kept = []
        for layer in self.layers:
            q, k, v = self.heads(layer, x, cos, sin)
            kept.append((k, v))
            x = self.rest(layer, x, attend(q, k, v, None).flatten(1))
        hidden = self.norm(x, self.final_norm)
        return Prefix(kept, frozen.linear(hidden, self.head).float().log_softmax(-1))

    def angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 1, d / 2) cosines and sines; transformers repeats them for the second half of every head."""
        cos, sin = self.rotary(x, positions[None])
        half = self.head_dim // 2
        return cos[0, :, None, :half].to(self.dtype), sin[0, :, None, :half].to(self.dtype)

    def heads(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (T, H, d), rotated keys and values (T, H_kv, d)."""
        q, k, v = layer.qkv(self.norm(x, layer.norms[0]))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        q, k = (
            part if weight is None else self.norm(part.float(), weight)
            for part, weight in zip((q, k), layer.head_norms, strict=True)
        )  # fmt: skip
        if not self.spec.lean:
            return frozen.EAGER.turn(q, cos, sin), frozen.EAGER.turn(k, cos, sin), v
        return frozen.rotate(q, cos, sin, self.kernels), frozen.rotate(k, cos, sin, self.kernels), v

    def rest(self, layer: Layer, x: Tensor, seen: Tensor) -> Tensor:
        """The residual stream after the attention's output projection and the feed-forward."""
        x = x + layer.out(seen)[0]
        gate, up = layer.gate_up(self.norm(x, layer.norms[1]))
        inner = frozen.swiglu(gate, up, self.kernels) if self.spec.lean else frozen.EAGER.gate(gate, up)
        return x + layer.down(inner)[0]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm of float32, in the model's precision."""
        if self.spec.lean:
            return frozen.rms_norm(x, weight, self.eps, self.dtype, self.kernels)
        return frozen.EAGER.norm(x, weight, self.eps)[0].to(self.dtype)

    def losses(self, hidden: Tensor, targets: Tensor, scale: float) -> Tensor:
        """(S,) cross entropies of the tokens that (S, D) hidden states should predict."""
        if self.spec.lean:
            return frozen.token_losses(hidden, self.head, targets, scale)
        return F.cross_entropy(frozen.linear(hidden, self.head).float(), targets, reduction="none")


def halve(language_model: nn.Module, head: nn.Module) -> torch.dtype | None:
    """Store weights that 16 bits hold without loss in 16 bits, where that saves much; products cast them back.

    TinyLlama comes in bfloat16: float32 products from its weights need half the memory, and no number changes.
    Returns the precision they are kept in, or None where they stay.
    """
    weights = [*language_model.parameters(), *head.parameters()]
    if sum(weight.nbytes for weight in weights) < 2 * WORTH_HALVING_BYTES:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.data.to(dtype).to(weight.dtype), weight.data) for weight in weights):
            for weight in weights:
                weight.data = weight.data.to(dtype)
            return dtype
    return None
