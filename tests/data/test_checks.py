"""Every reason to refuse a row, and nothing but reasons."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_pipeline.data
from llava_pipeline.data.checks import REASONS, STRUCTURE
from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.data.record import Malformed, Record, Row, normalise
from llava_pipeline.data.snapshot import RowRefused, check
from llava_pipeline.model.processor import Processor
from tests.data.rows import BAD, IMAGE, a_picture, a_row, says

MAX_TOKENS = 256
HALF_PAIRS = st.characters(categories=["Cs"])
TEXT = st.text(min_size=1, max_size=12) | st.text(st.characters() | HALF_PAIRS, max_size=12)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=6) | st.just("user"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "bytes"]), inner, max_size=4)
    ),
    max_leaves=8,
)
TEXT_ITEM = st.builds(lambda text: {"type": "text", "text": text}, TEXT)
CONTENT = TEXT | st.lists(TEXT_ITEM, min_size=1, max_size=3) | st.lists(TEXT_ITEM | st.just(IMAGE), max_size=3)


@st.composite
def nearly_rows(draw: st.DrawFn) -> Row:
    """A row as it should be but for its texts, now and then with something else in one place."""
    first = [IMAGE, *draw(st.lists(TEXT_ITEM, min_size=1, max_size=2))]
    contents = [first, *draw(st.lists(CONTENT, min_size=1, max_size=3))]
    roles = ["user", "assistant"] * len(contents)
    row: Row = {
        "messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)],
        "images": [a_picture()],
    }
    if draw(st.booleans()):
        row["kinds"] = ["all"] * (len(contents) // 2)
    if draw(st.integers(0, 3)) == 0:
        row[draw(st.sampled_from(["id", "messages", "images", "kinds"]))] = draw(ANYTHING)
    return row


ROWS = nearly_rows() | nearly_rows() | st.dictionaries(st.sampled_from(["id", "messages", "images", "kinds"]), ANYTHING)


@pytest.mark.parametrize(
    ("reason", "row"),
    [pytest.param(reason, row, id=f"{reason}-{n}") for reason in BAD for n, row in enumerate(BAD[reason])],
)
def test_a_bad_row_is_refused_for_its_reason(reason: str, row: Row, processor: Processor) -> None:
    with pytest.raises(RowRefused) as caught:
        check(row, processor, MAX_TOKENS)
    assert caught.value.reason == reason
    assert caught.value.detail
    assert reason not in caught.value.detail


def test_a_row_of_which_nothing_would_be_learned_is_refused(mute: Processor) -> None:
    with pytest.raises(RowRefused) as caught:
        check(a_row(), mute, MAX_TOKENS)
    assert caught.value.reason == "nothing_supervised"


def test_every_reason_has_a_row_that_it_refuses() -> None:
    assert {*BAD, "nothing_supervised"} == set(REASONS)
    assert len(REASONS) == len(set(REASONS))


def test_every_reason_named_in_the_code_is_listed() -> None:
    named: set[str] = set(STRUCTURE)
    for path in Path(llava_pipeline.data.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(ast.Name("RowRefused" | "ImageRefused"), [ast.Constant(reason), *_]):
                    named.add(reason)
    assert named == set(REASONS)


def test_a_good_row_is_kept_as_it_says(processor: Processor) -> None:
    messages = [
        says("user", "\nWhat color is it?", IMAGE),
        says("assistant", "red"),
        says("user", " And? "),
        says("assistant", "so"),
    ]
    record, encoded = check(a_row(messages=messages, kinds=["color", "all"]), processor, MAX_TOKENS)
    assert record.pairs == [("What color is it?", "red"), ("And?", "so")]
    assert (record.id, record.images, record.kinds) == ("row", [a_picture()], ["color", "all"])
    assert len(encoded.input_ids) == len(encoded.labels) <= MAX_TOKENS


def test_plain_text_is_taken_as_one_text_item() -> None:
    record = normalise({"messages": [{"role": "user", "content": "What?"}]})
    assert record == Record("", [says("user", "What?")], [])


def test_fields_that_are_not_asked_for_are_left_behind() -> None:
    item = {"index": 0, "text": None, "type": "image"}
    record = normalise({"messages": [{"role": "user", "content": [item], "weight": 1}], "images": [], "license": "MIT"})
    assert record.messages == [{"role": "user", "content": [IMAGE]}]


def test_an_image_is_bytes_with_or_without_a_wrapper() -> None:
    assert normalise(a_row(images=[b"x", {"bytes": b"y", "path": None}])).images == [b"x", b"y"]


def test_the_token_limit_is_the_longest_kept(processor: Processor) -> None:
    longest = len(check(a_row(), processor, 10**6)[1].input_ids)
    assert check(a_row(), processor, longest)
    with pytest.raises(RowRefused, match=f"too_many_tokens: {longest} tokens, at most {longest - 1}"):
        check(a_row(), processor, longest - 1)


@settings(deadline=None, max_examples=150)
@given(row=ROWS)
def test_a_wild_row_is_a_record_or_malformed(row: Row) -> None:
    try:
        record = normalise(row)
    except Malformed:
        return
    assert all(isinstance(image, bytes) for image in record.images)
    for message in record.messages:
        assert set(message) == {"role", "content"}
        assert all(
            set(item) == ({"type", "text"} if item["type"] == "text" else {"type"}) for item in message["content"]
        )
    assert isinstance(record.num_markers, int)


@settings(deadline=None, max_examples=200)
@given(row=ROWS)
def test_a_wild_row_is_kept_or_refused_for_a_listed_reason(row: Row, processor: Processor) -> None:
    refused = None
    try:
        record, encoded = check(row, processor, MAX_TOKENS)
    except RowRefused as refusal:
        refused = refusal
    if refused is not None:
        assert refused.reason in REASONS
        return
    assert [message["role"] for message in record.messages] == ["user", "assistant"] * len(record.pairs)
    assert len(record.images) == record.num_markers == 1
    assert any(label >= 0 for label in encoded.labels)
    # What is kept can be written: texts are valid Unicode, and a question's kind is there or nowhere.
    assert all(text.encode() is not None for pair in record.pairs for text in pair)
    assert len(record.kinds) in (0, len(record.pairs))


def test_the_image_gate_raises_its_own_kind_of_refusal() -> None:
    with pytest.raises(ImageRefused) as caught:
        decode(b"no picture")
    assert (caught.value.reason, str(caught.value)) == ("image_unreadable", "image_unreadable: UnidentifiedImageError")
