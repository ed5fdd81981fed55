"""The data report, read back: the page as HTML, the short form as Markdown, both from snapshots on disk."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from llava_pipeline.contracts import Cursor, Snapshot, ValidatedData
from llava_pipeline.data import checks, leakage, report
from llava_pipeline.data.report import survey
from llava_pipeline.data.report.facts import spread
from llava_pipeline.data.report.histogram import MAX_BINS, histogram, quantile
from llava_pipeline.data.report.tables import cell
from llava_pipeline.errors import MissingArtifact
from llava_pipeline.spec import JsonlSource
from llava_pipeline.store import home as store_home
from llava_pipeline.store import writing
from tests.data.rows import a_picture

ROWS = pa.schema([
    ("id", pa.string()), *((name, pa.list_(pa.string())) for name in ("questions", "answers", "kinds")),
    ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("image", pa.int64()),
])  # fmt: skip
IMAGES = pa.schema([
    ("sha256", pa.string()), ("data", pa.binary()), ("width", pa.int32()), ("height", pa.int32()),
])  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><style>*{display:none}</style>",
    "[click](http://example.org) ![p](http://example.org/p.png) http://example.org www.example.org a@example.org",
    "| a | b |\n| --- | --- |\n# title `code` ***bold*** <b>tag</b> &lt; \\",
    "left \u202eright\u2066 \x00\x1b[31m \u200f",
    "\ud800 half a pair",
]


def a_kept_row(
    number: int, image: int = 0, num_tokens: int = 24, kind: str = "color", **changes: Any
) -> dict[str, Any]:
    row = {
        "id": f"row/{number}", "questions": [f"What is {number}?"], "answers": [f"It is {number}"], "kinds": [kind],
        "input_ids": [7] * num_tokens, "labels": [-100] * (num_tokens - 4) + [7] * 4, "image": image,
    }  # fmt: skip
    return row | changes


def a_stored_picture(data: bytes, number: int = 0) -> dict[str, Any]:
    with Image.open(io.BytesIO(data)) as image:
        return {"sha256": f"{number:064x}", "data": data, "width": image.width, "height": image.height}


def a_refusal(reason: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    line = {
        "id": f"bad/{number}",
        "shard": 3,
        "row": number,
        "reason": reason,
        "detail": "found 7",
        "digest": "ab" * 32,
    }
    return line | changes


def a_snapshot(
    rows: Sequence[dict[str, Any]],
    images: Sequence[dict[str, Any]] | None = None,
    refused: Sequence[dict[str, Any]] = (),
    near: Sequence[tuple[int, int]] = (),
    *,
    rows_per_group: int = 1024,
    **changes: Any,
) -> Snapshot:
    """A snapshot in the store, as ``data.snapshot`` lays it out."""
    images = [a_stored_picture(a_picture(n), n) for n in range(2)] if images is None else images
    with writing("snapshot") as (folder, done):
        table = pa.Table.from_pylist(list(rows), ROWS)
        pq.write_table(table, folder / "rows.parquet", row_group_size=rows_per_group)
        pq.write_table(pa.Table.from_pylist(list(images), IMAGES), folder / "images.parquet", compression="none")
        (folder / "rejected.jsonl").write_text("".join(json.dumps(line) + "\n" for line in refused), "utf-8")
        lines = (json.dumps({"image": image, "like": like}) + "\n" for image, like in near)
        (folder / "near.jsonl").write_text("".join(lines), "utf-8")
    facts: dict[str, Any] = {
        "source": JsonlSource(path="rows.jsonl"), "rows": done[0], "origin": "jsonl:rows.jsonl",
        "num_read": len(rows) + len(refused), "num_kept": len(rows),
        "rejected": dict(Counter(line["reason"] for line in refused)),
        "num_images": len(images), "num_near_duplicates": len(near),
        "num_tokens": sum(len(row["input_ids"]) for row in rows),
        "num_supervised_tokens": sum(label != -100 for row in rows for label in row["labels"]),
        "began": Cursor(), "ended": Cursor(shard=4, row=17), "num_left": 1234,
    }  # fmt: skip
    return Snapshot(**facts | changes)


@dataclass
class Element:
    """One element of a page; ``words`` is everything that is written in it."""

    tag: str
    attributes: dict[str, str]
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words)).strip()


class Read(HTMLParser):
    """A page taken apart: its elements in order. Unclosed or crossed elements are an error."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in ("meta", "img", "br", "wbr"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.words.append(data)

    def all(self, *tags: str) -> list[Element]:
        return [element for element in self.elements if element.tag in tags]

    def cells(self, name: str) -> list[str]:
        """The cells of the line of a table that begins with a name."""
        return next(self._lines_after(n) for n, e in enumerate(self.elements) if e.tag == "th" and e.text == name)

    def _lines_after(self, at: int) -> list[str]:
        rest = self.elements[at + 1 :]
        end = next((n for n, element in enumerate(rest) if element.tag == "tr"), len(rest))
        return [element.text for element in rest[:end] if element.tag == "td"]


def read(train: Snapshot, held_out: Snapshot | None = None) -> Read:
    return Read(report.page(ValidatedData(train=train, held_out=held_out or a_snapshot([a_kept_row(0)]))))


@pytest.fixture
def data() -> ValidatedData:
    """A bit of everything on both sides."""
    train = a_snapshot(
        [a_kept_row(n, image=n % 2, num_tokens=20 + n, kind=("color", "yes/no")[n % 3 == 0]) for n in range(40)],
        [a_stored_picture(a_picture(n, size=(60 + 30 * n, 60)), n) for n in range(2)],
        [a_refusal("image_unreadable", n) for n in range(5)] + [a_refusal("too_many_tokens")],
        [(1, 0)],
    )
    held_out = a_snapshot([a_kept_row(n, num_tokens=30) for n in range(10)], refused=[a_refusal("malformed")])
    return ValidatedData(train=train, held_out=held_out)


# ------------------------------------------------------------------------------------------------ what it says


def test_the_totals_of_both_sets_stand_side_by_side(data: ValidatedData) -> None:
    page = Read(report.page(data))
    assert page.cells("Rows read") == ["46", "11"]
    assert page.cells("Rows kept") == ["40 (87 %)", "10 (90.9 %)"]
    assert page.cells("Rows refused") == ["6 (13 %)", "1 (9.1 %)"]
    assert page.cells("Digest") == [data.train.rows.digest, data.held_out.rows.digest]
    assert page.cells("Next row to read") == ["shard 4, row 17"] * 2
    assert page.cells("Tokens that are learned") == ["160 (10.1 %)", "40 (13.3 %)"]
    assert page.cells("Pictures like an earlier one") == ["1 (50 %)", "0 (0 %)"]


def test_the_first_sentences_name_the_leading_reason(data: ValidatedData) -> None:
    first = [element.text for element in Read(report.page(data)).all("p")[:2]]
    assert first == [
        "Training: 40 of 46 rows were kept, 6 refused, most often as image_unreadable (5); "
        "10.1 % of the tokens are learned.",
        "Held out: 10 of 11 rows were kept, 1 refused, most often as malformed (1); 13.3 % of the tokens are learned.",
    ]


def test_totals_that_do_not_reconcile_are_told() -> None:
    page = read(a_snapshot([a_kept_row(0)], num_read=4))
    assert "The totals do not reconcile: 3 rows are missing." in page.all("p")[0].text


def test_a_source_without_an_end_says_so() -> None:
    page = read(a_snapshot([a_kept_row(0)], num_left=None))
    assert page.cells("Rows left in the source") == ["no end, or not known", "1,234"]


def test_each_reason_has_its_count_and_at_most_three_examples(data: ValidatedData) -> None:
    page = Read(report.page(data))
    reasons = [element.text for element in page.all("summary") if element.text != "Numbers"]
    assert reasons == ["image_unreadable", "malformed", "too_many_tokens"]
    examples = [element.text for element in page.all("li")]
    assert len(examples) == 3 + 1 + 1
    assert examples[2] == "bad/2: found 7Training, shard 3, row 2, content abababababab"
    assert next(e for e in page.all("details")).attributes == {"open": ""}


def test_the_sentence_of_a_reason_stands_beside_its_name() -> None:
    given = ["malformed", "duplicate_id", "reason_from_later"]
    names = [e.text for e in read(a_snapshot([a_kept_row(0)], refused=[a_refusal(r) for r in given])).all("th")]
    assert f"malformed{checks.REASONS['malformed']}" in names
    assert f"duplicate_id{leakage.REASONS['duplicate_id']}" in names
    assert "reason_from_later" in names


def test_questions_are_counted_by_kind(data: ValidatedData) -> None:
    page = Read(report.page(data))
    assert page.cells("color") == ["26 65 %", "10 100 %"]
    assert page.cells("yes/no") == ["14 35 %", "none"]


def test_many_kinds_become_one_line_and_a_bounded_count() -> None:
    rows = [a_kept_row(n, kind=f"kind {n:04}") for n in range(survey.MAX_KINDS + 300)]
    snapshot = a_snapshot(rows)
    numbers = survey.count(snapshot)
    assert len(numbers.kinds) == survey.MAX_KINDS + 1
    assert numbers.kinds.total() == len(rows)
    assert read(snapshot).cells("982 more kinds")[0].startswith("982 ")


def test_samples_are_spread_over_the_snapshot_and_show_their_own_picture() -> None:
    pictures = [a_stored_picture(a_picture(20 * n, size=(64, 48)), n) for n in range(10)]
    rows = [a_kept_row(n, image=n // 50) for n in range(500)]
    samples = survey.samples(a_snapshot(rows, pictures, rows_per_group=70))
    assert [sample.id for sample in samples] == [f"row/{round(n * 499 / 11)}" for n in range(12)]
    for sample in samples:
        assert sample.picture is not None
        shade = 20 * (int(sample.id.removeprefix("row/")) // 50)
        shown = Image.open(io.BytesIO(sample.picture.jpeg)).getpixel((5, 5))
        assert isinstance(shown, tuple)
        assert abs(shown[0] - shade) < 4
        assert (sample.num_tokens, sample.num_supervised) == (24, 4)


def test_a_large_picture_becomes_a_small_jpeg() -> None:
    snapshot = a_snapshot([a_kept_row(0)], [a_stored_picture(a_picture(size=(2000, 500)))])
    source = read(snapshot).all("img")[0].attributes["src"]
    data = base64.b64decode(source.removeprefix("data:image/jpeg;base64,"), validate=True)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (320, 80))


def test_a_long_conversation_is_cut_and_says_so() -> None:
    long = a_kept_row(0, questions=[*"abcdef"], answers=["x" * 5000, *"bcdef"], kinds=["all"] * 6)
    page = read(a_snapshot([long]))
    assert [element.text for element in page.all("dt")[:5]] == ["a", "b", "c", "d", "and 2 more rounds"]
    assert page.all("dd")[0].text == "x" * 400 + " … (4,600 more characters)"


def test_pairs_that_look_alike_stand_side_by_side_the_earlier_one_first() -> None:
    pictures = [a_stored_picture(a_picture(n), n) for n in range(30)]
    snapshot = a_snapshot([a_kept_row(0)], pictures, near=[(n + 10, n) for n in range(20)])
    found = [(first.number, second.number) for first, second in survey.pairs(snapshot)]
    assert found == [(n, n + 10) for n in (0, 4, 8, 11, 15, 19)]
    page = read(snapshot)
    assert "6 of 20, spread evenly." in [element.text for element in page.all("p")]
    assert page.all("figcaption")[2].text == f"number 416 by 16 pixels{'0' * 12}"
    assert "The earlier of two pictures that look alike, number 4" in [e.attributes["alt"] for e in page.all("img")]


def test_what_is_not_there_is_said_in_words() -> None:
    nothing = a_snapshot([], [], num_read=0)
    page = read(nothing, a_snapshot([a_kept_row(0, image=-1, kind="all")], []))
    words = [element.text for element in page.all("p")]
    assert "No row was refused in either set." in words
    assert "The source does not tell kinds of questions apart: 0 in training, 1 in held out." in words
    assert "No row was kept." in words
    assert words.count("No picture looks like an earlier one of this set.") == 2
    assert "Text alone, no picture" in [element.text for element in page.all("div")]
    assert words.count("Training: none") == 4
    assert page.cells("Rows without a picture") == ["0", "1"]
    assert page.all("img") == []


def test_a_picture_that_does_not_decode_is_told_and_the_report_goes_on() -> None:
    broken = {"sha256": "0" * 64, "data": a_picture()[:40], "width": 16, "height": 16}
    assert "Cannot be decoded" in [element.text for element in read(a_snapshot([a_kept_row(0)], [broken])).all("div")]


# ------------------------------------------------------------------------------------------------ how it is made


def test_nothing_from_the_data_becomes_markup_in_the_page() -> None:
    plain, hostile = ([*"abcdefg"], HOSTILE)
    counts = []
    for texts in (plain, hostile):
        kept = [text.encode("utf-8", "replace").decode() for text in texts]  # Parquet takes no half pairs
        snapshot = a_snapshot(
            [a_kept_row(n, id=t, questions=[t], answers=[t], kinds=[t]) for n, t in enumerate(kept)],
            refused=[a_refusal(f"reason {t}", n, id=t, shard=t, row=t, detail=t) for n, t in enumerate(texts)],
            origin="jsonl:" + texts[0],
        )
        page = report.page(ValidatedData(train=snapshot, held_out=snapshot))
        page.encode("utf-8")
        counts.append(Counter((e.tag, *sorted(e.attributes)) for e in Read(page).elements))
        assert not re.search("[\x00\x1b\u202e\u2066\u200f\ud800]", page)
    assert counts[0] == counts[1]
    assert "<script>alert(1)</script>" in [element.text for element in Read(page).all("dd")]


def test_the_page_contains_everything_it_needs(data: ValidatedData) -> None:
    text = report.page(data)
    page = Read(text)
    policy = next(e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert page.all("script", "link", "iframe", "a", "form", "object") == []
    assert all(element.attributes["src"].startswith("data:image/jpeg;base64,") for element in page.all("img"))
    assert not re.search(r"https?:|url\(|@import|srcset| on[a-z]+=", text)


def test_the_same_data_give_the_same_page(data: ValidatedData) -> None:
    assert report.page(data) == report.page(data)
    assert report.markdown(data) == report.markdown(data)


def test_the_page_can_be_read_without_seeing_it(data: ValidatedData) -> None:
    page = Read(report.page(data))
    levels = [int(element.tag[1]) for element in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(element.text for element in page.all("h1", "h2", "h3", "caption", "summary"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(element.attributes.get("scope") in ("row", "col") for element in page.all("th"))
    assert all(element.attributes["alt"] for element in page.all("img"))
    assert all(e.attributes["aria-label"] for e in page.elements if e.attributes.get("role") == "img")
    assert page.all("html")[0].attributes == {"lang": "en"}


def test_a_snapshot_that_is_gone_is_told() -> None:
    snapshot = a_snapshot([a_kept_row(0)])
    folder = store_home() / "store" / "snapshot" / snapshot.rows.digest
    folder.rename(folder.with_name("gone"))
    for made in (report.page, report.markdown):
        with pytest.raises(MissingArtifact):
            made(ValidatedData(train=snapshot, held_out=snapshot))


MEASURE = """
import sys
import pyarrow as pa
from llava_pipeline.contracts import Snapshot
from llava_pipeline.data.report import survey
from llava_pipeline.data.report.facts import spread
pools = []  # kept: what Arrow has not freed yet goes back to its own pool
for line in sys.stdin:
    snapshot = Snapshot.model_validate_json(line)
    pools.append(pa.proxy_memory_pool(pa.system_memory_pool()))
    pa.set_memory_pool(pools[-1])
    survey.count(snapshot), survey.samples(snapshot), survey.pairs(snapshot)
    print(pools[-1].max_memory())
"""


def test_a_snapshot_ten_times_larger_takes_no_more_memory() -> None:
    picture = a_stored_picture(a_picture(size=(150, 150), format="BMP"))  # 68 kB
    snapshots = []
    for num_rows in (512, 5_120):
        pictures = [picture | {"sha256": f"{n:064x}"} for n in range(num_rows // 8)]
        rows = [a_kept_row(n, image=n // 8, num_tokens=40) for n in range(num_rows)]
        snapshots.append(a_snapshot(rows, pictures, near=[(1, 0)], rows_per_group=256).model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input="\n".join(snapshots), capture_output=True, text=True, check=True
    )
    small, large = map(int, done.stdout.split())
    assert large < 1.2 * small


# ------------------------------------------------------------------------------------------------ histograms


def test_every_value_is_in_one_bin() -> None:
    for values in ([3], [1, 2, 3], range(700, 1300, 7), [5, 90_000], [*range(100), 10**6], [0, 0, 0, 17]):
        sides = [Counter(values), Counter(list(values)[:1])]
        made = histogram(sides)
        assert made.num_bins <= MAX_BINS
        assert [sum(counted) for counted in made.counts] == [side.total() for side in sides]
        assert [pytest.approx(1)] * 2 == [sum(shares) for shares in made.shares]
        assert made.edges[0] <= min(values)
        assert made.open_end or max(values) < made.edges[-1]


def test_one_stray_value_does_not_flatten_the_rest() -> None:
    made = histogram([Counter(dict.fromkeys(range(64, 128), 10) | {40_000: 1})])
    assert made.open_end
    assert made.num_bins >= 8
    assert made.counts[0][-1] >= 1


def test_a_spread_has_no_picture_without_pixels() -> None:
    assert (
        spread(Counter([0, 64, 1630]), "megapixels", 1000) == "under 0.001 to 1.63 megapixels, half of them up to 0.064"
    )
    assert spread(Counter([28, 28]), "tokens") == "all 28 tokens"


def test_quantiles_are_values_that_exist() -> None:
    values = Counter([1, 2, 2, 10])
    assert [quantile(values, share) for share in (0.25, 0.5, 0.75, 0.99, 1.0)] == [1, 2, 2, 10, 10]


# ------------------------------------------------------------------------------------------------ Markdown


def rendered(text: str) -> str:
    """As GitHub-flavoured Markdown: with tables, tags and bare addresses as links."""
    return str(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text))


def test_the_markdown_is_tables_with_the_same_numbers(data: ValidatedData) -> None:
    page = Read(rendered(report.markdown(data)))
    assert page.all("p", "img", "a") == []
    assert [element.text for element in page.all("h2", "h3")] == ["Data report", "Refused rows", "Questions by kind"]
    lines = [tuple(e.text for e in page.elements if e.tag == "td")]
    assert [e.text for e in page.all("td")][:3] == ["Origin", "jsonl:rows.jsonl", "jsonl:rows.jsonl"]
    assert {"40 (87 %)", "image_unreadable", "20 to 59, half of them up to 39", "yes/no"} <= set(lines[0])
    assert next(
        [e.text for e in page.all("td")][n : n + 5] for n, e in enumerate(page.all("td")) if e.text == "Training"
    ) == ["Training", "image_unreadable", "bad/0", "3, 0", "found 7"]


def test_nothing_from_the_data_becomes_markup_in_the_markdown() -> None:
    counts = []
    for texts in ([*"abcdefg"], HOSTILE):
        kept = [text.encode("utf-8", "replace").decode() for text in texts]
        snapshot = a_snapshot(
            [a_kept_row(n, kinds=[t]) for n, t in enumerate(kept)],
            refused=[a_refusal(f"{n} {t}", n, id=t, shard=t, row=t, detail=t) for n, t in enumerate(texts)],
            origin="jsonl:" + texts[4],
        )
        text = report.markdown(ValidatedData(train=snapshot, held_out=snapshot))
        text.encode("utf-8")
        counts.append(Counter(element.tag for element in Read(rendered(text)).elements))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_a_cell_shows_what_the_data_say(text: str) -> None:
    words = Read(rendered(f"| a |\n| --- |\n| {cell(text, 400)} |")).all("td")[0].text
    plain = re.sub("[\x00\x1b\u202e\u2066\u200f]", "\ufffd", text)
    assert words == re.sub(r"\s+", " ", plain).strip()


def test_addresses_in_a_cell_are_no_links() -> None:
    written = cell("see https://example.org, www.example.org, WWW.example.org and a@example.org", 400)
    assert not re.search(r"(?i)https?:|www\.|\w@\w", written)


def test_the_markdown_stays_small_whatever_is_refused() -> None:
    long: Callable[[str], str] = lambda sign: sign * 3000  # noqa: E731
    rows = [a_kept_row(n, kinds=[f"{n}{long('&')}"]) for n in range(40)]
    refused = [a_refusal(f"reason_{n}", n, id=long("<"), detail=long("&"), shard=long("|")) for n in range(25)]
    snapshot = a_snapshot(rows, refused=refused, origin=long("<"))
    assert len(report.markdown(ValidatedData(train=snapshot, held_out=snapshot)).encode()) < 20_000
