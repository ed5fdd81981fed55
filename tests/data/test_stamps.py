"""Debian's package ``tuxpaint-stamps-default``: hundreds of real photographs and drawings with captions beside them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llava_pipeline.contracts import Cursor
from llava_pipeline.data.checks import STRUCTURE
from llava_pipeline.data.images import MIN_SIDE, ImageRefused, decode
from llava_pipeline.data.record import normalise
from llava_pipeline.data.sources.folder import FolderReader
from llava_pipeline.data.sources.reader import Broken
from llava_pipeline.spec import FolderSource
from tests.conftest import ROOT

STAMPS = Path("usr/share/tuxpaint/stamps")
PLACES = (Path("/") / STAMPS, ROOT / ".cache/tuxpaint-stamps-default" / STAMPS)


@pytest.fixture(scope="module")
def stamps() -> Path:
    """Where deploy/test_data.sh has put them."""
    if found := [place for place in PLACES if place.is_dir()]:
        return found[0]
    pytest.skip("there are no stamps here; get them with: bash deploy/test_data.sh")


def test_every_stamp_is_a_row_or_is_refused_by_name(stamps: Path) -> None:
    reader = FolderReader(FolderSource(path=str(stamps)), "train")
    on_disk = {path.relative_to(stamps).as_posix() for path in stamps.rglob("*.png")}
    captioned = {path for path in on_disk if (stamps / path).with_suffix(".txt").exists()}
    assert len(captioned) > 700
    assert reader.num_rows() == len(on_disk)

    prefix, told = f"{reader.origin}/", Counter[str]()
    for row in (row for piece in reader.pieces(Cursor()) for row in reader.rows(piece)):
        if isinstance(row, Broken):
            assert row.id.removeprefix(prefix) in on_disk - captioned
            told[row.reason] += 1
            continue
        record = normalise(row)
        path = stamps / record.id.removeprefix(prefix)
        assert [name for name, check in STRUCTURE.items() if check(record)] == []
        assert record.pairs == [
            ("Describe the picture.", path.with_suffix(".txt").read_text("utf-8").split("\n")[0].strip())
        ]
        with Image.open(path) as original:
            size = original.size
        try:
            picture = decode(record.images[0])
        except ImageRefused as refusal:
            assert min(size) < MIN_SIDE  # in the package of 2022, that is one of 39x7 pixels
            told[refusal.reason] += 1
            continue
        assert (picture.mode, picture.size) == ("RGB", size)
        told["kept"] += 1
    assert told.total() == len(on_disk)
    assert told["caption_missing"] == len(on_disk - captioned)
    assert told["image_too_small"] < 5
    assert set(told) <= {"kept", "caption_missing", "image_too_small"}


def test_what_is_transparent_around_a_stamp_becomes_white(stamps: Path) -> None:
    reader = FolderReader(FolderSource(path=str(stamps / "animals")), "train")
    corners = []
    for piece in reader.pieces(Cursor()):
        for row in list(reader.rows(piece))[::16]:
            if isinstance(row, dict):
                path = stamps / "animals" / row["id"].removeprefix(f"{reader.origin}/")
                with Image.open(path) as original:
                    if original.convert("RGBA").getpixel((0, 0))[3] == 0:  # type: ignore[index]
                        corners.append(decode(row["images"][0]["bytes"]).getpixel((0, 0)))
    assert len(corners) >= 3
    assert set(corners) == {(255, 255, 255)}
