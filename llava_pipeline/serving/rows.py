"""Conversations that are answered together: keys and values of every layer, padded on the left.

What a conversation begins with, up to its last picture, is read apart, so that it is kept and read once for all that
is asked about the picture. Shapes: B rows, T tokens, H key heads of width d, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlavaForConditionalGeneration

KeysValues = list[tuple[Tensor, Tensor]]  # of every layer


@dataclass(frozen=True, slots=True)
class Prefix:
    """What has been read once: (H, P, d) keys and values of every layer; empty where a conversation has no picture."""

    kept: KeysValues

    def __len__(self) -> int:
        return self.kept[0][0].shape[1] if self.kept else 0

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.kept)

    @property
    def is_finite(self) -> bool:
        """Whether all of it is numbers: what is none in one layer is none in those behind it."""
        return not self.kept or all(bool(torch.isfinite(half).all()) for half in self.kept[-1])


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that have been read."""

    kept: KeysValues  # (B, H, T, d)
    mask: Tensor  # (B, T): 1 where a token is
    hidden: Tensor  # (B, D): the last layer's at the last token

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, numbers: Sequence[int]) -> Rows:
        """Some of the rows, without the columns that none of them uses."""
        at = torch.tensor(numbers, device=self.mask.device)
        mask = self.mask[at]
        used = mask.any(0)
        first = int(used.to(torch.uint8).argmax())
        kept = [(keys[at, :, first:], values[at, :, first:]) for keys, values in self.kept]
        return Rows(kept, mask[:, first:], self.hidden[at])

    def join(self, other: Rows) -> Rows:
        """These rows and then the others."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        both = [_widened(rows, width) for rows in (self, other)]
        kept = [
            (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
            for a, b in zip(both[0].kept, both[1].kept, strict=True)
        ]  # fmt: skip
        return Rows(kept, torch.cat([both[0].mask, both[1].mask]), torch.cat([self.hidden, other.hidden]))


def _widened(rows: Rows, width: int) -> Rows:
    more = width - rows.mask.shape[1]
    if more == 0:
        return rows
    kept = [(F.pad(keys, (0, 0, more, 0)), F.pad(values, (0, 0, more, 0))) for keys, values in rows.kept]
    return Rows(kept, F.pad(rows.mask, (more, 0)), rows.hidden)


@torch.inference_mode()
def read_prompts(
    model: LlavaForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    projected: Sequence[Tensor],
    lengths: Sequence[int],
) -> tuple[Rows, list[Prefix]]:
    """Read whole prompts, and cut out the beginning of each, so many tokens long.

    ``projected`` are (image tokens, D) of each prompt's pictures, in the order they are read.
    """
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    embeddings = model.get_input_embeddings()(ids)
    embeddings[(ids == model.config.image_token_index) & (mask == 1)] = torch.cat(list(projected)).to(embeddings.dtype)
    rows = _forward(model, embeddings, mask, DynamicCache(config=model.config.text_config))
    # Copies: a view of one row would hold the whole batch in memory, beyond what its bytes say.
    prefixes = [
        Prefix(
            [
                (keys[row, :, at : at + length].clone(), values[row, :, at : at + length].clone())
                for keys, values in rows.kept
            ]
        )
        for row, (at, length) in enumerate(zip((width - len(prompt) for prompt in prompts), lengths, strict=True))
    ]
    return rows, prefixes


@torch.inference_mode()
def read_suffixes(
    model: LlavaForConditionalGeneration, prefixes: Sequence[Prefix], suffixes: Sequence[Sequence[int]]
) -> Rows:
    """Read what follows each beginning; suffixes are not empty."""
    before, width = max(map(len, prefixes)), max(map(len, suffixes))
    ids = torch.zeros((len(suffixes), width), dtype=torch.long)
    mask = torch.zeros((len(suffixes), before + width), dtype=torch.long)
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        ids[row, width - len(suffix) :] = torch.tensor(suffix)
        mask[row, before - len(prefix) : before] = 1
        mask[row, before + width - len(suffix) :] = 1
    cache = DynamicCache(config=model.config.text_config)
    for layer, (keys, values) in enumerate(_stacked(prefixes, before)):
        cache.update(keys, values, layer)
    embeddings = model.get_input_embeddings()(ids.to(model.device))
    return _forward(model, embeddings, mask.to(model.device), cache)


@torch.inference_mode()
def read_tokens(model: LlavaForConditionalGeneration, rows: Rows, tokens: Tensor) -> Rows:
    """Read one more token (B,) of every row."""
    mask = torch.cat([rows.mask, torch.ones_like(rows.mask[:, :1])], 1)
    cache = DynamicCache(config=model.config.text_config)
    for layer, (keys, values) in enumerate(rows.kept):
        cache.update(keys, values, layer)
    return _forward(model, model.get_input_embeddings()(tokens)[:, None], mask, cache)


def _stacked(prefixes: Sequence[Prefix], width: int) -> KeysValues:
    """Keys and values of beginnings of different lengths as one batch; nothing where all are empty."""
    filled = next((prefix for prefix in prefixes if len(prefix)), None)
    if filled is None:
        return []
    stacked = []
    for layer, some in enumerate(filled.kept):
        both = []
        for half, like in enumerate(some):
            out = like.new_zeros((len(prefixes), like.shape[0], width, like.shape[2]))
            for row, prefix in enumerate(prefixes):
                if len(prefix):
                    out[row, :, width - len(prefix) :] = prefix.kept[layer][half]
            both.append(out)
        stacked.append((both[0], both[1]))
    return stacked


def _forward(model: LlavaForConditionalGeneration, embeddings: Tensor, mask: Tensor, cache: DynamicCache) -> Rows:
    """A position counts the real tokens before it."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return Rows(_kept(cache), mask, hidden[:, -1])


def _kept(cache: DynamicCache) -> KeysValues:
    return [(layer.keys, layer.values) for layer in cache.layers]
