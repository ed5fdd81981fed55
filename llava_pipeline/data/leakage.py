"""What only other rows can tell: the same row again, and pictures that cross from one split to the other.

Pure functions of a row and of what was seen before it; like the checks of a single row, each is named after its reason.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from llava_pipeline.data.fingerprint import Fingerprint, SeenPictures
from llava_pipeline.spec import DataSpec, Split

TEN_THOUSANDTHS = 10_000


def split_of(pixels: bytes, held_out_share: float) -> Split:
    """Which split a picture belongs to where its source does not tell: by its pixels, so all its rows go one way."""
    return "test" if int.from_bytes(pixels[:4], "big") % TEN_THOUSANDTHS < held_out_share * TEN_THOUSANDTHS else "train"


def fingerprint_of(row: dict[str, Any]) -> Fingerprint | None:
    """The fingerprint a part holds of a row's picture."""
    if row["pixels"] is None:
        return None
    return Fingerprint(*(row[name] for name in ("pixels", "perceptual", "mirrored", "cells", "width", "height")))


@dataclass
class Seen:
    """What a split has shown so far: ids and conversations as 8-byte digests, and pictures."""

    ids: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)
    pictures: SeenPictures = field(default_factory=SeenPictures)


def _short_digest(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return int.from_bytes(digest.digest(), "big")


def id_digest(row: dict[str, Any]) -> int | None:
    """Of a row's id; None where it has none."""
    return _short_digest(row["id"].encode()) if row["id"] else None


def row_digest(row: dict[str, Any]) -> int:
    """Of a row's picture and conversation; case and white space do not matter."""
    texts = [" ".join(text.casefold().split()).encode() for text in (*row["questions"], *row["answers"])]
    return _short_digest(row["pixels"] or b"", *texts)


def duplicate_id(row: dict[str, Any], seen: Seen) -> str | None:
    """No two rows of a split have the same id."""
    return "a row before it has the same id" if id_digest(row) in seen.ids else None


def duplicate_row(row: dict[str, Any], seen: Seen) -> str | None:
    """No row has the picture and the conversation of a row before it."""
    return "a row before it has the same picture and conversation" if row_digest(row) in seen.rows else None


def image_in_held_out(picture: Fingerprint, held_out: SeenPictures) -> str | None:
    """No row to train on shows a held-out picture."""
    number = held_out.numbers.get(picture.pixels)
    return None if number is None else f"it is the held-out picture {number}"


def image_near_held_out(picture: Fingerprint, held_out: SeenPictures, distance: int) -> str | None:
    """No row to train on shows a picture that looks like a held-out one: re-encoded, resized or mirrored."""
    number = held_out.near(picture, distance)
    return None if number is None else f"it looks like the held-out picture {number}"


def image_repeated(picture: Fingerprint, seen: SeenPictures) -> str | None:
    """No picture is shown twice (if data.repeated_images=refuse)."""
    number = seen.numbers.get(picture.pixels)
    return None if number is None else f"picture {number} of the split has the same pixels"


def image_near_repeated(picture: Fingerprint, seen: SeenPictures, distance: int) -> str | None:
    """No picture looks like one shown before (if data.repeated_images=refuse)."""
    number = seen.near(picture, distance)
    return None if number is None else f"it looks like picture {number} of the split"


REASONS: dict[str, str] = {
    check.__name__: (check.__doc__ or "").splitlines()[0]
    for check in (
        *(duplicate_id, duplicate_row, image_in_held_out, image_near_held_out),
        *(image_repeated, image_near_repeated),
    )
}


def leaks(row: dict[str, Any], seen: Seen, held_out: SeenPictures | None, spec: DataSpec) -> tuple[str, str] | None:
    """The first reason, with its detail, for which a row is refused because of others; None where it stays.

    ``held_out`` is None for the held-out rows themselves.
    """
    for check in (duplicate_id, duplicate_row):
        if detail := check(row, seen):
            return check.__name__, detail
    picture = fingerprint_of(row)
    if picture is None:
        return None
    new = picture.pixels not in seen.pictures.numbers  # one that is kept already has passed
    if held_out is not None and new:
        if detail := image_in_held_out(picture, held_out):
            return image_in_held_out.__name__, detail
        if detail := image_near_held_out(picture, held_out, spec.near_distance):
            return image_near_held_out.__name__, detail
    if spec.repeated_images == "refuse":
        if detail := image_repeated(picture, seen.pictures):
            return image_repeated.__name__, detail
        if detail := image_near_repeated(picture, seen.pictures, spec.near_distance):
            return image_near_repeated.__name__, detail
    return None
