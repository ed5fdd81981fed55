"""The same held-out questions with the right picture, with another's picture, and with an untrained projector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llava_pipeline.data.snapshot import Rows
from llava_pipeline.evaluation.generate import answer
from llava_pipeline.evaluation.score import derangement
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.training.features import tower_features
from llava_pipeline.training.plain import collate, loss_sum

SHUFFLE_SEED = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """One held-out question: what is put to the model, and the ids of the true answer with its stop token."""

    prompt: list[int]
    truth: list[int]


def first_round(input_ids: Any, labels: Any) -> Asked:
    """Prompt and answer of the first round of an encoded conversation."""
    learned = [k for k, label in enumerate(labels) if label != IGNORE_INDEX]
    start = end = learned[0]
    while end < len(labels) and labels[end] != IGNORE_INDEX:
        end += 1
    return Asked(list(map(int, input_ids[:start])), list(map(int, input_ids[start:end])))


def picture_features(llava: Llava, rows: Rows, batch_size: int, advance: Callable[[int], None]) -> torch.Tensor:
    """(N, P, D_vision) tower features of every picture of a snapshot, in the frozen parts' precision, on the CPU."""
    device = llava.model.device
    out = []
    for start in range(0, len(rows.images), batch_size):
        images = range(start, min(start + batch_size, len(rows.images)))
        pixels = torch.stack([torch.from_numpy(llava.processor.resize(rows.picture(k)).copy()) for k in images])
        out.append(tower_features(llava.model, llava.processor.normalise(pixels.to(device))).cpu())
        advance(len(images))
    return torch.cat(out)


def stop_ids(llava: Llava) -> set[int]:
    """Tokens that end an answer."""
    tokenizer = llava.processor.tokenizer
    ends = {tokenizer.eos_token_id}
    chatml_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if chatml_end is not None and chatml_end != tokenizer.unk_token_id:
        ends.add(chatml_end)
    return {int(token) for token in ends if token is not None}


def answers(
    llava: Llava,
    asked: list[Asked],
    image: list[int],
    features: torch.Tensor,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> list[str]:
    """One greedy answer per question; questions of like length share a batch."""
    out = [""] * len(asked)
    by_length = sorted(range(len(asked)), key=lambda k: len(asked[k].prompt))
    for start in range(0, len(asked), batch_size):
        rows = by_length[start : start + batch_size]
        generated = answer(
            llava.model,
            [asked[k].prompt for k in rows],
            features[[image[k] for k in rows]],
            max_new_tokens,
            stop_ids(llava),
            int(llava.model.config.pad_token_id),
        )
        for k, ids in zip(rows, generated, strict=True):
            out[k] = llava.processor.decode(ids)
        advance(len(rows))
    return out


@torch.no_grad()
def losses(llava: Llava, asked: list[Asked], image: list[int], features: torch.Tensor, batch_size: int) -> list[float]:
    """Nats per token of the true answer, one number per question."""
    device = llava.model.device
    out = [0.0] * len(asked)
    by_length = sorted(range(len(asked)), key=lambda k: len(asked[k].prompt))
    for start in range(0, len(asked), batch_size):
        rows = by_length[start : start + batch_size]
        batch = collate(
            [torch.tensor(asked[k].prompt + asked[k].truth) for k in rows],
            [torch.tensor([IGNORE_INDEX] * len(asked[k].prompt) + asked[k].truth) for k in rows],
            features[[image[k] for k in rows]],
            int(llava.model.config.pad_token_id),
        ).to(device)
        sums = loss_sum(llava.model, batch, per_sample=True).tolist()
        for k, total in zip(rows, sums, strict=True):
            out[k] = total / len(asked[k].truth)
    return out


def shuffled(image: list[int], num_images: int) -> list[int]:
    """For every question a picture that is not its own."""
    other = derangement(num_images, SHUFFLE_SEED)
    return [other[k] for k in image]
