"""Padded batches through transformers' own language model, from tower features: for language models other than Llama,
and for evaluation.

It runs from embeddings with the projected features written over the image tokens, and the language-model head only
where there is a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LlavaForConditionalGeneration

from llava_pipeline.model.processor import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded samples. ``features`` (I, P, D_vision) of the I that have a picture, in order; the rest (B, T)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    features: torch.Tensor

    @property
    def num_labels(self) -> int:
        """Supervised tokens: those that are predicted, so not the first of a row."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.attention_mask.to(device),
            self.features.to(device),
        )


def collate(
    input_ids: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], features: torch.Tensor, pad_token_id: int
) -> Batch:
    """Samples to a batch. The mask comes from lengths, never from the padding id (it may be a real token)."""
    width = max(len(ids) for ids in input_ids)
    shape = (len(input_ids), width)
    ids = torch.full(shape, pad_token_id)
    targets = torch.full(shape, IGNORE_INDEX)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (sample, label) in enumerate(zip(input_ids, labels, strict=True)):
        ids[row, : len(sample)] = sample
        targets[row, : len(label)] = label
        mask[row, : len(sample)] = 1
    return Batch(ids, targets, mask, features)


def embed(model: LlavaForConditionalGeneration, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(B, T, D) embeddings with projected features, in reading order, at the image tokens."""
    embeddings = model.get_input_embeddings()(input_ids)
    projector = model.model.multi_modal_projector
    projected = projector(features.to(projector.linear_1.weight.dtype)).to(embeddings.dtype)
    at_image = (input_ids == model.config.image_token_index)[..., None].expand_as(embeddings)
    merged: torch.Tensor = embeddings.masked_scatter(at_image, projected)
    return merged


def loss_sum(model: LlavaForConditionalGeneration, batch: Batch, per_sample: bool = False) -> torch.Tensor:
    """Cross entropy summed over supervised tokens, () or, per sample, (B,). Divide by the step's own token count."""
    hidden = model.model.language_model(
        inputs_embeds=embed(model, batch.input_ids, batch.features), attention_mask=batch.attention_mask,
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    supervised = batch.labels[:, 1:] != IGNORE_INDEX
    logits = model.lm_head(hidden[:, :-1][supervised]).float()
    losses = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:][supervised], reduction="none")
    if not per_sample:
        return losses.sum()
    rows = supervised.nonzero()[:, 0]
    return torch.zeros(len(batch.labels), device=losses.device).index_add(0, rows, losses)
