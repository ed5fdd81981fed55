"""Greedy answers to questions about pictures, in batches, with a key-value cache."""

from __future__ import annotations

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from llava_pipeline.training.plain import embed


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    prompts: list[list[int]],
    features: torch.Tensor,
    max_new_tokens: int,
    stop_ids: set[int],
    pad_token_id: int,
) -> list[list[int]]:
    """Greedy continuation of left-padded prompts, each without its stop token.

    ``features`` is (B, P, D_vision), one picture per prompt. Rows that have stopped are padded until all have.
    """
    device = model.model.multi_modal_projector.linear_1.weight.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    embeddings = embed(model, ids, features.to(device))
    cache = DynamicCache(config=model.config.text_config)
    out: list[list[int]] = [[] for _ in prompts]
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        hidden = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        chosen = model.lm_head(hidden[:, -1]).argmax(-1)
        running = running & ~torch.isin(chosen, stops)
        told = chosen.tolist()
        for row in running.nonzero().flatten().tolist():
            out[row].append(told[row])
        if not running.any():
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        embeddings = model.get_input_embeddings()(chosen)[:, None]
    return out
