"""What only other rows can tell: duplicates within a split, and pictures that cross from one split to the other."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable

import pytest
from PIL import Image

from llava_pipeline.contracts import Snapshot
from llava_pipeline.data import scenes
from llava_pipeline.data.fingerprint import fingerprint
from llava_pipeline.data.images import decode
from llava_pipeline.data.leakage import split_of
from llava_pipeline.data.record import Row
from llava_pipeline.data.snapshot import open_rows
from llava_pipeline.model.processor import Processor
from llava_pipeline.store import open_artifact
from tests.data.listed import a_spec, taken
from tests.data.rows import IMAGE, TEXT_ONLY, a_row, says


def encoded(picture: Image.Image, format: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def scene(number: int) -> Image.Image:
    return scenes.draw(scenes.scene_at(3, "train", number)[0])


def row(name: str, picture: bytes, answer: str = "red") -> Row:
    return a_row(picture, id=name, messages=[says("user", "\nWhat?", IMAGE), says("assistant", answer)])


def refusals(snapshot: Snapshot) -> dict[str, str]:
    """Reason by id."""
    text = (open_artifact(snapshot.rows) / "rejected.jsonl").read_text(encoding="utf-8")
    return {line["id"]: line["reason"] for line in map(json.loads, text.splitlines())}


def mirrored(picture: Image.Image) -> bytes:
    return encoded(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "JPEG", quality=85)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "the file itself": encoded,
    "the same pixels in another format": lambda picture: encoded(picture, "BMP"),
    "re-encoded": lambda picture: encoded(picture, "JPEG", quality=60),
    "smaller": lambda picture: encoded(picture.resize((80, 80), Image.Resampling.BICUBIC)),
    "larger": lambda picture: encoded(picture.resize((300, 300), Image.Resampling.BICUBIC), "WEBP", quality=80),
    "mirrored": mirrored,
}
EXACT = ("the file itself", "the same pixels in another format")


@pytest.mark.parametrize("how", COPIES)
def test_a_training_row_may_not_show_a_held_out_picture(how: str, processor: Processor) -> None:
    held_out, pictures = taken([row("asked", encoded(scene(0)))], processor, split="test")
    rows = [row("copy", COPIES[how](scene(0)), "another answer"), row("other", encoded(scene(1)))]
    train, _ = taken(rows, processor, held_out=pictures)
    assert refusals(train) == {"copy": "image_in_held_out" if how in EXACT else "image_near_held_out"}
    assert (held_out.num_kept, train.num_kept, train.num_read) == (1, 1, 2)


def test_one_picture_may_have_many_conversations_and_is_stored_once(processor: Processor) -> None:
    rows = [row(str(n), encoded(scene(0), "PNG" if n % 2 else "BMP"), f"answer {n}") for n in range(4)]
    snapshot, _ = taken(rows, processor)
    assert (snapshot.num_kept, snapshot.num_images, snapshot.num_near_duplicates) == (4, 1, 0)


def test_look_alikes_within_a_split_are_kept_and_told(processor: Processor) -> None:
    rows = [row("one", encoded(scene(0))), row("two", encoded(scene(1))), row("like one", COPIES["smaller"](scene(0)))]
    snapshot, _ = taken(rows, processor)
    assert (snapshot.num_kept, snapshot.num_images, snapshot.num_near_duplicates) == (3, 3, 1)
    near = (open_artifact(snapshot.rows) / "near.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in near.splitlines()] == [{"image": 2, "like": 0}]


def test_pictures_shown_again_are_refused_where_the_spec_says_so(processor: Processor) -> None:
    rows = [row("one", encoded(scene(0))), row("again", encoded(scene(0)), "blue"), row("like", mirrored(scene(0)))]
    snapshot, _ = taken(rows, processor, spec=a_spec(repeated_images="refuse"))
    assert refusals(snapshot) == {"again": "image_repeated", "like": "image_near_repeated"}


def test_the_same_id_or_the_same_conversation_again_is_refused(processor: Processor) -> None:
    rows = [
        row("one", encoded(scene(0)), "a red star"), row("one", encoded(scene(1)), "green"),
        row("two", encoded(scene(0), "BMP"), "A  red STAR"), row("three", encoded(scene(0)), "a red cross"),
        row("", encoded(scene(2))), row("", encoded(scene(3))),
    ]  # fmt: skip
    snapshot, _ = taken(rows, processor)
    assert refusals(snapshot) == {"one": "duplicate_id", "two": "duplicate_row"}
    assert open_rows(snapshot.rows).ids == ["one", "three", "", ""]


def test_a_refused_row_does_not_take_its_id_or_picture_with_it(processor: Processor) -> None:
    broken = a_row(encoded(scene(0)), id="one", messages=[says("user", "\nWhat?", IMAGE)])
    snapshot, _ = taken([broken, row("one", encoded(scene(0)))], processor)
    assert refusals(snapshot) == {"one": "no_messages"}
    assert (snapshot.num_kept, snapshot.num_images) == (1, 1)


# --------------------------------------------------------------------------------------------- split by picture


def both(rows: list[Row], processor: Processor) -> tuple[Snapshot, Snapshot]:
    spec = a_spec(held_out_share=0.3)
    held_out, pictures = taken(rows, processor, spec=spec, split="test", has_split=False)
    return taken(rows, processor, spec=spec, held_out=pictures, has_split=False)[0], held_out


def test_all_rows_of_a_picture_go_to_one_split_and_every_row_to_exactly_one(processor: Processor) -> None:
    rows = [row(f"{n}", encoded(scene(n // 2), "BMP" if n % 2 else "PNG"), f"answer {n}") for n in range(60)]
    train, held_out = both(rows, processor)
    ids = (open_rows(train.rows).ids, open_rows(held_out.rows).ids)
    assert sorted([*ids[0], *ids[1]], key=int) == [str(n) for n in range(60)]
    assert {int(name) // 2 for name in ids[0]}.isdisjoint(int(name) // 2 for name in ids[1])
    assert 4 <= held_out.num_kept <= 32


def test_what_shows_no_picture_is_counted_once_with_the_training_rows(processor: Processor) -> None:
    rows = [row("one", encoded(scene(0))), a_row(b"no picture", id="broken"), {**TEXT_ONLY, "id": "text"}]
    rows += [row(f"{n}", encoded(scene(n))) for n in range(1, 12)]
    train, held_out = both(rows, processor)
    assert train.num_read + held_out.num_read == len(rows)
    assert refusals(train) == {"broken": "image_unreadable", "text": "no_image"}
    assert held_out.rejected == {}


def test_a_held_out_row_needs_a_picture_even_where_text_alone_may_be_trained_on(processor: Processor) -> None:
    spec = a_spec(text_only="keep")
    rows = [{**TEXT_ONLY, "id": "text"}, row("one", encoded(scene(0)))]
    held_out, _ = taken(rows, processor, spec=spec, split="test")
    train, _ = taken(rows, processor, spec=spec)
    assert (refusals(held_out), refusals(train)) == ({"text": "no_image"}, {})
    assert open_rows(train.rows).image == [-1, 0]


def test_about_the_share_of_pictures_is_held_out() -> None:
    random_bytes = random.Random(0).randbytes
    held_out = sum(split_of(random_bytes(32), 0.1) == "test" for _ in range(20_000))
    assert held_out == pytest.approx(2000, rel=0.08)
    pixels = fingerprint(decode(encoded(scene(0)))).pixels
    assert split_of(pixels, 0.1) == split_of(pixels, 0.1)
