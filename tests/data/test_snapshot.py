"""A snapshot: every row read is kept or refused with its reason, once, and the same rows are the same artifact."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.contracts import Cursor
from llava_pipeline.data.record import Row
from llava_pipeline.data.snapshot import BUFFER_ROWS, leading_reasons, open_rows
from llava_pipeline.data.sources.reader import PIECE_ROWS
from llava_pipeline.errors import DiskFull, LlavaPipelineError, NothingToLearn, SourceUnavailable, TooManyRejected
from llava_pipeline.model.processor import IGNORE_INDEX, Processor
from llava_pipeline.spec import ScenesSource
from llava_pipeline.store import open_artifact
from tests.data.listed import ORIGIN, a_spec, taken
from tests.data.rows import BAD, IMAGE, a_picture, a_row, says


def good_rows(count: int, first: int = 0) -> list[Row]:
    return [a_row(a_picture(n), id=f"good/{n}") for n in range(first, first + count)]


def bad_rows() -> list[Row]:
    """All of them, with ids of their own where an id is not what is wrong."""
    return [
        {**row, "id": f"bad/{reason}/{n}"} if isinstance(row.get("id"), str) and row["id"] == "row" else row
        for reason, rows in BAD.items() for n, row in enumerate(rows)
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- totals


def test_every_row_read_is_kept_or_refused_once(processor: Processor) -> None:
    rows = [row for pair in itertools.zip_longest(good_rows(20), bad_rows()) for row in pair if row is not None]
    snapshot, _ = taken(rows, processor)
    assert snapshot.num_read == len(rows) == snapshot.num_kept + sum(snapshot.rejected.values())
    assert snapshot.num_kept == 20
    assert snapshot.rejected == {reason: len(BAD[reason]) for reason in sorted(BAD)}
    assert (snapshot.origin, snapshot.source) == (ORIGIN, ScenesSource())
    assert (snapshot.began, snapshot.ended) == (Cursor(), Cursor(row=len(rows)))
    totals = json.loads((open_artifact(snapshot.rows) / "totals.json").read_text(encoding="utf-8"))
    assert totals.items() >= {"num_read": len(rows), "num_kept": 20, "rejected": snapshot.rejected}.items()


def test_a_refused_row_is_on_file_with_its_reason_and_where_it_was(processor: Processor) -> None:
    bad = [{**rows[0], "id": f"bad/{reason}"} for reason, rows in BAD.items()]
    snapshot, _ = taken([*good_rows(2), *bad, *good_rows(1, 2)], processor)
    text = (open_artifact(snapshot.rows) / "rejected.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [(f"bad/{reason}", reason) for reason in BAD]
    assert [(line["shard"], line["row"]) for line in lines] == [(0, n) for n in range(2, 2 + len(bad))]
    assert all(line["detail"] and len(line["digest"]) == 64 for line in lines)


def test_tokens_are_counted_as_they_are_kept(processor: Processor) -> None:
    snapshot, _ = taken(good_rows(5), processor)
    rows = open_rows(snapshot.rows)
    assert snapshot.num_tokens == sum(len(ids) for ids in rows.input_ids)
    assert snapshot.num_supervised_tokens == sum(int((labels != IGNORE_INDEX).sum()) for labels in rows.labels) > 0


def test_no_more_is_taken_than_is_wanted(processor: Processor) -> None:
    advanced: list[int] = []
    rows = [*good_rows(3), BAD["malformed"][0], *good_rows(9, 3)]
    snapshot, _ = taken(rows, processor, 4, advance=lambda: advanced.append(1))
    assert (snapshot.num_read, snapshot.num_kept, len(advanced)) == (5, 4, 4)
    assert snapshot.ended == Cursor(row=5)


def test_a_source_that_ends_early_gives_what_it_has(processor: Processor) -> None:
    assert taken(good_rows(3), processor, wanted=50)[0].num_kept == 3


# --------------------------------------------------------------------------------------------- what is on disk


def test_a_snapshot_opens_as_it_was_taken(processor: Processor) -> None:
    messages = [
        *(says("user", "\nWhat color is it?", IMAGE), says("assistant", "red")),
        *(says("user", "Is it “round”?"), says("assistant", "no")),
    ]
    picture = a_picture(7, size=(20, 12), format="GIF")
    snapshot, _ = taken(
        [a_row(picture, id="one", messages=messages, kinds=["color", "yes/no"]), a_row(id="two")], processor
    )
    rows = open_rows(snapshot.rows)
    assert len(rows) == 2
    assert rows.ids == ["one", "two"]
    assert rows.questions == [["What color is it?", "Is it “round”?"], ["What color is it?"]]
    assert rows.answers == [["red", "no"], ["red"]]
    assert rows.kinds == [["color", "yes/no"], ["all"]]
    encoded = processor.encode(messages)
    assert rows.input_ids[0].tolist() == encoded.input_ids
    assert rows.labels[0].tolist() == encoded.labels
    assert rows.images[rows.image[0]] == picture
    assert (rows.picture(rows.image[0]).size, rows.picture(rows.image[0]).mode) == ((20, 12), "RGB")


def asks(number: int) -> list[dict[str, Any]]:
    return [says("user", f"\nIs it number {number}?", IMAGE), says("assistant", "yes")]


def test_an_image_is_stored_once_however_many_rows_show_it(processor: Processor) -> None:
    pictures = [a_picture(shade) for shade in (0, 1, 0, 2, 1, 0)]
    rows_of = [a_row(picture, id=str(n), messages=asks(n)) for n, picture in enumerate(pictures)]
    snapshot, _ = taken(rows_of, processor)
    rows = open_rows(snapshot.rows)
    assert snapshot.num_images == len(rows.images) == 3
    assert [rows.images[image] for image in rows.image] == pictures


def test_rows_keep_their_images_across_shards(processor: Processor) -> None:
    rows = [a_row(a_picture(n % 700), id=str(n), messages=asks(n)) for n in range(BUFFER_ROWS + 200)]
    snapshot, _ = taken(rows, processor, wanted=len(rows))
    kept = open_rows(snapshot.rows)
    assert snapshot.num_images == len(kept.images) == 700
    assert [kept.images[image] for image in kept.image] == [row["images"][0]["bytes"] for row in rows]


def test_the_same_rows_are_the_same_artifact(processor: Processor, home: Path) -> None:
    rows = [*good_rows(6), *(row for rows in BAD.values() for row in rows[:1])]
    (first, _), (again, _) = taken(rows, processor), taken(rows, processor)
    assert first == again
    assert taken(rows[1:], processor)[0].rows.digest != first.rows.digest
    assert len(list((home / "store" / "snapshot").iterdir())) == 2


# --------------------------------------------------------------------------------------------- what ends a run


def test_too_many_refusals_name_the_leading_reasons(processor: Processor) -> None:
    rows = [
        *good_rows(6),
        *BAD["image_unreadable"][:3],
        *BAD["image_unreadable"][:1],
        *BAD["empty_turn"][:2],
        *BAD["malformed"][:1],
    ]
    with pytest.raises(TooManyRejected) as caught:
        taken(rows, processor, spec=a_spec(0.5))
    assert str(caught.value) == (
        "of 13 rows were refused 7 (image_unreadable 4, empty_turn 2, malformed 1), more than "
        "data.max_rejected_share=0.5; mend the data or raise the limit"
    )


def test_the_share_itself_is_allowed(processor: Processor) -> None:
    assert taken([*good_rows(3), BAD["malformed"][0]], processor, spec=a_spec(0.25))[0].num_kept == 3


def test_an_endless_bad_source_is_left_after_200_rows(processor: Processor) -> None:
    rows = itertools.count()
    odd = (BAD["no_messages"][0] if n % 2 else a_row(a_picture(n), id=str(n)) for n in rows)
    with pytest.raises(TooManyRejected, match="of 200 rows were refused 100"):
        taken(odd, processor, wanted=10**6, spec=a_spec(0.02))
    assert next(rows) <= PIECE_ROWS


def test_a_bad_beginning_alone_does_not_end_a_run(processor: Processor) -> None:
    rows = [*BAD["no_messages"], *good_rows(198)]
    assert taken(rows, processor, wanted=198, spec=a_spec(0.02))[0].rejected == {"no_messages": 2}


def test_nothing_to_learn_where_every_row_was_refused(processor: Processor, mute: Processor) -> None:
    with pytest.raises(NothingToLearn, match=r"all 2 rows of rows/train were refused: 2 \(no_messages 2\)"):
        taken(BAD["no_messages"], processor)
    with pytest.raises(NothingToLearn, match=r"nothing_supervised 3"):
        taken(good_rows(3), mute)


def test_a_source_without_rows_is_told(processor: Processor) -> None:
    with pytest.raises(NothingToLearn, match=r"rows/train has no rows; check data\.source"):
        taken([], processor)


def breaks_off(error: Exception) -> Iterator[Row]:
    yield from good_rows(3)
    raise error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], NothingToLearn),
        (BAD["empty_turn"], NothingToLearn),
        ([*good_rows(1), *BAD["empty_turn"]], TooManyRejected),
        (breaks_off(SourceUnavailable("the hub went away")), SourceUnavailable),
        (breaks_off(KeyboardInterrupt()), KeyboardInterrupt),  # type: ignore[arg-type]
        (breaks_off(FULL), DiskFull),
    ],
)
def test_nothing_is_left_in_the_store_when_it_fails(
    rows: Iterable[Row], error: type[LlavaPipelineError], processor: Processor, home: Path
) -> None:
    with pytest.raises(error):
        taken(rows, processor, spec=a_spec(0.5 if error is TooManyRejected else 1.0))
    assert list((home / "store" / "snapshot").iterdir()) == []


def test_leading_reasons_are_at_most_three() -> None:
    assert leading_reasons({"a": 1, "b": 4, "c": 2, "d": 3}) == "10 (b 4, d 3, c 2)"
    assert leading_reasons({}) == "0"
