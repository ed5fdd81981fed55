"""Questions that are kept apart from the rest: thumbnails for people, and golden ones for whoever loads the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pipeline.data.snapshot import Rows

NUM_FIRST, NUM_WORST = 24, 12
THUMBNAIL_SIDE = 256
NUM_GOLDEN = 3
Line = dict[str, Any]


def save_samples(folder: Path, rows: Rows, lines: Sequence[Line]) -> None:
    """Thumbnails of the first questions' pictures and of the most lossy ones', named by the question's number."""
    folder.mkdir()
    worst = sorted(range(len(lines)), key=lambda k: (-lines[k]["loss"], k))[:NUM_WORST]
    for number in sorted({*range(min(NUM_FIRST, len(lines))), *worst}):
        picture = rows.picture(lines[number]["image"])
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        picture.save(folder / f"{number:06}.webp", quality=90)


def save_golden(folder: Path, rows: Rows, lines: Sequence[Line]) -> None:
    """The questions that were answered most surely, each with another answer, and their pictures as they are.

    Whoever loads the projector later gets these answers, or has loaded something else. The surest ones are the same in
    every precision.
    """
    folder.mkdir()
    chosen: dict[str, int] = {}
    for number in sorted(range(len(lines)), key=lambda k: (lines[k]["loss"], k)):
        if lines[number]["correct"] and len(chosen) < NUM_GOLDEN:
            chosen.setdefault(lines[number]["answer"], number)
    told = []
    for place, (answer, number) in enumerate(chosen.items()):
        rows.picture(lines[number]["image"]).save(folder / f"{place}.png")
        told.append({"picture": f"{place}.png", "question": lines[number]["question"], "answer": answer})
    (folder / "questions.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
