"""Sources that need no file of a person: scenes and easy-VQA; and which source one word means."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zipfile
from pathlib import Path

import pytest

from llava_pipeline.contracts import Cursor
from llava_pipeline.data import scenes
from llava_pipeline.data.checks import STRUCTURE
from llava_pipeline.data.images import decode
from llava_pipeline.data.record import Record, Row, normalise
from llava_pipeline.data.sources import open_source
from llava_pipeline.data.sources.named import source_named
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken, Reader
from llava_pipeline.errors import NotFound, SourceUnavailable, SpecError
from llava_pipeline.spec import (
    EasyVqaSource,
    FolderSource,
    HubSource,
    JsonlSource,
    LlavaJsonSource,
    ParquetSource,
    ScenesSource,
    Source,
    Split,
    WebDatasetSource,
)
from tests.data.rows import a_picture


def rows_of(reader: Reader, start: int = 0, count: int | None = None) -> list[Row]:
    """Rows from a place on, piece after piece."""
    rows = itertools.chain.from_iterable(map(reader.rows, reader.pieces(Cursor(row=start))))
    taken = list(itertools.islice(rows, count))
    assert not any(isinstance(row, Broken) for row in taken)
    return taken  # type: ignore[return-value]


def sound(rows: list[Row]) -> list[Record]:
    """The rows as records, each of which passes every check of structure and has a readable picture."""
    records = [normalise(row) for row in rows]
    for record in records:
        assert [told for check in STRUCTURE.values() if (told := check(record))] == []
        assert decode(record.images[0]).mode == "RGB"
    return records


# --------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_stream_as_they_are_drawn(split: Split) -> None:
    reader = open_source(ScenesSource(seed=5), split)
    assert (reader.origin, reader.num_rows()) == (f"scenes/5/{split}", None)
    streamed = rows_of(reader, count=12)
    for index, (row, record) in enumerate(zip(streamed, sound(streamed), strict=True)):
        drawn = scenes.record(5, split, index)
        assert (record.id, record.kinds, row["messages"]) == (drawn["id"], drawn["kinds"], drawn["messages"])
        assert decode(record.images[0]).tobytes() == drawn["images"][0].tobytes()


def test_scenes_go_on_from_any_place() -> None:
    reader = open_source(ScenesSource(seed=5), "train")
    start = PIECE_ROWS - 2
    assert [row["id"] for row in rows_of(reader, start, 4)] == [f"scenes/5/train/{start + n}" for n in range(4)]
    assert reader.num_before(Cursor(row=start)) == start


# --------------------------------------------------------------------------------------------- easy-vqa

ASKED = {
    "train": [
        ["is there a circle?", "yes", 7],
        ["what color is the shape?", "teal", 7],
        ["what shape is it?", "circle", 7],
        ["is there no red shape?", "no", 3],
    ],
    "test": [["what color is it?", "red", 0], ["is it a triangle?", "no", 0]],
}


def a_wheel(home: Path, **changes: bytes) -> EasyVqaSource:
    """A wheel laid out as easy-VQA's, where it would be after it was fetched."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for split, asked in ASKED.items():
            wheel.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(asked))
            for image in {number for _, _, number in asked}:
                wheel.writestr(f"easy_vqa/data/{split}/images/{image}.png", a_picture(int(image)))
        wheel.writestr("easy_vqa/data/answers.txt", "circle\n")
    return kept(home, buffer.getvalue())


def kept(home: Path, content: bytes) -> EasyVqaSource:
    digest = hashlib.sha256(content).hexdigest()
    folder = home / "wheels" / digest
    folder.mkdir(parents=True)
    (folder / "easy_vqa-1.0-py3-none-any.whl").write_bytes(content)
    return EasyVqaSource(wheel_sha256=digest, questions_per_image=2)


def test_easy_vqa_trains_on_conversations_about_one_picture(home: Path) -> None:
    reader = open_source(a_wheel(home), "train")
    assert (reader.origin, reader.num_rows()) == ("easy-vqa==1.0/train", 3)
    records = sound(rows_of(reader))
    assert [(record.id, record.pairs, record.kinds) for record in records] == [
        ("easy-vqa/train/3/0", [("is there no red shape?", "no")], ["yes/no"]),
        (
            "easy-vqa/train/7/0",
            [("is there a circle?", "yes"), ("what color is the shape?", "teal")],
            ["yes/no", "color"],
        ),
        ("easy-vqa/train/7/2", [("what shape is it?", "circle")], ["shape"]),
    ]
    assert [record.images for record in records] == [[a_picture(3)], [a_picture(7)], [a_picture(7)]]


def test_easy_vqa_is_asked_one_question_at_a_time(home: Path) -> None:
    reader = open_source(a_wheel(home), "test")
    records = sound(rows_of(reader))
    assert [row["id"] for row in rows_of(reader, start=1)] == ["easy-vqa/test/0/1"]
    assert [record.pairs for record in records] == [[("what color is it?", "red")], [("is it a triangle?", "no")]]
    assert [record.id for record in records] == ["easy-vqa/test/0/0", "easy-vqa/test/0/1"]


def test_a_wheel_of_something_else_is_told(home: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("something/else.json", "[]")
    with pytest.raises(NotFound, match=r"holds no easy_vqa/data/train/questions\.json; correct data\.source"):
        open_source(kept(home, buffer.getvalue()), "train")


def test_a_wheel_that_cannot_be_fetched_makes_the_source_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SourceUnavailable, match=r"pip cannot fetch easy-vqa==1\.0.*check the connection"):
        open_source(EasyVqaSource(wheel_sha256="0" * 64), "train", patience_seconds=0)


@pytest.mark.slow
def test_the_published_easy_vqa_is_what_the_spec_pins() -> None:
    for split, num_pictures, num_questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        streamed = rows_of(open_source(EasyVqaSource(questions_per_image=100), split))  # type: ignore[arg-type]
        assert sum(len(row["messages"]) // 2 for row in streamed) == num_questions
        assert len({row["images"][0]["bytes"] for row in streamed}) <= num_pictures
        assert {kind for row in streamed for kind in row["kinds"]} == {"color", "shape", "yes/no"}
        sound(streamed[::100])


# --------------------------------------------------------------------------------------------- named by a word


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("scenes", ScenesSource()),
        ("easy-vqa", EasyVqaSource()),
        ("owner/name", HubSource(repo_id="owner/name")),
        ("owner/name@v1.2", HubSource(repo_id="owner/name", revision="v1.2")),
        ("a.parquet", ParquetSource(path="a.parquet")),
        ("a.jsonl", JsonlSource(path="a.jsonl")),
        ("llava.json", LlavaJsonSource(path="llava.json")),
        ("a.tar", WebDatasetSource(path="a.tar")),
        ("shards", ParquetSource(path="shards")),
        ("lines", JsonlSource(path="lines")),
        ("tars", WebDatasetSource(path="tars")),
        ("pictures", FolderSource(path="pictures")),
    ],
)
def test_one_word_names_a_source(name: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("a.parquet", "a.jsonl", "llava.json", "a.tar")
    inside = ("shards/data/train-0.parquet", "lines/a.jsonl", "tars/0.tar", "pictures/a.png")
    for file in (*files, *inside):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    assert source_named(name) == source


def test_a_word_that_names_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no file or folder nothing; give a path, owner/name of a hub data set, scenes"):
        source_named("nothing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SpecError, match=r"notes\.txt is of an unknown kind; known are \.parquet"):
        source_named(str(tmp_path / "notes.txt"))


def test_an_image_folder_goes_with_rows_that_name_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "llava.json").touch()
    source = source_named(str(tmp_path / "llava.json"), str(tmp_path))
    assert source == LlavaJsonSource(path=str(tmp_path / "llava.json"), images=str(tmp_path))
    with pytest.raises(NotFound, match=r"there is no folder .*/nowhere; check --images"):
        source_named(str(tmp_path / "llava.json"), str(tmp_path / "nowhere"))
    with pytest.raises(SpecError, match="scenes is read as scenes, whose rows bring their pictures along"):
        source_named("scenes", str(tmp_path))
