"""Held-out questions as token ids: what every question of one form begins with is apart, to be computed once a picture.

One question of the pocket profile::

    prefix   <s> <|user|> [<image> x 16]            the same for all; its keys and values depend on the picture alone
    suffix   \\n What color is the circle ? <|assistant|>
    truth    red </s>
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_pipeline.data.snapshot import Rows
from llava_pipeline.evaluation.score import derangement, normal
from llava_pipeline.model.processor import IGNORE_INDEX, Processor

OPPOSITE = {"yes": "no", "no": "yes"}
SHUFFLE_SEED = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out question; the first round of its conversation."""

    image: int  # its picture's number in the snapshot
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    truth: tuple[int, ...]  # with its stop token
    opposite: tuple[int, ...] = ()  # the other answer to a yes/no question; empty for every other question


def first_round(input_ids: Any, labels: Any) -> tuple[list[int], list[int]]:
    """Prompt and answer of the first round of an encoded conversation."""
    learned = [k for k, label in enumerate(labels) if label != IGNORE_INDEX]
    start = end = learned[0]
    while end < len(labels) and labels[end] != IGNORE_INDEX:
        end += 1
    return list(map(int, input_ids[:start])), list(map(int, input_ids[start:end]))


def cut(prompt: list[int], image_token_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt up to its last image token, and what follows."""
    place = len(prompt) - prompt[::-1].index(image_token_id)
    return tuple(prompt[:place]), tuple(prompt[place:])


def answer_ids(processor: Processor, answer: str) -> tuple[int, ...]:
    """An answer with its stop token, as the template writes it behind a question."""
    asked = [{"type": "image"}, {"type": "text", "text": "\n?"}]
    said = [{"type": "text", "text": answer}]
    encoded = processor.encode([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
    return tuple(first_round(encoded.input_ids, encoded.labels)[1])


def opposite_of(answer: str) -> str | None:
    """No for yes and yes for no, in the case and with the full stop of the answer; None for every other answer."""
    if (other := OPPOSITE.get(normal(answer))) is None:
        return None
    word = answer.strip().removesuffix(".").strip()
    other = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
    return answer.replace(word, other)


def questions_of(rows: Rows, processor: Processor) -> list[Question]:
    """The first question of every conversation of a snapshot."""
    opposites: dict[str, tuple[int, ...]] = {}
    found = []
    for ids, labels, image, answers in zip(rows.input_ids, rows.labels, rows.image, rows.answers, strict=True):
        prompt, truth = first_round(ids, labels)
        prefix, suffix = cut(prompt, processor.image_token_id)
        other = opposite_of(answers[0])
        if other is not None and other not in opposites:
            opposites[other] = answer_ids(processor, other)
        found.append(Question(image, prefix, suffix, tuple(truth), opposites[other] if other is not None else ()))
    return found


def shuffled(image: list[int], num_images: int) -> list[int]:
    """For every question a picture that is not its own."""
    other = derangement(num_images, SHUFFLE_SEED)
    return [other[k] for k in image]


Advance = Callable[[int], None]
