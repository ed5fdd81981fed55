"""Validated rows on disk: what was kept, its pictures once per content, what was refused, and totals that reconcile.

``rows.parquet``    id, questions, answers, kinds, input_ids, labels, image (row number in images.parquet, -1: none)
``images.parquet``  sha256 of the pixels, data (the bytes as they first came), width, height
``rejected.jsonl``  id, shard, row, reason, detail, digest
``near.jsonl``      image, like: row numbers of a picture and of an earlier one that it looks like
``totals.json``     origin, counts, and the places in the source where reading began and ended

The files depend on the rows and the rules alone: not on the machine, nor on who checked which piece.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from llava_pipeline.contracts import ArtifactRef, Cursor, Snapshot
from llava_pipeline.data.fingerprint import SeenPictures
from llava_pipeline.data.images import decode
from llava_pipeline.data.leakage import Seen, fingerprint_of, id_digest, leaks, row_digest, split_of
from llava_pipeline.data.sources.reader import Reader
from llava_pipeline.errors import NothingNew, NothingToLearn, TooManyRejected
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.spec import DataSpec, Split
from llava_pipeline.store import open_artifact, writing

BUFFER_ROWS = 1024
BUFFER_BYTES = 32 << 20
ENOUGH_TO_TELL = 200  # rows read after which too large a share of refused ones ends the reading
ROW_SCHEMA = pa.schema([
    ("id", pa.string()), *((name, pa.list_(pa.string())) for name in ("questions", "answers", "kinds")),
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("image", pa.int64()),
])  # fmt: skip
IMAGE_SCHEMA = pa.schema([
    ("sha256", pa.string()), ("data", pa.binary()), ("width", pa.int32()), ("height", pa.int32()),
])  # fmt: skip
NO_PICTURE = -1


@dataclass
class Totals:
    """What was read, kept and refused so far. read = kept + refused, always."""

    num_read: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_near_duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)


class SnapshotFiles:
    """The files of a snapshot while they grow."""

    def __init__(self, folder: Path) -> None:
        self.rows = pq.ParquetWriter(folder / "rows.parquet", ROW_SCHEMA)
        self.images = pq.ParquetWriter(folder / "images.parquet", IMAGE_SCHEMA, compression="none")
        self.refused = (folder / "rejected.jsonl").open("w", encoding="utf-8")
        self.near = (folder / "near.jsonl").open("w", encoding="utf-8")
        self.row_buffer: list[dict[str, Any]] = []
        self.image_buffer: list[dict[str, Any]] = []
        self.num_bytes = 0

    def keep(self, row: dict[str, Any], image: int) -> None:
        """One accepted row."""
        self.row_buffer.append({name: row[name] for name in ROW_SCHEMA.names if name != "image"} | {"image": image})
        if len(self.row_buffer) >= BUFFER_ROWS:
            self.rows.write_table(pa.Table.from_pylist(self.row_buffer, ROW_SCHEMA))
            self.row_buffer = []

    def picture(self, row: dict[str, Any], image: int, like: int | None) -> None:
        """A picture whose content is new."""
        if like is not None:
            self.near.write(json.dumps({"image": image, "like": like}) + "\n")
        self.image_buffer.append({"sha256": row["pixels"].hex()} | {k: row[k] for k in ("data", "width", "height")})
        self.num_bytes += len(row["data"])
        if len(self.image_buffer) >= BUFFER_ROWS or self.num_bytes >= BUFFER_BYTES:
            self.images.write_table(pa.Table.from_pylist(self.image_buffer, IMAGE_SCHEMA))
            self.image_buffer, self.num_bytes = [], 0

    def refuse(self, row: dict[str, Any], shard: int, reason: str, detail: str) -> None:
        """One refused row: enough to find it again."""
        digest = row["digest"] or (row["pixels"] or b"").hex()
        line = {"id": row["id"], "shard": shard, "row": row["row"], "reason": reason, "detail": detail}
        self.refused.write(json.dumps(line | {"digest": digest}) + "\n")

    def close(self) -> None:
        """Finish all files."""
        for writer, buffer, schema in (
            (self.rows, self.row_buffer, ROW_SCHEMA),
            (self.images, self.image_buffer, IMAGE_SCHEMA),
        ):
            if buffer:
                writer.write_table(pa.Table.from_pylist(buffer, schema))
            writer.close()
        self.refused.close()
        self.near.close()


@dataclass
class Taker:
    """Puts the rows of one split, in order, where they belong."""

    files: SnapshotFiles
    split: Split
    spec: DataSpec
    held_out: SeenPictures | None
    by_picture: bool  # the source does not tell the splits apart
    totals: Totals = field(default_factory=Totals)
    seen: Seen = field(default_factory=Seen)

    def take(self, shard: int, row: dict[str, Any]) -> None:
        """Keep a row or refuse it; one of the other split is neither read nor counted."""
        if self.by_picture and self._belongs_to(row) != self.split:
            return
        self.totals.num_read += 1
        if refusal := self._refusal(row):
            self.totals.rejected[refusal[0]] += 1
            self.files.refuse(row, shard, *refusal)
            refuse_if_too_many(self.totals, self.spec)
        else:
            self._keep(row)

    def _belongs_to(self, row: dict[str, Any]) -> Split:
        """What has no picture that could be decoded is counted with the training rows, where there are any."""
        if self.spec.held_out_share == 1:  # all that a source has is asked about
            return "test"
        return split_of(row["pixels"], self.spec.held_out_share) if row["pixels"] is not None else "train"

    def _refusal(self, row: dict[str, Any]) -> tuple[str, str] | None:
        if row["reason"] is not None:
            return row["reason"], row["detail"]
        if self.split == "test" and row["pixels"] is None:
            return "no_image", "a held-out question needs a picture"
        return leaks(row, self.seen, self.held_out, self.spec)

    def _keep(self, row: dict[str, Any]) -> None:
        self.files.keep(row, self._image_of(row))
        self.seen.rows.add(row_digest(row))
        if (digest := id_digest(row)) is not None:
            self.seen.ids.add(digest)
        self.totals.num_kept += 1
        self.totals.num_tokens += len(row["input_ids"])
        self.totals.num_supervised_tokens += sum(label != IGNORE_INDEX for label in row["labels"])

    def _image_of(self, row: dict[str, Any]) -> int:
        """Number of a row's picture, which is stored if it is new."""
        if (picture := fingerprint_of(row)) is None:
            return NO_PICTURE
        pictures = self.seen.pictures
        if (known := pictures.numbers.get(picture.pixels)) is not None:
            return known
        like = pictures.near(picture, self.spec.near_distance)
        self.totals.num_near_duplicates += like is not None
        image = pictures.add(picture)
        self.files.picture(row, image, like)
        return image


def take(
    reader: Reader,
    split: Split,
    rows: Iterable[tuple[int, dict[str, Any]]],
    spec: DataSpec,
    wanted: int,
    start: Cursor,
    held_out: SeenPictures | None,
    advance: Callable[..., None],
) -> tuple[Snapshot, SeenPictures]:
    """Take checked rows, as (shard, row), until ``wanted`` are kept or the source ends, and put them into the store.

    Gives the pictures as well, so that the training rows can be held against the held-out ones.

    Raises:
        TooManyRejected: more than ``spec.max_rejected_share`` were refused, at the end or once 200 rows were read.
        NothingToLearn: the source has no rows, or every row was refused.
        NothingNew: no row lies behind ``start``.
    """
    ended = start
    with writing("snapshot") as (folder, done):
        files = SnapshotFiles(folder)
        taker = Taker(files, split, spec, held_out, by_picture=not reader.has_split)
        totals = taker.totals
        try:
            for shard, row in rows:
                kept = totals.num_kept
                taker.take(shard, row)
                ended = Cursor(shard=shard, row=row["row"] + 1)
                if totals.num_kept > kept:
                    advance()
                if totals.num_kept >= wanted:
                    break
        finally:
            files.close()
        ended = ended.model_copy(update={"behind": reader.behind(ended.shard)})
        if reader.has_split or split == "train":
            _refuse_if_empty(totals, len(taker.seen.pictures), reader.origin, start)
        refuse_if_too_many(totals, spec, at_end=True)
        counts = {
            "num_read": totals.num_read, "num_kept": totals.num_kept,
            "rejected": dict(sorted(totals.rejected.items())), "num_images": len(taker.seen.pictures),
            "num_near_duplicates": totals.num_near_duplicates,
            "num_supervised_tokens": totals.num_supervised_tokens, "num_tokens": totals.num_tokens,
        }  # fmt: skip
        places = {"began": start.model_dump(), "ended": ended.model_dump()}
        told = json.dumps({"origin": reader.origin, **counts, **places}, indent=1)
        (folder / "totals.json").write_text(told + "\n", encoding="utf-8")
    snapshot = Snapshot(
        source=reader.source, rows=done[0], origin=reader.origin, began=start, ended=ended,
        num_left=_num_left(reader, ended), **counts,
    )  # fmt: skip
    return snapshot, taker.seen.pictures


def _num_left(reader: Reader, place: Cursor) -> int | None:
    total, before = reader.num_rows(), reader.num_before(place)
    return None if total is None or before is None else total - before


def _refuse_if_empty(totals: Totals, num_images: int, origin: str, start: Cursor) -> None:
    if totals.num_read == 0 and (start.shard or start.row):
        raise NothingNew(
            f"{origin} has no row behind shard {start.shard}, row {start.row}, where the last run stopped; "
            "wait for new rows, or start over with --set data.increment=false"
        )
    if totals.num_read == 0:
        raise NothingToLearn(f"{origin} has no rows; check data.source")
    if totals.num_kept == 0:
        raise NothingToLearn(f"all {totals.num_read} rows of {origin} were refused: {leading_reasons(totals.rejected)}")
    if num_images == 0:
        raise NothingToLearn(f"none of the {totals.num_kept} rows kept from {origin} has a picture; check data.source")


def leading_reasons(rejected: Mapping[str, int]) -> str:
    """``15 (image_unreadable 12, too_many_tokens 3)``."""
    most = sorted(rejected.items(), key=lambda item: -item[1])[:3]
    reasons = ", ".join(f"{reason} {count}" for reason, count in most)
    return f"{sum(rejected.values())} ({reasons})" if reasons else "0"


def refuse_if_too_many(totals: Totals | Snapshot, spec: DataSpec, at_end: bool = False) -> None:
    """Fail early, once enough rows were seen to tell."""
    refused = totals.num_read - totals.num_kept
    if (at_end or totals.num_read >= ENOUGH_TO_TELL) and refused > spec.max_rejected_share * totals.num_read:
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
    image: list[int]  # NO_PICTURE for a conversation without one
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
