"""Causal attention over samples that lie one behind the other without padding, all behind one shared prefix.

No sample sees another. Two ways of the same result: ``over_grid`` lays the samples out as rows of a grid, where the
padding that appears costs attention alone (two hundredths of the work); ``over_sequence`` leaves them packed, on cards
whose flash attention takes sequences of any length (compute capability 8.0 and later, torch 2.12 and later).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llava_pipeline.training.frozen import spread

KeysValues = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, KeysValues | None], Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where B samples of T tokens in all lie: (B, L) row of every cell, (T,) cell of every row, and what may be seen.

    ``mask`` (L, prefix + L) is None where plain causality says it all.
    """

    lengths: tuple[int, ...]
    num_prefix: int
    grid: Tensor
    back: Tensor
    mask: Tensor | None


def lay_out(lengths: tuple[int, ...], num_prefix: int, device: torch.device) -> Layout:
    """The layout of samples of these lengths, each behind ``num_prefix`` shared tokens."""
    longest = max(lengths)
    starts = [0, *accumulate(lengths)][:-1]
    column = torch.arange(longest)
    inside = column < torch.tensor(lengths)[:, None]
    grid = torch.where(inside, torch.tensor(starts)[:, None] + column, 0)
    back = inside.flatten().nonzero()[:, 0]
    mask = None
    if num_prefix:
        seen = column[:, None] + num_prefix >= torch.arange(num_prefix + longest)
        mask = seen.to(device)
    return Layout(lengths, num_prefix, grid.to(device), back.to(device), mask)


def over_grid(layout: Layout) -> Attend:
    """Attention by torch's scaled dot product over the grid. q is (T, H, d), k and v are (T, H_kv, d)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: KeysValues | None) -> Tensor:
        query, key, value = (spread(x, layout.grid, layout.back).transpose(1, 2) for x in (q, k, v))
        if prefix is not None:
            key, value = (_behind(one, x) for one, x in zip(prefix, (key, value), strict=True))
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=layout.mask, is_causal=layout.mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1).index_select(0, layout.back)

    return attend


def _behind(prefix: Tensor, x: Tensor) -> Tensor:
    """(P, H, d) once before every row of (B, H, L, d)."""
    return torch.cat([prefix.transpose(0, 1).expand(len(x), -1, -1, -1).to(x.dtype), x], 2)


def over_sequence(layout: Layout) -> Attend:
    """Attention by ``torch.nn.attention.varlen``: nothing is padded."""
    from torch.nn.attention.varlen import varlen_attn

    device, count = layout.back.device, len(layout.lengths)
    ends = torch.tensor([0, *accumulate(layout.lengths)], dtype=torch.int32, device=device)
    key_ends = ends + layout.num_prefix * torch.arange(count + 1, dtype=torch.int32, device=device)
    longest = max(layout.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: KeysValues | None) -> Tensor:
        if prefix is not None:
            k, v = (_interleave(one.to(x.dtype), x, layout.lengths) for one, x in zip(prefix, (k, v), strict=True))
        out = varlen_attn(
            q, k, v, ends, key_ends, longest, longest + layout.num_prefix,
            window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out if isinstance(out, Tensor) else out[0]

    return attend


def _interleave(prefix: Tensor, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([part for sample in x.split(lengths) for part in (prefix, sample)])


@cache
def has_varlen(device: torch.device) -> bool:
    """Whether a device and this torch have attention over sequences of any length, shared heads included."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def attention(layout: Layout, dtype: torch.dtype) -> Attend:
    """The better of the two for a device and a precision."""
    packed = has_varlen(layout.back.device) and dtype in (torch.float16, torch.bfloat16)
    return over_sequence(layout) if packed else over_grid(layout)
