"""Stage 1: both backbones on this machine, every file with its digest."""

from __future__ import annotations

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.spec import BackbonesSpec


def fetch_backbones(spec: BackbonesSpec) -> Backbones:
    """Fetch vision tower and language model from wherever the spec says they are."""
    return Backbones(
        vision_tower=fetch(spec.vision_tower, spec.source, spec.patience_seconds),
        language_model=fetch(spec.language_model, spec.source, spec.patience_seconds),
    )
