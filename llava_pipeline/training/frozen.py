"""The operations of a frozen Llama, each with a backward pass that knows there is nothing to learn inside it.

torch's own keep more than is needed (a norm keeps four tensors, SwiGLU three, a cast weight its copy). Here what runs
between layers is float32, matrix products run in the precision of what comes in, and weights are cast on the way in
and again on the way back, so that a checkpoint stored in 16 bits needs no second copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 256


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * scale) * weight.float(), scale


def _norm_back(gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    inner = gradient.float() * weight.float()
    along = (inner * x).mean(-1, keepdim=True) * scale.pow(3)
    return inner * scale - x * along


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gate_back(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate) * gradient


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@dataclass(frozen=True)
class Kernels:
    """What is computed element by element, so that a compiler may fuse it."""

    norm: Callable[..., tuple[Tensor, Tensor]] = _norm
    norm_back: Callable[..., Tensor] = _norm_back
    gate: Callable[..., Tensor] = _gate
    gate_back: Callable[..., tuple[Tensor, Tensor]] = _gate_back
    turn: Callable[..., Tensor] = _turn


EAGER = Kernels()


def compiled() -> Kernels:
    """The same, fused by ``torch.compile``, for any number of tokens."""
    fused = {name: torch.compile(getattr(EAGER, name), dynamic=True) for name in Kernels.__dataclass_fields__}
    return Kernels(**fused)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.to(gradient.dtype), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(T, in) times a frozen (out, in) weight of any precision: (T, out) in the precision of ``x``."""
    out: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
        thin = F.linear(x, first.to(x.dtype))
        ctx.save_for_backward(x, thin, weight, first, second)
        return F.linear(x, weight.to(x.dtype)).addmm_(thin, second.to(x.dtype).T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, weight, first, second = ctx.saved_tensors
        back = gradient @ second.to(gradient.dtype)
        to_x = (gradient @ weight.to(gradient.dtype)).addmm_(back, first.to(gradient.dtype))
        return to_x, None, (back.T @ x).to(first.dtype), (gradient.T @ thin).to(second.dtype)


def adapted_linear(x: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(T, in) times a frozen (out, in) weight and a difference of low rank beside it, ``second @ first``: (T, out).

    ``first`` (R, in) and ``second`` (out, R) are learned, in float32; products are in the precision of ``x``.
    """
    out: Tensor = _AdaptedLinear.apply(x, weight, first, second)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kernels: Kernels) -> Tensor:
        out, scale = kernels.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.kernels = kernels
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.kernels.norm_back(gradient, *ctx.saved_tensors), None, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, kernels: Kernels = EAGER) -> Tensor:
    """Root-mean-square norm of float32 (T, D), as ``LlamaRMSNorm``; the result in ``dtype``."""
    out: Tensor = _RmsNorm.apply(x, weight, eps, dtype, kernels)  # type: ignore[no-untyped-call]
    return out


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.gate(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.gate_back(gradient, *ctx.saved_tensors), None


def swiglu(gate: Tensor, up: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """silu(gate) * up, both (T, F)."""
    out: Tensor = _SwiGlu.apply(gate, up, kernels)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.kernels.turn(gradient, cos, -sin), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """Rotary positions: (T, H, d) turned by angles whose ``cos`` and ``sin`` are (T, 1, d / 2)."""
    out: Tensor = _Rotate.apply(x, cos, sin, kernels)  # type: ignore[no-untyped-call]
    return out


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, again: Tensor) -> Tensor:
        ctx.save_for_backward(back, again, index[again])
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back, again, rows = ctx.saved_tensors
        own = gradient.index_select(0, back)
        return own.index_add_(0, rows, gradient.index_select(0, again)) if len(again) else own, None, None, None


def spread(x: Tensor, grid: Tensor, back: Tensor, again: Tensor) -> Tensor:
    """Packed rows (T, ...) into a grid (B, L, ...). ``back`` (T,) is the first cell of every row, ``again`` are the
    cells that repeat one which is there before. All others show row 0, and give it no gradient."""
    out: Tensor = _Move.apply(x, grid.flatten(), back, again)  # type: ignore[no-untyped-call]
    cells: Tensor = out.unflatten(0, grid.shape)
    return cells


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
        weight = weight.to(hidden.dtype)
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            wanted, row = targets[rows], torch.arange(len(targets[rows]), device=targets.device)
            logits = (weight @ hidden[rows].T).float()  # (V, rows): faster on a CPU than (rows, V)
            log_total = logits.logsumexp(0)
            losses[rows] = log_total - logits[wanted, row]
            if gradient is not None:
                of_logits = logits.sub_(log_total).exp_()
                of_logits[wanted, row] -= 1
                gradient[rows] = of_logits.mul_(scale).T.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return own * (gradient / ctx.scale)[:, None].to(own.dtype), None, None, None


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """(S,) cross entropies of (S, D) hidden states under a frozen (V, D) head, without ever holding (S, V) logits.

    The gradient is made on the way forward, chunk by chunk, as Liger's fused cross entropy does (arXiv 2410.10989).
    ``scale`` is what each loss will be multiplied by before ``backward``: in 16 bits it keeps small gradients alive.
    """
    out: Tensor = _TokenLoss.apply(hidden, weight, targets, scale)  # type: ignore[no-untyped-call]
    return out
