"""Checked rows on their way into a snapshot: one Parquet file per piece, below ``<home>/parts/<key>/``.

A part holds every row of its piece, the refused ones with their reason. It is written under a temporary name and moved
into place in one step, so a run that stops leaves whole parts behind, and the next one with the same key (source,
revision, rules, model, code) goes on behind them. Pages carry checksums: a damaged part is noticed and made anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llava_pipeline.code_digest import code_digest
from llava_pipeline.contracts import AssembledModel, CheckedPiece, Piece
from llava_pipeline.data.examine import Accepted, RowRefused, examine
from llava_pipeline.data.sources.reader import Reader
from llava_pipeline.model.processor import Processor
from llava_pipeline.spec import DataSpec
from llava_pipeline.store import home, tell_disk_full, write_text

BATCH_ROWS = 128
BATCH_BYTES = 16 << 20
SCHEMA = pa.schema([
    *((name, pa.string()) for name in ("id", "reason", "detail", "digest")),
    *((name, pa.list_(pa.string())) for name in ("questions", "answers", "kinds")),
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())),
    ("pixels", pa.binary()), ("perceptual", pa.uint64()), ("mirrored", pa.uint64()), ("cells", pa.binary()),
    ("width", pa.int32()), ("height", pa.int32()), ("data", pa.binary()),
])  # fmt: skip
RULES = {"max_tokens", "when_too_long", "text_only"}  # what a row's own checks depend on


class PartDamaged(Exception):
    """A part that cannot be read any more."""


def folder_for(reader: Reader, model: AssembledModel, spec: DataSpec) -> Path:
    """Where the parts of these rows under these rules for this model lie."""
    fixed = {
        "origin": reader.origin,
        "source": reader.source.model_dump(mode="json"),
        "rules": spec.model_dump(mode="json", include=RULES),
        "language_model": model.backbones.language_model.files.digest,
        "template": model.chat_template_digest,
        "num_image_tokens": model.num_image_tokens,
        "code": _code(),
    }
    return home() / "parts" / hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:32]


def forget_if_changed(folder: Path, stamp: str) -> None:
    """Remove the parts of files that have changed since, as their stamp tells."""
    noted = folder / "STAMP"
    if folder.exists() and (noted.read_text(encoding="utf-8") if noted.exists() else "") != stamp:
        shutil.rmtree(folder)
    if stamp:
        write_text(noted, stamp)


@functools.cache
def _code() -> str:
    """Digest of the code that makes parts. Read once: it parses some twenty files."""
    return code_digest(__name__)


def check(reader: Reader, piece: Piece, processor: Processor, spec: DataSpec, folder: Path) -> CheckedPiece:
    """Every row of a piece through its own checks, into a part; the part that is there already, if one is.

    Raises:
        SourceUnavailable: the source cannot be reached or read.
        DiskFull: no space left for the part.
    """
    path = folder / f"{piece.shard:06d}-{piece.start:010d}-{'end' if piece.stop is None else f'{piece.stop:010d}'}"
    if (known := _counts(path)) is None:
        try:
            known = _write(path, (_line(row, processor, spec) for row in reader.rows(piece)))
        except OSError as error:
            tell_disk_full(error, folder.parent)
            raise
    return CheckedPiece(piece=piece, part=f"{folder.name}/{path.name}", num_read=known[0], num_refused=known[1])


def read(checked: CheckedPiece) -> Iterator[dict[str, Any]]:
    """The rows of a part in order; ``row`` is a row's number in its shard.

    Raises:
        PartDamaged: the file is gone, or differs from what was written; it is removed.
    """
    path = home() / "parts" / checked.part
    number = checked.piece.start
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for row in batch.to_pylist():
                    yield {"row": number, **row}
                    number += 1
    except (OSError, pa.ArrowException) as error:
        path.unlink(missing_ok=True)
        raise PartDamaged(f"{checked.part}: {error}") from error


def _line(row: Any, processor: Processor, spec: DataSpec) -> dict[str, Any]:
    """A row as it stands in a part."""
    try:
        accepted = examine(row, processor, spec)
    except RowRefused as refusal:
        row_id = row.get("id", "") if isinstance(row, dict) else row.id
        return {"id": _short(row_id), "reason": refusal.reason, "detail": refusal.detail, "digest": refusal.digest}
    return _kept(accepted)


def _kept(accepted: Accepted) -> dict[str, Any]:
    record, encoded, picture = accepted.record, accepted.encoded, accepted.picture
    line: dict[str, Any] = {
        "id": record.id, "questions": [q for q, _ in record.pairs], "answers": [a for _, a in record.pairs],
        "kinds": record.kinds or ["all"] * len(record.pairs), "input_ids": encoded.input_ids, "labels": encoded.labels,
    }  # fmt: skip
    if picture is None:
        return line
    return line | {
        "pixels": picture.pixels, "perceptual": picture.perceptual, "mirrored": picture.mirrored,
        "cells": picture.cells, "width": picture.width, "height": picture.height, "data": record.images[0],
    }  # fmt: skip


def _short(row_id: object) -> str:
    """An id that any file takes."""
    if isinstance(row_id, int) and abs(row_id) < 1 << 63:
        return str(row_id)
    return row_id[:200].encode("utf-8", "replace").decode() if isinstance(row_id, str) else ""


def _write(path: Path, lines: Iterator[dict[str, Any]]) -> tuple[int, int]:
    """Write a part in one step; (rows, refused rows)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_read = num_refused = size = 0
    batch: list[dict[str, Any]] = []
    handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            # Pictures are compressed already, and what is not is read once and deleted.
            with pq.ParquetWriter(file, SCHEMA, compression="none", write_page_checksum=True) as writer:
                for line in lines:
                    batch.append(line)
                    num_read += 1
                    num_refused += "reason" in line
                    size += len(line.get("data", b""))
                    if len(batch) >= BATCH_ROWS or size >= BATCH_BYTES:
                        writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
                        batch, size = [], 0
                if batch:
                    writer.write_table(pa.Table.from_pylist(batch, SCHEMA))
                writer.add_key_value_metadata({"num_read": str(num_read), "num_refused": str(num_refused)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return num_read, num_refused


def _counts(path: Path) -> tuple[int, int] | None:
    """What a part says of itself; None where there is none, or none that can be read."""
    try:
        found = pq.read_metadata(path).metadata
        return int(found[b"num_read"]), int(found[b"num_refused"])
    except (OSError, pa.ArrowException, KeyError, TypeError):
        return None
