"""Causal attention over samples that lie one behind the other without padding, all behind one shared prefix.

No sample sees another; one may share with an earlier one the tokens that both begin with. Four ways to the same
result: ``over_grid`` lays the samples out as rows of a grid, whose padding costs attention alone; ``over_segments``
asks for nothing twice where samples share, which pays on a CPU; ``one_by_one`` pads nothing and calls once a sample,
which pays there where samples are long and of different lengths; ``over_sequence`` pads nothing and calls once, on
cards whose flash attention takes sequences of any length (compute capability 8.0 and later, torch 2.12 and later).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llava_pipeline.training.frozen import spread

LONG, MUCH_OF_GRID = 128, 0.8
FEW_WEIGHTS = 128  # of a row and a head, that a layer keeps where products are plain: a fifth of the rest, or less
KeysValues = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, KeysValues | None], Tensor]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows side by side, and those that they see before themselves."""

    first: int
    length: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where B samples of T tokens in all lie: (B, L) row of every cell, (T,) cell of every row, and the cells of rows
    that another sample has too. ``segments`` has the samples, those whose beginning others share in two."""

    lengths: tuple[int, ...]
    segments: tuple[Segment, ...]
    num_prefix: int
    grid: Tensor
    back: Tensor
    again: Tensor


def lay_out(
    lengths: tuple[int, ...], num_prefix: int, device: torch.device, shared: tuple[tuple[int, int], ...] = ()
) -> Layout:
    """The layout of samples with so many tokens of their own, each behind ``num_prefix`` tokens that all share and,
    where told, behind some of an earlier sample: ``shared`` has the first row of those and their number."""
    shared = shared or ((0, 0),) * len(lengths)
    own = torch.tensor(lengths)[:, None]
    start, count = torch.tensor(shared)[:, :, None].unbind(1)
    first = torch.tensor([0, *accumulate(lengths)][:-1])[:, None]
    column = torch.arange(int((own + count).max()))
    before, inside = column < count, column < count + own
    grid = torch.where(before, start + column, torch.where(inside, first + column - count, 0))
    back, again = ((cells.flatten().nonzero()[:, 0]).to(device) for cells in (inside & ~before, before))
    return Layout(lengths, segments_of(lengths, shared), num_prefix, grid.to(device), back, again)


def segments_of(lengths: tuple[int, ...], shared: tuple[tuple[int, int], ...]) -> tuple[Segment, ...]:
    """The samples, those whose beginning others share in two: so that the beginning is asked once."""
    most: dict[int, int] = {}
    for start, count in shared:
        most[start] = max(most.get(start, 0), count)
    segments, first = [], 0
    for length, (start, count) in zip(lengths, shared, strict=True):
        ahead = 0 if count else most.get(first, 0)
        if ahead:
            segments.append(Segment(first, ahead, first, 0))
            start, count = first, ahead
        segments.append(Segment(first + ahead, length - ahead, start, count))
        first += length
    return tuple(segments)


def over_grid(layout: Layout) -> Attend:
    """Attention over the grid in one call. q is (T, H, d), k and v are (T, H_kv, d)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: KeysValues | None) -> Tensor:
        query, key, value = (spread(x, layout.grid, layout.back, layout.again) for x in (q, k, v))
        return _causal(query, key, value, prefix).flatten(0, 1).index_select(0, layout.back)

    return attend


def one_by_one(layout: Layout) -> Attend:
    """Attention of one sample after the other."""

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: KeysValues | None) -> Tensor:
        samples = zip(*(x.split(layout.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_causal(a[None], b[None], c[None], prefix)[0] for a, b, c in samples])

    return attend


def keeps_little(layout: Layout) -> bool:
    """Whether the weights that ``over_segments`` keeps for the backward pass are few for its tokens."""
    behind = [segment for segment in layout.segments if segment.count]
    longest, widest = max(one.length for one in behind), max(one.count + one.length for one in behind)
    return len(behind) * longest * widest <= FEW_WEIGHTS * sum(layout.lengths)


class Block:
    """Segments padded to one length: the rows of their queries (B, Q) and of the keys that they see (B, K), first what
    they share and then their own; ``bias`` (B, Q, K) is 0 where a query sees a key, else minus infinity."""

    def __init__(self, segments: list[Segment], device: torch.device) -> None:
        first, length, start, count = torch.tensor([astuple(segment) for segment in segments])[:, :, None].unbind(1)
        query, key = torch.arange(int(length.max())), torch.arange(int((count + length).max()))
        asked, again = query < length, key < count
        own = ~again & (key < count + length)
        queries = torch.where(asked, first + query, 0)
        keys = torch.where(again, start + key, torch.where(own, first + key - count, 0))
        bias = torch.where(key > query[:, None] + count[:, :, None], -torch.inf, 0.0)
        self.queries, self.keys, self.asked, self.own, self.again, self.bias = (
            cells.to(device) for cells in (queries, keys, asked, own, again, bias)
        )


def over_segments(layout: Layout) -> Attend:
    """Attention in two calls: of what is shared, or shares nothing, and of what comes behind it."""
    device = layout.back.device
    alone, behind = (
        Block([segment for segment in layout.segments if (segment.count > 0) == sees], device) for sees in (False, True)
    )
    queries, keys, asked, own, again = (
        torch.cat([getattr(block, name).flatten() for block in (alone, behind)])
        for name in ("queries", "keys", "asked", "own", "again")
    )
    back, key_back = (cells.nonzero()[:, 0][rows[cells].argsort()] for cells, rows in ((asked, queries), (own, keys)))
    again, none = again.nonzero()[:, 0], back[:0]
    at, key_at = alone.queries.numel(), alone.keys.numel()

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: KeysValues | None) -> Tensor:
        query, key, value = spread(q, queries, back, none), *(spread(x, keys, key_back, again) for x in (k, v))
        own, own_key, own_value = (x[:key_at].unflatten(0, alone.keys.shape) for x in (query, key, value))
        key, value = (x[key_at:].unflatten(0, behind.keys.shape) for x in (key, value))
        first = _causal(own, own_key, own_value, prefix)
        second = _masked(query[at:].unflatten(0, behind.queries.shape), key, value, behind.bias, prefix)
        return torch.cat([first.flatten(0, 1), second.flatten(0, 1)]).index_select(0, back)

    return attend


def _masked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, prefix: KeysValues | None) -> Tensor:
    """(B, Q, H, d) of queries over the prefix and over keys and values (B, K, H_kv, d), where the (B, Q, K) bias is 0.

    By plain products, with the queries that share a key below each other: for few queries torch's own attention, which
    is made for long rows and takes a mask slowly, needs half as long again on a CPU.
    """
    if prefix is not None:
        key, value = (_behind(one, x) for one, x in zip(prefix, (key, value), strict=True))
        bias = torch.nn.functional.pad(bias, (len(prefix[0]), 0))
    (num, asked, heads, size), kept = query.shape, key.shape[2]
    query = (query * size**-0.5).unflatten(2, (kept, -1)).permute(0, 2, 3, 1, 4).reshape(num * kept, -1, size)
    key, value = (x.permute(0, 2, *order).flatten(0, 1) for x, order in ((key, (3, 1)), (value, (1, 3))))
    scores = torch.bmm(query, key).view(num, heads, asked, -1)
    weights = (scores + bias[:, None]).softmax(-1).view(num * kept, -1, scores.shape[-1])
    return torch.bmm(weights, value).view(num, heads, asked, size).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, prefix: KeysValues | None) -> Tensor:
    """(B, L, H, d) of queries over keys and values (B, L, H_kv, d), all of which see the prefix.

    The prefix gets queries too, of zeros, and what comes of them is dropped: plain causality needs no mask, and torch
    is up to four times as fast without one on a CPU.
    """
    num_prefix = 0
    if prefix is not None:
        num_prefix = len(prefix[0])
        key, value = (_behind(one, x) for one, x in zip(prefix, (key, value), strict=True))
        query = torch.nn.functional.pad(query, (0, 0, 0, 0, num_prefix, 0))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    shared = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2)[:, num_prefix:]


def _behind(prefix: Tensor, x: Tensor) -> Tensor:
    """(P, H, d) once before every row of (B, L, H, d)."""
    return torch.cat([prefix.expand(len(x), -1, -1, -1).to(x.dtype), x], 1)


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
    """The best of the four for a device, a precision and the samples' lengths."""
    device = layout.back.device
    if len(layout.again):  # the others have no room for what samples share
        plain = device.type == "cpu" and dtype == torch.float32 and keeps_little(layout)
        return over_segments(layout) if plain else over_grid(layout)
    if has_varlen(device) and dtype in (torch.float16, torch.bfloat16):
        return over_sequence(layout)
    longest = max(layout.lengths)
    padded, needed = len(layout.lengths) * longest**2, sum(length**2 for length in layout.lengths)
    uneven = longest >= LONG and needed < MUCH_OF_GRID * padded
    return one_by_one(layout) if device.type == "cpu" and uneven else over_grid(layout)
