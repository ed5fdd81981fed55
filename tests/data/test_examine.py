"""A row is accepted with its tokens and its picture's fingerprint, or refused by name; whatever it is, nothing else."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_pipeline.data import examine as examining
from llava_pipeline.data import scenes
from llava_pipeline.data.checks import MAX_BYTES_PER_TOKEN, REASONS
from llava_pipeline.data.examine import MAX_DETAIL, PICTURES_REMEMBERED, Accepted, RowRefused, examine, look, printable
from llava_pipeline.data.fingerprint import fingerprint
from llava_pipeline.data.images import MAX_BYTES, ImageRefused, decode
from llava_pipeline.data.record import Malformed, Record, Row, normalise
from llava_pipeline.data.sources.reader import Broken
from llava_pipeline.model.processor import IGNORE_INDEX, Processor
from llava_pipeline.spec import DataSpec, ScenesSource
from tests.data.rows import BAD, IMAGE, TEXT_ONLY, a_picture, a_png, a_row, a_talk, nested, says


def a_spec(**changes: Any) -> DataSpec:
    return DataSpec(**{"source": ScenesSource(), "max_samples": 1, "max_tokens": 256, **changes})


SPEC = a_spec()
CUT = a_spec(when_too_long="cut")
KEEP = a_spec(text_only="keep")


def refusal_of(row: Any, processor: Processor, spec: DataSpec = SPEC) -> RowRefused:
    with pytest.raises(RowRefused) as caught:
        examine(row, processor, spec)
    return caught.value


@pytest.fixture(autouse=True)
def _unseen() -> None:
    """No picture is remembered from another test."""
    examining._pictures.clear()


# --------------------------------------------------------------------------------------------- what is accepted


def test_a_good_row_is_kept_as_it_says(processor: Processor) -> None:
    messages = a_talk("\nWhat color is it?", "red", " And? ", "so")
    accepted = examine(a_row(messages=messages, kinds=["color", "all"]), processor, SPEC)
    record, encoded = accepted.record, accepted.encoded
    assert record.pairs == [("What color is it?", "red"), ("And?", "so")]
    assert (record.id, record.images, record.kinds) == ("row", [a_picture()], ["color", "all"])
    assert encoded == processor.encode(messages)
    assert accepted.picture == fingerprint(decode(a_picture()))


def test_plain_text_is_taken_as_one_text_item() -> None:
    record = normalise({"messages": [{"role": "user", "content": "What?"}]})
    assert record == Record("", [says("user", "What?")], [])


def test_fields_that_are_not_asked_for_are_left_behind() -> None:
    item = {"index": 0, "text": None, "type": "image"}
    empty = {"index": 1, "text": "", "type": "text"}
    message = {"role": "user", "content": [item, empty], "weight": 1}
    record = normalise({"messages": [message], "images": [], "license": "MIT"})
    assert record.messages == [{"role": "user", "content": [IMAGE]}]


def test_an_image_is_bytes_with_or_without_a_wrapper() -> None:
    assert normalise(a_row(images=[b"x", {"bytes": b"y", "path": None}])).images == [b"x", b"y"]


@pytest.mark.parametrize(
    ("found", "kept"),
    [(None, ""), ("a/7", "a/7"), (7, "7"), (-(2**63), str(-(2**63))), (1.5, "1.5"), (float("nan"), ""), ("", "")],
)
def test_an_id_is_a_text_or_a_number_and_nan_is_none(found: object, kept: str) -> None:
    assert normalise(a_row(id=found)).id == kept


def test_the_token_limit_is_the_longest_kept(processor: Processor) -> None:
    longest = len(examine(a_row(), processor, a_spec(max_tokens=10**6)).encoded.input_ids)
    assert examine(a_row(), processor, a_spec(max_tokens=longest))
    refusal = refusal_of(a_row(), processor, a_spec(max_tokens=longest - 1))
    assert str(refusal) == f"too_many_tokens: {longest} tokens, at most {longest - 1}"


def test_a_row_of_which_nothing_would_be_learned_is_refused(mute: Processor) -> None:
    assert refusal_of(a_row(), mute).reason == "nothing_supervised"


def test_a_conversation_without_a_picture_is_kept_where_the_spec_says_so(processor: Processor) -> None:
    assert refusal_of(TEXT_ONLY, processor).reason == "no_image"
    accepted = examine(TEXT_ONLY, processor, KEEP)
    assert (accepted.record.images, accepted.picture) == ([], None)
    assert processor.image_token_id not in accepted.encoded.input_ids
    assert examine(a_row(), processor, KEEP).picture is not None


# --------------------------------------------------------------------------------------------- what is cut


def a_long_talk(*lengths: int) -> Row:
    """A row with a round for every length, its answer of about so many tokens."""
    texts = [text for length in lengths for text in ("What color?", "red " * length + ".")]
    return a_row(messages=a_talk(*texts), kinds=[str(number) for number in range(len(lengths))])


def test_whole_rounds_are_cut_from_the_end_until_the_rest_fits(processor: Processor) -> None:
    row = a_long_talk(60, 60, 60, 60, 1)
    assert refusal_of(row, processor).reason == "too_many_tokens"
    accepted = examine(row, processor, CUT)
    num_rounds = accepted.record.num_rounds
    assert accepted.record == normalise(row).first(num_rounds)
    assert accepted.record.kinds == [str(number) for number in range(num_rounds)]
    assert accepted.encoded == processor.encode(row["messages"][: 2 * num_rounds])
    assert (
        len(accepted.encoded.input_ids) <= 256 < len(processor.encode(row["messages"][: 2 * num_rounds + 2]).input_ids)
    )
    assert 0 < num_rounds < 5


def test_a_conversation_that_fits_is_not_cut(processor: Processor) -> None:
    row = a_long_talk(3, 3)
    longest = len(processor.encode(row["messages"]).input_ids)
    assert examine(row, processor, a_spec(max_tokens=longest, when_too_long="cut")).record == normalise(row)
    shorter = examine(row, processor, a_spec(max_tokens=longest - 1, when_too_long="cut"))
    assert shorter.record.num_rounds == 1


def test_an_answer_is_never_cut(processor: Processor) -> None:
    assert refusal_of(a_long_talk(300, 1), processor, CUT).reason == "answer_cut"
    fits_not = a_spec(max_tokens=9, when_too_long="cut")  # fewer than a picture takes
    assert refusal_of(a_row(), processor, fits_not).reason == "answer_cut"


def test_what_is_far_too_long_is_cut_without_being_tokenised(processor: Processor) -> None:
    row = a_row(messages=a_talk("What?", "red", "What color? " * 900_000, "red"))
    assert refusal_of(row, processor).reason == "text_too_long"
    assert examine(row, processor, CUT).record.pairs == [("What?", "red")]
    many = a_row(messages=a_talk(*["a"] * 20_000))
    assert 1 < examine(many, processor, CUT).record.num_rounds < 128
    assert refusal_of(BAD["text_too_long"][0], processor, CUT).reason == "text_too_long"


@pytest.mark.parametrize("share", [0.999, 1.001, 1.2, 2.5])
def test_a_round_that_takes_the_text_over_the_cap_is_cut_off(processor: Processor, share: float) -> None:
    row = a_row(messages=a_talk("What?", "red", "a" * int(share * MAX_BYTES_PER_TOKEN * CUT.max_tokens), "red"))
    assert examine(row, processor, CUT).record.num_rounds == 1


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(0, 80), min_size=1, max_size=12), max_tokens=st.integers(40, 300))
def test_a_cut_conversation_ends_with_a_whole_answer(lengths: list[int], max_tokens: int, processor: Processor) -> None:
    row = a_long_talk(*lengths)
    spec = a_spec(max_tokens=max_tokens, when_too_long="cut")
    first = len(processor.encode(row["messages"][:2]).input_ids)
    if first > max_tokens:
        assert refusal_of(row, processor, spec).reason == "answer_cut"
        return
    accepted = examine(row, processor, spec)
    assert sound(accepted, processor, spec)
    whole = processor.encode(row["messages"])
    kept = len(accepted.encoded.input_ids)
    assert accepted.encoded.input_ids == whole.input_ids[:kept]
    assert accepted.encoded.labels == whole.labels[:kept]
    assert kept == len(whole.input_ids) or accepted.encoded.labels[-1] == processor.tokenizer.eos_token_id


# --------------------------------------------------------------------------------------------- anything at all

HALF_PAIRS = st.characters(categories=["Cs"])
TEXT = st.text(min_size=1, max_size=12) | st.text(st.characters() | HALF_PAIRS, max_size=12)
HUGE = st.integers(4300, 6000).map(lambda digits: 10**digits)  # no text can be made of it
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**64, True]) | HUGE
ANYTHING = st.recursive(
    st.none() | NUMBERS | TEXT | st.binary(max_size=6) | st.just("user"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "bytes"]) | NUMBERS, inner, max_size=4)
    ),
    max_leaves=8,
) | st.integers(900, 3000).map(nested)
TEXT_ITEM = st.builds(
    lambda text: {"type": "text", "text": text}, TEXT | st.sampled_from(["</s>", "<image>", "\0", ""])
)
CONTENT = TEXT | st.lists(TEXT_ITEM, min_size=1, max_size=3) | st.lists(TEXT_ITEM | st.just(IMAGE), max_size=3)
FIELDS = ["id", "messages", "images", "kinds"]


def some_pictures() -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    out = []
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        noise.save(buffer, format)
        out.append(buffer.getvalue())
    return [*out, a_png(1, 20_000), a_png(60_000, 60_000), a_png(16, 16)]


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A picture, a damaged one, or any bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.binary(max_size=60))
    data = bytearray(draw(st.sampled_from(some_pictures())))
    for place, value in draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4)):
        data[int(place * (len(data) - 1))] = value
    return bytes(data[: int(len(data) * draw(st.just(1.0) | st.floats(0, 1)))])


@st.composite
def nearly_rows(draw: st.DrawFn) -> Row:
    """A row as it should be but for its texts and its picture, now and then with something else in one place."""
    first = [IMAGE, *draw(st.lists(TEXT_ITEM, min_size=1, max_size=2))]
    contents = [first, *draw(st.lists(CONTENT, min_size=1, max_size=3))]
    roles = ["user", "assistant"] * len(contents)
    row: Row = {
        "messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)],
        "images": [draw(st.just(a_picture()) | pictures())],
    }
    if draw(st.booleans()):
        row["kinds"] = ["all"] * (len(contents) // 2)
    if draw(st.integers(0, 3)) == 0:
        row[draw(st.sampled_from(FIELDS))] = draw(ANYTHING)
    return row


BROKEN = st.builds(Broken, st.sampled_from(["image_missing", "malformed"]), TEXT, TEXT, st.just(""))
ROWS: st.SearchStrategy[Any] = (
    nearly_rows()
    | nearly_rows()
    | st.dictionaries(st.sampled_from(FIELDS) | NUMBERS, ANYTHING, max_size=5)
    | ANYTHING
    | BROKEN
)
SPECS = st.builds(
    lambda max_tokens, cut, text_only: a_spec(max_tokens=max_tokens, when_too_long=cut, text_only=text_only),
    st.sampled_from([9, 30, 64, 256]),
    st.sampled_from(["refuse", "cut"]),
    st.sampled_from(["refuse", "keep"]),
)


def sound(accepted: Accepted, processor: Processor, spec: DataSpec) -> bool:
    """What holds of every row that is kept."""
    record, encoded = accepted.record, accepted.encoded
    assert [message["role"] for message in record.messages] == ["user", "assistant"] * record.num_rounds
    assert len(record.images) == record.num_markers == (accepted.picture is not None)
    assert record.images or spec.text_only == "keep"
    assert len(record.kinds) in (0, record.num_rounds)
    assert all(text.encode() for pair in record.pairs for text in pair)  # valid Unicode, and not empty
    assert len(encoded.input_ids) == len(encoded.labels) <= spec.max_tokens
    assert all(label in (IGNORE_INDEX, i) for i, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert any(label != IGNORE_INDEX for label in encoded.labels)
    assert encoded.input_ids.count(processor.image_token_id) == processor.num_image_tokens * len(record.images)
    assert processor.image_token_id not in encoded.labels
    return True


def well_told(refusal: RowRefused) -> bool:
    """What holds of every refusal."""
    assert refusal.reason in REASONS
    assert len(refusal.detail) <= MAX_DETAIL
    assert refusal.detail.isprintable()
    assert len(refusal.digest) in (0, 64)
    return True


@settings(deadline=None, max_examples=500)
@given(row=ROWS, spec=SPECS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_any_row_is_kept_or_refused_for_a_listed_reason(row: Any, spec: DataSpec, processor: Processor) -> None:
    refused = None
    try:
        accepted = examine(row, processor, spec)
    except RowRefused as refusal:
        refused = refusal
    assert well_told(refused) if refused else sound(accepted, processor, spec)


@settings(deadline=None, max_examples=300)
@given(data=pictures())
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_any_picture_is_known_or_refused_by_name_and_the_second_time_too(data: bytes) -> None:
    told = []
    for _ in range(2):
        try:
            told.append((look(data).pixels, ""))
        except ImageRefused as refusal:
            told.append((b"", refusal.reason))
    assert told[0] == told[1]
    assert told[0][0] or told[0][1] in REASONS


@settings(deadline=None, max_examples=200)
@given(row=ROWS)
def test_any_row_is_a_record_or_malformed(row: Any) -> None:
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


# --------------------------------------------------------------------------------------------- what a refusal tells


def test_a_row_that_a_source_could_not_read_keeps_its_reason(processor: Processor) -> None:
    broken = Broken("image_missing", "a\nb.png at <_io.BytesIO object at 0x7f2b5c0d2a90>", "row", "ab" * 32)
    refusal = refusal_of(broken, processor)
    assert (refusal.reason, refusal.digest) == ("image_missing", "ab" * 32)
    assert refusal.detail == r"a\nb.png at <_io.BytesIO object at 0x...>"


def test_a_refused_row_is_found_again_by_its_pictures_digest(processor: Processor) -> None:
    data = a_picture()[:60]
    for row in (a_row(data), a_row(messages=[], images=[data]), a_row(kinds=5, images=[None, {"bytes": data}])):
        assert refusal_of(row, processor).digest == hashlib.sha256(data).hexdigest()


def test_a_refused_row_without_a_picture_is_found_again_by_its_content(processor: Processor) -> None:
    row = {"messages": [], "id": "r\u00f6w", "n": float("nan")}
    turned = dict(reversed(row.items()))
    expected = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
    assert refusal_of(row, processor).digest == refusal_of(turned, processor).digest == expected
    assert refusal_of({**row, "id": "other"}, processor).digest != expected
    assert len(refusal_of({"when": object(), "what": b"\0"}, processor).digest) == 64


@pytest.mark.parametrize("row", [{"n": 10**5000}, {1: 1, "a": 1}, {"n": nested(100_000)}])
def test_a_row_that_has_no_json_has_no_digest(row: Row, processor: Processor) -> None:
    assert refusal_of(row, processor).digest == ""


@pytest.mark.parametrize("role", ["USER" * 10_000, "\ud83d\0\n\x1b[31m", "\u202e<script>"])
def test_what_a_row_says_is_told_in_one_printable_line(role: str, processor: Processor) -> None:
    assert well_told(refusal_of(a_row(messages=[says(role, "What?", IMAGE), says("assistant", "red")]), processor))


@example(text="a" * 10**7)
@example(text="\0" * MAX_DETAIL)
@example(text="a" * MAX_DETAIL)
@given(text=st.text(st.characters() | HALF_PAIRS, max_size=800))
def test_any_detail_is_cut_and_escaped(text: str) -> None:
    assert printable(text).isprintable()
    assert len(printable(text)) <= MAX_DETAIL
    assert printable(printable(text)) == printable(text)


def test_a_refusal_crosses_to_another_process() -> None:
    sent = RowRefused("malformed", "a\0b", "ab" * 32)
    found = pickle.loads(pickle.dumps(sent))
    assert (found.reason, found.detail, found.digest, str(found)) == (
        "malformed", "a\\x00b", "ab" * 32, "malformed: a\\x00b",
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- what it costs


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every picture that is decoded from here on."""
    seen: list[bytes] = []

    def noting(data: bytes) -> Image.Image:
        seen.append(data)
        return decode(data)

    monkeypatch.setattr(examining, "decode", noting)
    return seen


def test_a_picture_is_decoded_once_for_all_rows_that_show_it(processor: Processor, decoded: list[bytes]) -> None:
    rows = [a_row(a_picture(number // 10), messages=a_talk(f"What is {number}?", "red")) for number in range(30)]
    seen = [examine(row, processor, SPEC).picture for row in rows]
    assert decoded == [a_picture(0), a_picture(1), a_picture(2)]
    assert seen == [fingerprint(decode(a_picture(number // 10))) for number in range(30)]


def test_a_refused_picture_is_not_decoded_again(processor: Processor, decoded: list[bytes]) -> None:
    data = a_picture()[:60]
    refused = [refusal_of(a_row(data), processor) for _ in range(3)]
    assert decoded == [data]
    assert len({(refusal.reason, refusal.detail, refusal.digest) for refusal in refused}) == 1


def test_a_row_that_is_refused_for_its_text_costs_no_decoding(processor: Processor, decoded: list[bytes]) -> None:
    for reason in ("malformed", "roles_out_of_order", "text_too_long", "special_token_in_text"):
        assert refusal_of(BAD[reason][0], processor).reason == reason
    assert decoded == []


def test_only_the_latest_pictures_are_remembered_and_none_by_its_bytes() -> None:
    with pytest.raises(ImageRefused):
        look(bytes(MAX_BYTES + 1))
    for number in range(PICTURES_REMEMBERED + 20):
        look(a_picture(number, size=(8, 8)))
    assert len(examining._pictures) == PICTURES_REMEMBERED
    assert sum(sys.getsizeof(part) for part in examining._pictures) < 100 * PICTURES_REMEMBERED
    assert not any(isinstance(found, BaseException) for found in examining._pictures.values())


def test_ten_megabytes_of_text_cost_next_to_nothing(processor: Processor) -> None:
    texts = ["What color? " * 900_000, "</s>" * 2_500_000, " " * 10_000_000 + "?", "\U0001f600" * 2_500_000]
    rows = [a_row(messages=a_talk(text, "red")) for text in texts]
    for row in rows:
        began = time.process_time()
        assert refusal_of(row, processor).reason == "text_too_long"
        assert time.process_time() - began < 1  # tokenising one takes ten


# --------------------------------------------------------------------------------------------- threads, workers


def some_rows(count: int) -> list[Row]:
    """Rows of many forms, good and bad."""
    draw = random.Random(1)
    bad = [row for reason in BAD if reason not in ("text_too_long", "malformed") for row in BAD[reason]]
    rows: list[Row] = []
    for number, drawn in enumerate(itertools.islice(scenes.records(1, "train"), count)):
        texts = [word for n in range(draw.randint(1, 20)) for word in (f"Is {number} or {n} red?", f"{n} times")]
        rows.append(a_row(a_picture(number % 40), messages=a_talk(*texts) if number % 2 else drawn["messages"]))
    return [*rows, *bad]


def told(row: Row, processor: Processor, spec: DataSpec) -> object:
    try:
        return examine(row, processor, spec)
    except RowRefused as refusal:
        return refusal.args


@pytest.mark.parametrize("rounds", range(3))
def test_many_threads_with_one_processor_tell_what_one_tells(
    processor: Processor, rounds: int, apart: Callable[[], None]
) -> None:
    rows = some_rows(300)
    random.Random(rounds).shuffle(rows)
    spec = a_spec(when_too_long="cut", max_tokens=128)
    alone = [told(row, processor, spec) for row in rows]
    examining._pictures.clear()
    apart()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda row: told(row, processor, spec), rows))
    assert together == alone


@pytest.fixture
def apart() -> Callable[[], None]:
    """Nothing rendered is remembered, so that all threads have to render at once."""
    from llava_pipeline.model.processor import lay_out

    return lay_out.cache_clear


def test_how_others_use_the_tokenizer_changes_nothing(processor: Processor) -> None:
    row = a_row(messages=a_talk("a </ s> b", "red"))
    before = examine(row, processor, SPEC)
    processor.tokenizer("<s> a", truncation=True, max_length=2, padding="max_length", split_special_tokens=False)
    try:
        assert examine(row, processor, SPEC) == before
    finally:
        processor.tokenizer("a")


def test_a_processor_sent_to_another_process_tells_the_same(processor: Processor) -> None:
    sent = pickle.loads(pickle.dumps(processor))
    assert all(told(row, sent, SPEC) == told(row, processor, SPEC) for row in some_rows(20))


def test_whoever_checks_rows_does_not_load_torch() -> None:
    code = "import sys, llava_pipeline.data.examine; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
