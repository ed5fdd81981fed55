"""How lmms-eval asks about a scene, and what a right answer is."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The picture."""
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question."""
    return str(doc["question"])


def results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Right or wrong, without case."""
    return {"exact_match": float(answers[0].strip().lower() == doc["answer"].lower())}
