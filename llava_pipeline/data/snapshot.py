"""Validated rows on disk: Parquet shards, images once per content, refused rows kept with their reason.

``rows.parquet``  id, questions, answers, kinds, input_ids, labels, image (row number in images.parquet)
``images.parquet`` sha256, data (the bytes as they came)
``rejected.jsonl`` id, position, reason, detail
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llava_pipeline.contracts import ArtifactRef, Snapshot
from llava_pipeline.data.checks import STRUCTURE
from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.data.record import Malformed, Record, Row, normalise
from llava_pipeline.errors import NothingToLearn, TooManyRejected
from llava_pipeline.model.processor import IGNORE_INDEX, Encoded, Processor
from llava_pipeline.spec import DataSpec
from llava_pipeline.store import open_artifact, writing

ROWS_PER_SHARD = 1024
ROW_SCHEMA = pa.schema([
    ("id", pa.string()), *((name, pa.list_(pa.string())) for name in ("questions", "answers", "kinds")),
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("image", pa.int64()),
])  # fmt: skip
IMAGE_SCHEMA = pa.schema([("sha256", pa.string()), ("data", pa.binary())])


class RowRefused(Exception):
    """A row that is not kept, with its reason and a detail for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def check(row: Row, processor: Processor, max_tokens: int) -> tuple[Record, Encoded]:
    """The record and its tokens.

    Raises:
        RowRefused: the first reason for which it is not kept.
    """
    try:
        record = normalise(row)
    except Malformed as error:
        raise RowRefused("malformed", str(error)) from error
    for reason, function in STRUCTURE.items():
        if detail := function(record):
            raise RowRefused(reason, detail)
    try:
        decode(record.images[0])
    except ImageRefused as error:
        raise RowRefused(error.reason, error.detail) from error
    encoded = processor.encode(record.messages)
    if len(encoded.input_ids) > max_tokens:
        raise RowRefused("too_many_tokens", f"{len(encoded.input_ids)} tokens, at most {max_tokens}")
    if all(label == IGNORE_INDEX for label in encoded.labels):
        raise RowRefused("nothing_supervised", "no token between the template's generation marks")
    return record, encoded


@dataclass
class Totals:
    """What was read, kept and refused so far. read = kept + refused, always."""

    num_read: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0

    def __post_init__(self) -> None:
        self.rejected: Counter[str] = Counter()


class Shards:
    """Writes kept and refused rows below a folder, a shard at a time."""

    def __init__(self, folder: Path):
        self.rows = pq.ParquetWriter(folder / "rows.parquet", ROW_SCHEMA)
        self.images = pq.ParquetWriter(folder / "images.parquet", IMAGE_SCHEMA, compression="none")
        self.refused = (folder / "rejected.jsonl").open("w", encoding="utf-8")
        self.known: dict[str, int] = {}
        self.row_buffer: list[dict[str, Any]] = []
        self.image_buffer: list[dict[str, Any]] = []

    def keep(self, record: Record, encoded: Encoded) -> None:
        """One accepted row; its image only if its content is new."""
        digest = hashlib.sha256(record.images[0]).hexdigest()
        if digest not in self.known:
            self.known[digest] = len(self.known)
            self.image_buffer.append({"sha256": digest, "data": record.images[0]})
        self.row_buffer.append({
            "id": record.id, "questions": [q for q, _ in record.pairs], "answers": [a for _, a in record.pairs],
            "kinds": record.kinds or ["all"] * len(record.pairs),
            "input_ids": encoded.input_ids, "labels": encoded.labels, "image": self.known[digest],
        })  # fmt: skip
        if len(self.row_buffer) >= ROWS_PER_SHARD:
            self.flush()

    def refuse(self, row: Row, position: int, refusal: RowRefused) -> None:
        """One refused row: enough to find it again."""
        line = {"id": str(row.get("id", "")), "position": position, "reason": refusal.reason, "detail": refusal.detail}
        self.refused.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Write what is buffered."""
        if self.row_buffer:
            self.rows.write_table(pa.Table.from_pylist(self.row_buffer, ROW_SCHEMA))
        if self.image_buffer:
            self.images.write_table(pa.Table.from_pylist(self.image_buffer, IMAGE_SCHEMA))
        self.row_buffer, self.image_buffer = [], []

    def close(self) -> None:
        """Finish all three files."""
        self.flush()
        self.rows.close()
        self.images.close()
        self.refused.close()


def take(
    origin: str, rows: Iterator[Row], spec: DataSpec, wanted: int, processor: Processor, advance: Callable[..., None]
) -> Snapshot:
    """Read rows until ``wanted`` are kept or the source ends, and put them into the store.

    Raises:
        TooManyRejected: more than ``spec.max_rejected_share`` were refused, at the end or once 200 rows were read.
        NothingToLearn: every row was refused.
    """
    totals = Totals()
    with writing("snapshot") as (folder, done):
        shards = Shards(folder)
        try:
            for position, row in enumerate(rows):
                totals.num_read += 1
                try:
                    record, encoded = check(row, processor, spec.max_tokens)
                except RowRefused as refusal:
                    totals.rejected[refusal.reason] += 1
                    shards.refuse(row, position, refusal)
                    refuse_if_too_many(totals, spec)
                    continue
                shards.keep(record, encoded)
                totals.num_kept += 1
                totals.num_tokens += len(encoded.input_ids)
                totals.num_supervised_tokens += sum(label != IGNORE_INDEX for label in encoded.labels)
                advance()
                if totals.num_kept >= wanted:
                    break
        finally:
            shards.close()
        num_images = len(shards.known)
        if totals.num_read == 0:
            raise NothingToLearn(f"{origin} has no rows; check data.source")
        if totals.num_kept == 0:
            raise NothingToLearn(
                f"all {totals.num_read} rows of {origin} were refused: {leading_reasons(totals.rejected)}"
            )
        refuse_if_too_many(totals, spec, at_end=True)
    return Snapshot(
        spec=spec, rows=done[0], origin=origin, num_read=totals.num_read, num_kept=totals.num_kept,
        rejected=dict(sorted(totals.rejected.items())), num_images=num_images,
        num_supervised_tokens=totals.num_supervised_tokens, num_tokens=totals.num_tokens,
    )  # fmt: skip


def leading_reasons(rejected: Mapping[str, int]) -> str:
    """``15 (image_unreadable 12, too_many_tokens 3)``."""
    most = sorted(rejected.items(), key=lambda item: -item[1])[:3]
    reasons = ", ".join(f"{reason} {count}" for reason, count in most)
    return f"{sum(rejected.values())} ({reasons})" if reasons else "0"


def refuse_if_too_many(totals: Totals, spec: DataSpec, at_end: bool = False) -> None:
    """Fail early, once enough rows were seen to tell."""
    refused = totals.num_read - totals.num_kept
    if (at_end or totals.num_read >= 200) and refused > spec.max_rejected_share * totals.num_read:
        raise TooManyRejected(
            f"of {totals.num_read} rows were refused {leading_reasons(totals.rejected)}, more than "
            f"data.max_rejected_share={spec.max_rejected_share}; mend the data or raise the limit"
        )


@dataclass(frozen=True)
class Rows:
    """A snapshot opened: columns in memory, images decoded on demand."""

    ids: list[str]
    questions: list[list[str]]
    answers: list[list[str]]
    kinds: list[list[str]]
    input_ids: list[np.ndarray[Any, np.dtype[np.int32]]]
    labels: list[np.ndarray[Any, np.dtype[np.int32]]]
    image: list[int]
    images: list[bytes]

    def __len__(self) -> int:
        return len(self.ids)

    def picture(self, image: int) -> Image.Image:
        """Image number ``image``, decoded and upright."""
        return decode(self.images[image])


def open_rows(ref: ArtifactRef) -> Rows:
    """Read a snapshot from the store."""
    folder = open_artifact(ref)
    rows = pq.read_table(folder / "rows.parquet").to_pydict()
    images = pq.read_table(folder / "images.parquet", columns=["data"])["data"].to_pylist()
    return Rows(
        ids=rows["id"], questions=rows["questions"], answers=rows["answers"], kinds=rows["kinds"],
        input_ids=[np.asarray(ids, dtype=np.int32) for ids in rows["input_ids"]],
        labels=[np.asarray(labels, dtype=np.int32) for labels in rows["labels"]], image=rows["image"], images=images,
    )  # fmt: skip


def png(image: Image.Image) -> bytes:
    """An image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
