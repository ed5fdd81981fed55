"""Every reason to refuse a row, and nothing but reasons."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_pipeline.data
from llava_pipeline.data import checks, leakage
from llava_pipeline.data.checks import REASONS, STRUCTURE, UNREAD
from llava_pipeline.data.examine import RowRefused, examine
from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.data.record import Record, Row, normalise
from llava_pipeline.model.processor import Processor
from llava_pipeline.spec import DataSpec, ScenesSource
from tests.data.rows import BAD, IMAGE, a_picture, a_row, a_talk, says

SPEC = DataSpec(source=ScenesSource(), max_samples=1, max_tokens=256)
WITHOUT_A_ROW = {*UNREAD, "answer_cut", "nothing_supervised"} - {"malformed"}


@pytest.mark.parametrize(
    ("reason", "row"),
    [pytest.param(reason, row, id=f"{reason}-{n}") for reason in BAD for n, row in enumerate(BAD[reason])],
)
def test_a_bad_row_is_refused_for_its_reason(reason: str, row: Row, processor: Processor) -> None:
    with pytest.raises(RowRefused) as caught:
        examine(row, processor, SPEC)
    assert caught.value.reason == reason
    assert caught.value.detail
    assert reason not in caught.value.detail


def test_every_reason_has_a_row_that_it_refuses() -> None:
    assert {*BAD, *WITHOUT_A_ROW} == set(REASONS)


def test_every_reason_says_in_one_sentence_what_is_asked_of_a_row() -> None:
    for reason, sentence in REASONS.items():
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert reason.isidentifier()
    assert not set(REASONS) & set(leakage.REASONS)


CODE = {path: path.read_text(encoding="utf-8") for path in Path(llava_pipeline.data.__path__[0]).rglob("*.py")}
TELLS = ("RowRefused", "ImageRefused", "Broken", "refuse_if", "Element", "Group")
"""Whatever takes a reason as one of its arguments."""


def reasons_in_the_code() -> set[str]:
    """Every constant that is given as the reason of a refusal; all but ``malformed`` are of several words."""
    named: set[str] = set()
    for text in CODE.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in TELLS:
                parts = [part for argument in node.args for part in ast.walk(argument)]
                constants = [part.value for part in parts if isinstance(part, ast.Constant)]
                named |= {
                    value for value in constants if isinstance(value, str) and re.fullmatch("[a-z]+(_[a-z]+)+", value)
                }
    return named


def test_every_reason_named_in_the_code_is_listed() -> None:
    assert {"image_missing", "text_too_long", "image_unreadable", "shard_unreadable"} <= reasons_in_the_code()
    assert reasons_in_the_code() <= set(REASONS)


def test_every_reason_listed_is_named_in_the_code() -> None:
    others = "".join(text for path, text in CODE.items() if path.name != "checks.py")
    assert [reason for reason in REASONS if reason not in STRUCTURE and f'"{reason}"' not in others] == []


def test_a_check_that_no_source_tells_is_a_function_of_the_reasons_name() -> None:
    for reason in set(REASONS) - set(UNREAD) - set(checks.IMAGE_GATE):
        assert callable(getattr(checks, reason))


# --------------------------------------------------------------------------------------------- order


def test_the_reasons_are_listed_in_the_order_in_which_a_row_meets_them() -> None:
    order = list(REASONS)
    told = ["malformed", "no_messages", "empty_turn", "no_image", "text_too_long", "special_token_in_text"]
    told += ["image_unreadable", "too_many_tokens", "nothing_supervised"]
    assert sorted(told, key=order.index) == told


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("empty_turn", a_row(b"no picture", messages=a_talk("What?", " "))),
        ("control_characters", a_row(b"no picture", messages=a_talk("What?", "\0"))),
        ("control_characters", a_row(messages=a_talk("What? </s>", "\0"))),
        ("text_too_long", a_row(messages=a_talk("</s>" * 10_000, "\0"))),
        ("image_unreadable", a_row(b"no picture", messages=a_talk("What color? " * 400, "red"))),
    ],
)
def test_a_row_with_several_faults_is_refused_for_the_one_that_costs_least(
    reason: str, row: Row, processor: Processor
) -> None:
    with pytest.raises(RowRefused) as caught:
        examine(row, processor, SPEC)
    assert caught.value.reason == reason


# --------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("markers", "images", "reason"),
    [
        *((n, m, "image_count_mismatch") for n in range(3) for m in range(3) if n != m),
        (0, 0, "no_image"),
        (1, 1, None),
        (2, 2, "not_one_image"),
    ],
)
def test_markers_and_images_are_counted(markers: int, images: int, reason: str | None) -> None:
    messages = [says("user", "What?", *[IMAGE] * markers), says("assistant", "red")]
    record = normalise(a_row(images=[a_picture()] * images, messages=messages))
    assert next((name for name, check in STRUCTURE.items() if check(record)), None) == reason


def test_the_image_may_come_after_the_question() -> None:
    first = {"role": "user", "content": [{"type": "text", "text": "What is this: "}, IMAGE]}
    record = normalise(a_row(messages=[first, says("assistant", "red")]))
    assert [name for name, check in STRUCTURE.items() if check(record)] == []


# --------------------------------------------------------------------------------------------- text


def talk_of(text: str) -> Record:
    return normalise(a_row(messages=a_talk(text, "red")))


@pytest.mark.parametrize(
    "text",
    [
        "\u05e9\u05dc\u05d5\u05dd \u202bRTL\u202c \u200f",  # Hebrew, with marks of direction
        "zero\u200bwidth\u200d\ufeff",
        "\U0001f469\u200d\U0001f680 e\u0301 \ufffd \ue000 \U0010ffff",
        "tab\t, line\n and return\r\n",
        "1 < 2 <b>bold</b> <strong> [1] <| |> a<s b> < s > <user> <|> <||>",
        "\u00a0\u2028\u3000wide\u00ad",
    ],
)
def test_unusual_text_is_fine(text: str, processor: Processor) -> None:
    assert checks.control_characters(talk_of(text)) is None
    assert checks.special_token_in_text(talk_of(text), processor.special_tokens) is None
    assert examine(a_row(messages=a_talk(text, "red")), processor, SPEC)


@given(character=st.characters(categories=["Cc"]))
def test_of_all_control_characters_three_are_text(character: str) -> None:
    assert (checks.control_characters(talk_of(f"a{character}b")) is None) == (character in "\n\t\r")


def test_every_special_token_of_the_tokenizer_is_found(processor: Processor) -> None:
    assert {"<s>", "</s>", "<image>"} <= set(processor.special_tokens)
    for token in processor.special_tokens:
        told = checks.special_token_in_text(talk_of(f"What is {token}?"), processor.special_tokens)
        assert told == f"turn 0 says {token!r} at character 8"
    assert checks.special_token_in_text(talk_of("A <turn> here"), ("<turn>",)) is not None
    assert checks.special_token_in_text(talk_of("A <turn> here"), ()) is None


def test_a_special_token_in_two_items_is_found(processor: Processor) -> None:
    items = [IMAGE, {"type": "text", "text": "the </"}, {"type": "text", "text": "s> end"}]
    record = normalise(a_row(messages=[{"role": "user", "content": items}, says("assistant", "red")]))
    assert checks.special_token_in_text(record, processor.special_tokens) == "turn 0 says '</s>' at character 4"


def test_the_cap_on_text_is_in_bytes_and_the_last_byte_counts() -> None:
    most = checks.MAX_BYTES_PER_TOKEN * 100
    assert checks.text_too_long(talk_of("\u20ac" * ((most - 4) // 3)), 100) is None  # 6,396 bytes and "red"
    assert (
        checks.text_too_long(talk_of("\u20ac" * ((most - 1) // 3)), 100)
        == "6402 bytes, at most 64 for each of 100 tokens"
    )
    assert checks.text_too_long(talk_of("a" * (most - 3)), 100) is None
    assert (
        checks.text_too_long(talk_of("a" * (most - 2)), 100) == f"{most + 1} bytes, at most 64 for each of 100 tokens"
    )


def test_more_turns_than_tokens_are_too_much_text() -> None:
    assert checks.text_too_long(normalise(a_row(messages=a_talk(*["a"] * 100))), 100) is None
    assert checks.text_too_long(normalise(a_row(messages=a_talk(*["a"] * 102))), 100) == "102 turns, at most 100 tokens"


@settings(deadline=None)
@given(text=st.text(min_size=1))
def test_what_fits_in_tokens_fits_in_bytes(text: str, processor: Processor) -> None:
    """The cap refuses nothing that would have fitted: it only tells sooner."""
    record = talk_of(text)
    num_tokens = len(processor.encode(record.messages).input_ids)
    assert checks.text_too_long(record, num_tokens) is None


# --------------------------------------------------------------------------------------------- pictures


def test_the_image_gate_raises_its_own_kind_of_refusal() -> None:
    with pytest.raises(ImageRefused) as caught:
        decode(b"no picture")
    assert caught.value.reason == "image_unreadable"
    assert str(caught.value) == f"image_unreadable: {caught.value.detail}"


def test_the_page_on_data_lists_every_reason_with_its_sentence() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for reason, sentence in (checks.REASONS | leakage.REASONS).items():
        assert f"| `{reason}` | {sentence} |" in page
