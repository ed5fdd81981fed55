"""Turns as the model was trained to read them: a turn's pictures first, its words on a line of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llava_pipeline.model.processor import Message, Processor


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said."""

    role: Literal["user", "assistant"]
    text: str
    num_pictures: int = 0


def question(text: str, with_image: bool) -> list[Turn]:
    """One question, as evaluation asks it."""
    return [Turn("user", text, int(with_image))]


def prompt_of(processor: Processor, turns: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation up to where the next answer begins. Nothing that was said becomes a special token."""
    return processor.encode([_message(turn) for turn in turns], add_generation_prompt=True).input_ids


def _message(turn: Turn) -> Message:
    pictures = [{"type": "image"}] * turn.num_pictures
    words = f"\n{turn.text}" if turn.num_pictures else turn.text
    return {"role": turn.role, "content": [*pictures, {"type": "text", "text": words}]}
