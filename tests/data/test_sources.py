"""Every source streams rows in the vsft schema, or says what is wrong and what to do."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_pipeline.data import scenes, sources
from llava_pipeline.data.checks import STRUCTURE
from llava_pipeline.data.images import decode
from llava_pipeline.data.record import Record, Row, normalise
from llava_pipeline.data.sources import stream
from llava_pipeline.errors import NotFound, SourceUnavailable
from llava_pipeline.spec import EasyVqaSource, HubSource, ScenesSource
from tests.data.rows import a_picture


def sound(rows: list[Row]) -> list[Record]:
    """The rows as records, each of which passes every check of structure and has a readable picture."""
    records = [normalise(row) for row in rows]
    for record in records:
        assert [told for check in STRUCTURE.values() if (told := check(record))] == []
        assert decode(record.images[0]).mode == "RGB"
    return records


# --------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_stream_as_they_are_drawn(split: scenes.Split) -> None:
    origin, rows = stream(ScenesSource(seed=5), split)
    assert origin == f"scenes/5/{split}"
    streamed = list(itertools.islice(rows, 12))
    for index, (row, record) in enumerate(zip(streamed, sound(streamed), strict=True)):
        drawn = scenes.record(5, split, index)
        assert (record.id, record.kinds, row["messages"]) == (drawn["id"], drawn["kinds"], drawn["messages"])
        assert decode(record.images[0]).tobytes() == drawn["images"][0].tobytes()


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
    origin, rows = stream(a_wheel(home), "train")
    assert origin == "easy-vqa==1.0/train"
    records = sound(list(rows))
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
    _, rows = stream(a_wheel(home), "test")
    records = sound(list(rows))
    assert [record.pairs for record in records] == [[("what color is it?", "red")], [("is it a triangle?", "no")]]
    assert [record.id for record in records] == ["easy-vqa/test/0/0", "easy-vqa/test/0/1"]


def test_a_wheel_of_something_else_is_told(home: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("something/else.json", "[]")
    _, rows = stream(kept(home, buffer.getvalue()), "train")
    with pytest.raises(NotFound, match=r"holds no easy_vqa/data/train/questions\.json; correct data\.source"):
        next(rows)


def test_a_wheel_that_cannot_be_fetched_makes_the_source_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    _, rows = stream(EasyVqaSource(wheel_sha256="0" * 64), "train")
    with pytest.raises(SourceUnavailable, match=r"pip cannot fetch easy-vqa==1\.0.*check the connection"):
        next(rows)


@pytest.mark.slow
def test_the_published_easy_vqa_is_what_the_spec_pins() -> None:
    for split, num_pictures, num_questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        _, rows = stream(EasyVqaSource(questions_per_image=100), split)  # type: ignore[arg-type]
        streamed = list(rows)
        assert sum(len(row["messages"]) // 2 for row in streamed) == num_questions
        assert len({row["images"][0]["bytes"] for row in streamed}) <= num_pictures
        assert {kind for row in streamed for kind in row["kinds"]} == {"color", "shape", "yes/no"}
        sound(streamed[::100])


# --------------------------------------------------------------------------------------------- the hub

ITEM = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
VSFT = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("content", pa.list_(ITEM)), ("role", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)


def vsft_row(number: int) -> Row:
    """A row as ``HuggingFaceH4/llava-instruct-mix-vsft`` has them: there the picture may stand after the text."""
    items = [
        {"index": None, "text": f"What is number {number}?\n", "type": "text"},
        {"index": 0, "text": None, "type": "image"},
    ]
    answer = {"index": None, "text": f"number {number}", "type": "text"}
    messages = [{"content": items, "role": "user"}, {"content": [answer], "role": "assistant"}]
    return {"messages": messages, "images": [{"bytes": a_picture(number, format="JPEG"), "path": None}]}


def shard(path: Path, rows: list[Row], schema: pa.Schema = VSFT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def from_folder(folder: Path) -> HubSource:
    return HubSource(repo_id="owner/name", path=str(folder))


def test_parquet_shards_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "mix [1]"
    shard(folder / "train-00001-of-00002.parquet", [vsft_row(2)])
    shard(folder / "train-00000-of-00002.parquet", [vsft_row(0), vsft_row(1)])
    shard(folder / "test-00000-of-00001.parquet", [vsft_row(3)])
    origin, rows = stream(from_folder(folder), "train")
    assert origin == "folder:mix [1]/train"
    records = sound(list(rows))
    assert [record.pairs for record in records] == [[(f"What is number {n}?", f"number {n}")] for n in range(3)]
    assert [record.id for record in records] == [f"folder:mix [1]/train/{n}" for n in range(3)]
    # The bytes are those of the file: nothing was decoded and encoded again.
    assert [record.images for record in records] == [[a_picture(n, format="JPEG")] for n in range(3)]
    assert [record.pairs for record in sound(list(stream(from_folder(folder), "test")[1]))] == [
        [("What is number 3?", "number 3")]
    ]


def test_shards_that_datasets_wrote_are_read_alike(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    item = {"index": Value("int64"), "text": Value("string"), "type": Value("string")}
    features = Features(
        {"messages": List({"content": List(item), "role": Value("string")}), "images": List(ImageFeature())}
    )
    row = {**vsft_row(0), "images": [Image.new("RGB", (16, 16), (1, 2, 3))]}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "train-0.parquet")
    (record,) = sound(list(stream(from_folder(tmp_path), "train")[1]))
    assert decode(record.images[0]).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("below", [".", "data"])
def test_shards_are_found_under_the_hub_s_names(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "owner" / "name"
    for number in range(2):
        shard(folder / below / f"train-{number:05}-of-00002-9f3c1e7d2b5a4c68.parquet", [vsft_row(number)])
    for name in ("train_prefs-00000-of-00001", "trainings", "test-00000-of-00001-0a1b2c3d4e5f6a7b"):
        shard(folder / below / f"{name}.parquet", [vsft_row(9)])
    origin, rows = stream(from_folder(folder), "train")
    assert origin == "folder:name/train"
    assert [record.pairs[0][1] for record in sound(list(rows))] == ["number 0", "number 1"]
    assert [record.pairs[0][1] for record in sound(list(stream(from_folder(folder), "test")[1]))] == ["number 9"]


@pytest.mark.parametrize("folder", ["missing", "empty", "test-only"])
def test_a_folder_without_shards_of_the_split_is_told(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    shard(tmp_path / "test-only" / "test-0.parquet", [vsft_row(0)])
    with pytest.raises(
        NotFound, match=rf"no train-\*\.parquet in .*{folder} or in its folder data; check data\.source"
    ):
        stream(from_folder(tmp_path / folder), "train")


def read_all(folder: Path) -> list[Row]:
    return list(stream(from_folder(folder), "train")[1])


def test_a_shard_that_is_no_parquet_is_told(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"<html>please log in</html>")
    with pytest.raises(
        SourceUnavailable, match=r"cannot read the Parquet shards in .*\(.+\); check data\.source\.path"
    ):
        read_all(tmp_path)


def test_a_shard_that_breaks_off_inside_is_told(tmp_path: Path) -> None:
    path = shard(tmp_path / "train-0.parquet", [vsft_row(n) for n in range(3)])
    data = path.read_bytes()
    path.write_bytes(data[:8] + bytes(60) + data[68:])
    with pytest.raises(
        SourceUnavailable, match=r"cannot read the Parquet shards in .*\(.+\); check data\.source\.path"
    ):
        read_all(tmp_path)


def test_images_of_another_type_are_told(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", [{"images": 1}], pa.schema([("images", pa.int64())]))
    with pytest.raises(SourceUnavailable, match="cannot read the Parquet shards"):
        read_all(tmp_path)


def test_columns_with_other_names_make_rows_that_are_refused(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", [{"text": "hello"}], pa.schema([("text", pa.string())]))
    (row,) = read_all(tmp_path)
    assert "messages" not in row


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port on loopback that accepts connections and never answers."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        yield listening


REMEDY = r"--set data\.source\.path=FOLDER, or train on --set data\.source=scenes"


def test_a_hub_out_of_reach_makes_the_source_unavailable(nobody: socket.socket) -> None:
    nobody.close()
    with pytest.raises(SourceUnavailable, match=rf"cannot read the data set owner/name \(.*refused\).*{REMEDY}"):
        stream(HubSource(repo_id="owner/name"), "train")


def test_a_hub_that_never_answers_is_given_up(nobody: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "HUB_SECONDS", 0.1)
    with pytest.raises(SourceUnavailable, match=rf"cannot read the data set owner/name \(.*timed out.*\).*{REMEDY}"):
        stream(HubSource(repo_id="owner/name"), "train")
