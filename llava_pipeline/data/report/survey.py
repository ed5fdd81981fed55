"""What a report tells about a snapshot: counts, and a few rows, refusals and pictures to look at.

A snapshot is read by batches and counted, never held: a thousand rows and ten million take the same memory.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from llava_pipeline.contracts import Snapshot
from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.store import open_artifact

IGNORE_INDEX = -100  # of a label that is not learned, as in model.processor, which would bring torch along
NUM_EXAMPLES = 3
NUM_SAMPLES = 12
NUM_PAIRS = 6
NUM_ROUNDS = 4  # of a sample's conversation
MAX_KINDS = 1000  # told apart; a source may name every question's kind differently
OTHER_KINDS = "(other kinds)"
THUMBNAIL_SIDE = 320
ROWS_AT_ONCE = 512
IMAGES_AT_ONCE = 8  # each may have 20 MiB
SAMPLE_COLUMNS = ["id", "questions", "answers", "kinds", "input_ids", "labels", "image"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One refused row: enough to find it again. Everything in it comes from the data."""

    id: str
    shard: str
    row: str
    detail: str
    digest: str


@dataclass(slots=True)
class Numbers:
    """What is counted over all rows and pictures: how often there is which value."""

    tokens: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    kilopixels: Counter[int] = field(default_factory=Counter)  # width x height / 1000, rounded
    kinds: Counter[str] = field(default_factory=Counter)
    num_text_only: int = 0


@dataclass(frozen=True, slots=True)
class Picture:
    """A small copy of a stored picture; ``jpeg`` is empty where it could not be decoded."""

    number: int
    sha256: str
    width: int
    height: int
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """One kept row: its first rounds, and its picture unless it has none."""

    id: str
    rounds: list[tuple[str, str, str]]  # question, answer, kind
    num_rounds: int
    num_tokens: int
    num_supervised: int
    picture: Picture | None


def count(snapshot: Snapshot) -> Numbers:
    """The numbers of a snapshot, in one pass over the columns that they need.

    Raises:
        StoreError: the snapshot is not in the store, or damaged.
    """
    folder, numbers = open_artifact(snapshot.rows), Numbers()
    for batch in _batches(folder / "rows.parquet", ["input_ids", "kinds", "image"], ROWS_AT_ONCE):
        numbers.tokens.update(pc.list_value_length(batch["input_ids"]).to_pylist())
        numbers.num_text_only += pc.sum(pc.less(batch["image"], 0)).as_py() or 0
        for found in pc.value_counts(pc.list_flatten(batch["kinds"])).to_pylist():
            known = found["values"] in numbers.kinds or len(numbers.kinds) < MAX_KINDS
            numbers.kinds[found["values"] if known else OTHER_KINDS] += found["counts"]
    for batch in _batches(folder / "images.parquet", ["width", "height"], ROWS_AT_ONCE):
        widths, heights = batch["width"].to_pylist(), batch["height"].to_pylist()
        numbers.widths.update(widths)
        numbers.heights.update(heights)
        numbers.kilopixels.update(round(w * h / 1000) for w, h in zip(widths, heights, strict=True))
    return numbers


def refusals(snapshot: Snapshot) -> dict[str, list[Refusal]]:
    """The first refused rows of each reason, in the order of the reasons' names."""
    found: dict[str, list[Refusal]] = {}
    for line in _lines(open_artifact(snapshot.rows) / "rejected.jsonl"):
        known = found.setdefault(str(line.get("reason")), [])
        if len(known) < NUM_EXAMPLES:
            known.append(Refusal(*(str(line.get(name, "")) for name in ("id", "shard", "row", "detail", "digest"))))
    return dict(sorted(found.items()))


def samples(snapshot: Snapshot) -> list[Sample]:
    """Rows with their pictures, spread evenly over the snapshot."""
    folder = open_artifact(snapshot.rows)
    rows = _pick(folder / "rows.parquet", _spread(snapshot.num_kept, NUM_SAMPLES), SAMPLE_COLUMNS, ROWS_AT_ONCE)
    pictures = _pictures(folder, {row["image"] for row in rows.values() if row["image"] >= 0})
    return [_sample(rows[number], pictures) for number in sorted(rows)]


def pairs(snapshot: Snapshot) -> list[tuple[Picture, Picture]]:
    """Pictures that look alike, the one that came first to the left; spread evenly over all there are."""
    folder = open_artifact(snapshot.rows)
    wanted = set(_spread(sum(1 for _ in _lines(folder / "near.jsonl")), NUM_PAIRS))
    found = [
        (int(line["like"]), int(line["image"]))
        for number, line in enumerate(_lines(folder / "near.jsonl"))
        if number in wanted
    ]
    pictures = _pictures(folder, {number for pair in found for number in pair})
    return [(pictures[earlier], pictures[later]) for earlier, later in found]


def _sample(row: dict[str, Any], pictures: dict[int, Picture]) -> Sample:
    rounds = list(zip(row["questions"], row["answers"], row["kinds"], strict=False))
    return Sample(
        id=row["id"],
        rounds=rounds[:NUM_ROUNDS],
        num_rounds=len(row["questions"]),
        num_tokens=len(row["input_ids"]),
        num_supervised=sum(label != IGNORE_INDEX for label in row["labels"]),
        picture=pictures.get(row["image"]),
    )


def _spread(total: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the numbers below ``total``, the first and the last among them."""
    if total <= wanted:
        return list(range(total))
    return [round(n * (total - 1) / (wanted - 1)) for n in range(wanted)]


def _pictures(folder: Path, numbers: Collection[int]) -> dict[int, Picture]:
    """Small copies of stored pictures, by number."""
    columns = ["sha256", "data", "width", "height"]
    rows = _pick(folder / "images.parquet", numbers, columns, IMAGES_AT_ONCE)
    return {
        number: Picture(number, row["sha256"], row["width"], row["height"], _thumbnail(row["data"]))
        for number, row in rows.items()
    }


def _thumbnail(data: bytes) -> bytes:
    """A picture as a small JPEG; nothing where it does not decode: the report is made all the same."""
    try:
        image = decode(data)
    except ImageRefused:
        return b""
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def _batches(path: Path, columns: list[str], at_once: int) -> Iterator[Any]:
    with pq.ParquetFile(path, memory_map=True) as file:
        yield from file.iter_batches(at_once, columns=columns)


def _pick(path: Path, numbers: Collection[int], columns: list[str], at_once: int) -> dict[int, dict[str, Any]]:
    """Some rows of a Parquet file, by number; row groups that hold none of them are not read."""
    found: dict[int, dict[str, Any]] = {}
    with pq.ParquetFile(path, memory_map=True) as file:
        end = 0
        for group in range(file.num_row_groups):
            at, end = end, end + file.metadata.row_group(group).num_rows
            here = [number for number in numbers if at <= number < end]
            for batch in file.iter_batches(at_once, row_groups=[group], columns=columns) if here else ():
                for number in here:
                    if at <= number < at + len(batch):
                        found[number] = batch.slice(number - at, 1).to_pylist()[0]
                at += len(batch)
                if at > max(here):
                    break
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
