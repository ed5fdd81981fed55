"""easy-VQA from its wheel: conversations of one picture's questions to train on, single questions to be asked."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_pipeline.backbones.wheel import fetch_wheel
from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.record import Row, turn
from llava_pipeline.data.sources.reader import windows
from llava_pipeline.errors import BackboneUnavailable, NotFound, SourceUnavailable
from llava_pipeline.spec import EasyVqaSource, Split

KIND_OF_ANSWER = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape", "triangle": "shape"}


class EasyVqaReader:
    """One split. Its list of questions is held in memory (3 MB); pictures are read as they are needed."""

    has_split = True

    def __init__(self, source: EasyVqaSource, split: Split, patience_seconds: float) -> None:
        self.source, self.split = source, split
        self.origin = f"{source.requirement}/{split}"
        try:
            self.wheel: Path = fetch_wheel(source.requirement, source.wheel_sha256, patience_seconds)
        except BackboneUnavailable as error:
            raise SourceUnavailable(str(error)) from error
        self.folder = f"easy_vqa/data/{split}"
        with zipfile.ZipFile(self.wheel) as wheel:
            if f"{self.folder}/questions.json" not in wheel.namelist():
                raise NotFound(
                    f"{source.requirement} holds no {self.folder}/questions.json; correct data.source.requirement"
                )
            questions: dict[int, list[tuple[str, str]]] = {}
            for text, answer, image in json.loads(wheel.read(f"{self.folder}/questions.json")):
                questions.setdefault(image, []).append((text, answer))
        per_row = source.questions_per_image if split == "train" else 1
        self.conversations = [
            (image, start, asked[start : start + per_row])
            for image, asked in sorted(questions.items())
            for start in range(0, len(asked), per_row)
        ]

    def pieces(self, start: Cursor) -> Iterator[Piece]:
        """From a place on."""
        return windows(0, self.folder, len(self.conversations), start.row)

    def rows(self, piece: Piece) -> Iterator[Row]:
        """The conversations of a piece."""
        with zipfile.ZipFile(self.wheel) as wheel:
            for image, start, asked in self.conversations[piece.start : piece.stop]:
                messages: list[dict[str, Any]] = []
                for text, answer in asked:
                    messages += [turn("user", text, not messages), turn("assistant", answer)]
                yield {
                    "id": f"easy-vqa/{self.split}/{image}/{start}",
                    "messages": messages,
                    "images": [{"bytes": wheel.read(f"{self.folder}/images/{image}.png")}],
                    "kinds": [KIND_OF_ANSWER.get(answer, "color") for _, answer in asked],
                }

    def num_rows(self) -> int:
        """Conversations in all."""
        return len(self.conversations)

    def num_before(self, place: Cursor) -> int:
        """Rows before a place."""
        return place.row

    def behind(self, shard: int) -> str:
        """The wheel's digest fixes everything."""
        return ""
