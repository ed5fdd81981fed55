"""The facts of a pretrained part: what was measured, and the digest of the weights it was measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_pipeline.store import sha256_of


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``pretraining.json`` beside the weights."""
    digest = sha256_of(folder / "model.safetensors")
    (folder / "pretraining.json").write_text(json.dumps({"sha256": digest, **facts}, indent=1) + "\n", encoding="utf-8")
