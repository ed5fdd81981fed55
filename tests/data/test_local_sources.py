"""Files of this machine, good and bad: every row is given or refused by name, wherever one starts and whoever reads."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_pipeline.contracts import Cursor
from llava_pipeline.data.checks import STRUCTURE
from llava_pipeline.data.images import MAX_BYTES
from llava_pipeline.data.record import Malformed, Row, normalise
from llava_pipeline.data.sources import conversation, jsonl, open_source
from llava_pipeline.data.sources.folder import FolderReader
from llava_pipeline.data.sources.llava_json import CHUNK, elements
from llava_pipeline.data.sources.local import choose
from llava_pipeline.data.sources.named import source_named
from llava_pipeline.data.sources.reader import PIECE_ROWS, Broken, Reader
from llava_pipeline.errors import NotFound, RevisionMoved, SourceUnavailable
from llava_pipeline.spec import (
    FolderSource,
    JsonlSource,
    LlavaJsonSource,
    ParquetSource,
    Source,
    Split,
    WebDatasetSource,
)
from tests.data.rows import IMAGE, a_picture, a_row, says

PICTURE = a_picture(7)


def read(source: Source, split: Split = "train", start: Cursor | None = None) -> list[Row | Broken]:
    """All rows of a source from a place on."""
    return rows_of(open_source(source, split), start or Cursor())


def rows_of(reader: Reader, start: Cursor) -> list[Row | Broken]:
    found = []
    for piece in reader.pieces(start):
        rows = list(reader.rows(piece))
        assert piece.stop is not None
        assert len(rows) == piece.stop - piece.start <= PIECE_ROWS
        found += rows
    return found


def reasons(rows: list[Row | Broken]) -> list[str]:
    """Why each row is refused, ``""`` for one that is not; a row that is given passes the checks of structure."""
    found = []
    for row in rows:
        if isinstance(row, Broken):
            assert row.detail
            row.detail.encode()
            row.id.encode()
            found.append(row.reason)
            continue
        record = normalise(row)
        found.append(next((name for name, check in STRUCTURE.items() if check(record)), ""))
    return found


def answers(rows: list[Row | Broken]) -> list[str]:
    """What the assistant says first in each row that is given."""
    return [normalise(row).pairs[0][1] for row in rows if not isinstance(row, Broken)]


def details(rows: list[Row | Broken]) -> list[str]:
    return [row.detail for row in rows if isinstance(row, Broken)]


# --------------------------------------------------------------------------------------------- making files

ITEM = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
MESSAGES = pa.list_(pa.struct([("content", pa.list_(ITEM)), ("role", pa.string())]))
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
VSFT = pa.schema([("messages", MESSAGES), ("images", IMAGES)])


def parquet(path: Path, numbers: range, rows_per_group: int = 4, schema: pa.Schema = VSFT, **options: Any) -> Path:
    """A file of good rows whose answers are their numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"messages": a_row(messages=turns(n))["messages"], "images": [{"bytes": PICTURE}]} for n in numbers]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=rows_per_group, **options)
    return path


def turns(number: object) -> list[dict[str, Any]]:
    return [says("user", "\nWhich number?", IMAGE), says("assistant", f"{number}")]


def llava(number: object, **changes: Any) -> dict[str, Any]:
    """A row as the original format has it."""
    said = [{"from": "human", "value": "<image>\nWhich number?"}, {"from": "gpt", "value": f"{number}"}]
    return {"id": f"row-{number}", "image": "a.png", "conversations": said, **changes}


def vsft(number: object, **changes: Any) -> dict[str, Any]:
    return {"messages": turns(number), "images": ["a.png"], **changes}


def lines(path: Path, *rows: Any) -> JsonlSource:
    """A file of JSON lines, with a picture ``a.png`` beside it. Bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    (path.parent / "a.png").write_bytes(PICTURE)
    return JsonlSource(path=str(path))


def array(path: Path, *rows: Any, raw: bytes | None = None) -> LlavaJsonSource:
    """A file with one array, with a picture ``a.png`` beside it. Bytes are written as they are."""
    body = b",\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"[" + body + b"]" if raw is None else raw)
    (path.parent / "a.png").write_bytes(PICTURE)
    return LlavaJsonSource(path=str(path))


def tar(
    path: Path, *members: tuple[str, bytes | dict[str, Any] | tarfile.TarInfo], format: int = tarfile.GNU_FORMAT
) -> WebDatasetSource:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return WebDatasetSource(path=str(path))


def captioned(*numbers: int) -> list[tuple[str, bytes]]:
    return [(f"{n:06}.{end}", data) for n in numbers for end, data in (("jpg", PICTURE), ("txt", f"{n}".encode()))]


def stamps(root: Path, num: int) -> FolderSource:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        (root / f"{number:06}.png").write_bytes(PICTURE)
        (root / f"{number:06}.txt").write_text(f"{number}")
    return FolderSource(path=str(root))


NUM_ROWS = 2 * PIECE_ROWS + 40


@pytest.fixture(scope="module", params=["parquet", "jsonl", "llava-json", "webdataset", "folder"])
def long_source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The same rows, numbered in their answers, as each kind of source; more than two pieces of them in two files."""
    root = tmp_path_factory.mktemp("long") / "mix [1]"
    first, second = range(PIECE_ROWS + 30), range(PIECE_ROWS + 30, NUM_ROWS)
    match request.param:
        case "parquet":
            parquet(root / "train-0.parquet", first, 520)
            return ParquetSource(path=str(parquet(root / "train-1.parquet", second, 520).parent))
        case "jsonl":
            lines(root / "0.jsonl", *map(vsft, first))
            return lines(root / "1.jsonl", *map(llava, second)).model_copy(update={"path": str(root)})
        case "llava-json":
            root.mkdir()
            array(root / "0.json", *map(llava, first))
            return array(root / "1.json", *map(llava, second)).model_copy(update={"path": str(root)})
        case "webdataset":
            tar(root / "0.tar", *captioned(*first))
            return tar(root / "1.tar", *captioned(*second)).model_copy(update={"path": str(root)})
    return stamps(root, NUM_ROWS)


# --------------------------------------------------------------------------------------------- every kind


def test_every_row_comes_once_and_in_order(long_source: Source) -> None:
    reader = open_source(long_source, "train")
    rows = rows_of(reader, Cursor())
    assert answers(rows) == [f"{n}" for n in range(NUM_ROWS)]
    assert set(reasons(rows)) == {""}
    assert len({normalise(row).id for row in rows if isinstance(row, dict)}) == NUM_ROWS
    assert {row["images"][0]["bytes"] for row in rows if isinstance(row, dict)} == {PICTURE}
    assert reader.num_rows() == NUM_ROWS
    assert not reader.has_split


def test_reading_goes_on_in_the_middle_of_a_shard(long_source: Source) -> None:
    reader = open_source(long_source, "train")
    pieces = list(reader.pieces(Cursor()))
    shards = sorted({piece.shard for piece in pieces})
    for shard in shards:
        for row in (0, 1, 7, 300):
            if row > sum(piece.num_rows or 0 for piece in pieces if piece.shard == shard):
                continue
            start = Cursor(shard=shard, row=row, behind=reader.behind(shard))
            rest = answers(rows_of(open_source(long_source, "train"), start))
            assert rest == [f"{n}" for n in range(reader.num_before(start) or 0, NUM_ROWS)]
    assert reader.num_before(Cursor(shard=len(shards))) == NUM_ROWS
    assert rows_of(reader, Cursor(shard=len(shards), behind=reader.behind(len(shards)))) == []


def test_pieces_are_read_by_anybody_in_any_order(long_source: Source) -> None:
    """Two at a time as well, as two threads with one reader do."""
    pieces = list(open_source(long_source, "train").pieces(Cursor()))
    reader = open_source(open_source(long_source, "test").source, "train")
    in_order = [row for piece in pieces for row in reader.rows(piece)]
    backwards = [list(reader.rows(piece)) for piece in reversed(pieces)]
    assert [row for rows in reversed(backwards) for row in rows] == in_order
    for one, other in itertools.pairwise(pieces):
        pairs = list(zip(reader.rows(one), reader.rows(other), strict=False))
        assert [a for a, _ in pairs] == list(reader.rows(one))[: len(pairs)]
        assert [b for _, b in pairs] == list(reader.rows(other))[: len(pairs)]


def test_pieces_end_at_the_same_places_wherever_one_starts(long_source: Source) -> None:
    reader = open_source(long_source, "train")
    ends = [(piece.shard, piece.stop) for piece in reader.pieces(Cursor())]
    assert [(piece.shard, piece.stop) for piece in reader.pieces(Cursor(row=9))] == ends


def test_the_origin_has_no_place_of_this_machine_in_it(long_source: Source) -> None:
    reader = open_source(long_source, "train")
    assert reader.origin == f"{long_source.kind}:mix [1]/train"
    assert all(piece.name.isprintable() and "/" not in piece.name for piece in reader.pieces(Cursor()))


def test_a_relative_path_is_made_absolute(long_source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(long_source.path)  # type: ignore[union-attr]
    monkeypatch.chdir(root.parent)
    relative = long_source.model_copy(update={"path": f"../{root.parent.name}/./mix [1]/"})
    reader = open_source(relative, "train")
    assert (reader.source, reader.origin) == (long_source, f"{long_source.kind}:mix [1]/train")


def test_files_that_were_changed_behind_a_place_are_noticed(long_source: Source) -> None:
    place = Cursor(shard=1, row=3, behind="0" * 64)
    with pytest.raises(RevisionMoved, match=r"before shard 1 are not those.*put back the files.*data\.increment=false"):
        next(open_source(long_source, "train").pieces(place))
    last = list(open_source(long_source, "train").pieces(Cursor()))[-1]
    reader = open_source(long_source, "train")
    place = Cursor(shard=last.shard, row=5000, behind=reader.behind(last.shard))
    with pytest.raises(RevisionMoved, match="of which 5000 were read before"):
        list(reader.pieces(place))


@pytest.mark.parametrize(
    "write",
    [
        lambda path, numbers: parquet(path.with_suffix(".parquet"), numbers, 3),
        lambda path, numbers: Path(lines(path.with_suffix(".jsonl"), *map(vsft, numbers)).path),
        lambda path, numbers: Path(array(path.with_suffix(".json"), *map(llava, numbers)).path),
        lambda path, numbers: Path(tar(path.with_suffix(".tar"), *captioned(*numbers)).path),
    ],
)
def test_a_file_may_be_added_behind_a_place_but_none_changed_before_it(
    tmp_path: Path, write: Callable[[Path, range], Path]
) -> None:
    folder = tmp_path / "mix"
    folder.mkdir()
    first = write(folder / "0", range(6))
    source = source_named(str(write(folder / "1", range(6, 12)))).model_copy(update={"path": str(folder)})
    reader = open_source(source, "train")
    shard = next(piece.shard for piece in reader.pieces(Cursor()) if piece.name.startswith("1."))
    place = Cursor(shard=shard, row=2, behind=reader.behind(shard))
    assert answers(read(source, start=place)) == ["8", "9", "10", "11"]
    write(folder / "2", range(12, 14))
    assert answers(read(source, start=place)) == ["8", "9", "10", "11", "12", "13"]
    content = first.read_bytes()
    write(folder / "0", range(20))  # a tar grows by 10 KB at a time
    with pytest.raises(RevisionMoved, match=f"before shard {shard} are not those"):
        read(source, start=place)
    first.write_bytes(content)
    assert len(read(source, start=place)) == 6
    first.rename(folder / f"00{first.suffix}")
    with pytest.raises(RevisionMoved, match=f"before shard {shard} are not those"):
        read(source, start=place)


SOURCES: list[tuple[Callable[[Path], Source], str]] = [
    (lambda path: ParquetSource(path=str(path)), ".parquet"),
    (lambda path: JsonlSource(path=str(path)), ".jsonl"),
    (lambda path: LlavaJsonSource(path=str(path)), ".json"),
    (lambda path: WebDatasetSource(path=str(path)), ".tar"),
    (lambda path: FolderSource(path=str(path)), "picture"),
]


@pytest.mark.parametrize(("make", "kind"), SOURCES)
def test_what_is_not_there_is_told(tmp_path: Path, make: Callable[[Path], Source], kind: str) -> None:
    with pytest.raises(NotFound, match=r"there is no .*folder .*/nowhere; check data\.source\.path"):
        open_source(make(tmp_path / "nowhere"), "train")
    (tmp_path / "a.md").write_text("nothing to train on")
    (tmp_path / f".hidden{kind}").write_text("left by an editor")
    with pytest.raises(NotFound, match=rf"there is no {kind}.* {tmp_path}; check data\.source\.path"):
        open_source(make(tmp_path), "train")


def test_a_folder_for_images_that_is_not_there_is_told(tmp_path: Path) -> None:
    for source in (lines(tmp_path / "a.jsonl"), array(tmp_path / "a.json")):
        with pytest.raises(NotFound, match=r"there is no folder .*/nowhere; check data\.source\.images"):
            open_source(source.model_copy(update={"images": str(tmp_path / "nowhere")}), "train")


@pytest.mark.parametrize(("make", "kind"), SOURCES[:-1])
def test_a_file_that_is_gone_when_it_is_to_be_read_is_told(
    tmp_path: Path, make: Callable[[Path], Source], kind: str
) -> None:
    (tmp_path / f"a{kind}").write_bytes(b"")
    reader = open_source(make(tmp_path), "train")
    (tmp_path / f"a{kind}").unlink()
    with pytest.raises(
        SourceUnavailable, match=r"cannot read .* \(No such file or directory\); check data\.source\.path"
    ):
        list(reader.pieces(Cursor()))


# --------------------------------------------------------------------------------------------- splits

HUB_NAMES = ["test-00000-of-00001-0a1b2c3d", "train-00000-of-00002-9f3c1e7d", "train-00001-of-00002", "train_prefs-0"]


@pytest.mark.parametrize(
    ("names", "train", "test", "has_split"),
    [
        (["a", "b"], ["a", "b"], ["a", "b"], False),
        (["train-0", "train-1"], ["train-0", "train-1"], ["train-0", "train-1"], False),
        (["test", "a", "b"], ["a", "b"], ["test"], True),
        (["test_1", "test2", "train", "validation"], ["train"], ["test_1", "test2"], True),
        (["testudo", "tests", "test_prefs"], *[["testudo", "tests", "test_prefs"]] * 2, False),
        (HUB_NAMES, HUB_NAMES[1:3], HUB_NAMES[:1], True),
    ],
)  # fmt: skip
def test_names_tell_what_is_held_out(names: list[str], train: list[str], test: list[str], has_split: bool) -> None:
    assert choose(names, "train") == (train, has_split)
    assert choose(names, "test") == (test, has_split)


def test_files_named_test_are_held_out(tmp_path: Path) -> None:
    lines(tmp_path / "train-1.jsonl", vsft(1), vsft(2))
    lines(tmp_path / "test-1.jsonl", vsft(3))
    source = JsonlSource(path=str(tmp_path))
    assert (answers(read(source, "train")), answers(read(source, "test"))) == (["1", "2"], ["3"])
    assert open_source(source, "train").has_split
    one = JsonlSource(path=str(tmp_path / "test-1.jsonl"))
    assert answers(read(one, "train")) == answers(read(one, "test")) == ["3"]
    assert not open_source(one, "test").has_split


def test_a_folder_with_nothing_to_train_on_is_told(tmp_path: Path) -> None:
    lines(tmp_path / "test-1.jsonl", vsft(3))
    with pytest.raises(NotFound, match=r"only files that are held out \(test-1\.jsonl\).*name those train-\*"):
        open_source(JsonlSource(path=str(tmp_path)), "train")


def test_parquet_files_are_found_in_the_folder_data_as_the_hub_has_them(tmp_path: Path) -> None:
    parquet(tmp_path / "owner/name/data/train-00000-of-00001.parquet", range(3))
    parquet(tmp_path / "owner/name/data/test-00000-of-00001.parquet", range(3, 5))
    source = ParquetSource(path=str(tmp_path / "owner/name"))
    assert answers(read(source, "train")) == ["0", "1", "2"]
    assert answers(read(source, "test")) == ["3", "4"]


def test_a_picture_named_test_is_a_picture_and_a_folder_named_test_is_held_out(tmp_path: Path) -> None:
    stamps(tmp_path, 2)
    (tmp_path / "test.png").write_bytes(PICTURE)
    source = FolderSource(path=str(tmp_path))
    assert len(read(source)) == 3
    assert not open_source(source, "train").has_split
    for split, num in (("train", 3), ("test", 2)):
        stamps(tmp_path / "split" / split / "cats", num)
    source = FolderSource(path=str(tmp_path / "split"))
    assert [len(read(source, split)) for split in ("train", "test")] == [3, 2]  # type: ignore[arg-type]
    assert open_source(source, "test").has_split


# --------------------------------------------------------------------------------------------- Parquet


def damage(path: Path, group: int, column: str = "images.list.element.bytes") -> None:
    """Overwrite the pages of one column of a row group."""
    metadata = pq.read_metadata(path).row_group(group)
    found = next(c for n in range(metadata.num_columns) if (c := metadata.column(n)).path_in_schema == column)
    begin = found.dictionary_page_offset or found.data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + found.total_compressed_size] = b"\xff" * found.total_compressed_size
    path.write_bytes(data)


def test_a_corrupt_row_group_is_refused_row_by_row_and_the_next_ones_are_read(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", range(12))
    damage(path, 1)
    rows = read(ParquetSource(path=str(path)))
    assert reasons(rows) == [""] * 4 + ["shard_unreadable"] * 4 + [""] * 4
    assert answers(rows) == ["0", "1", "2", "3", "8", "9", "10", "11"]
    assert [row.id for row in rows if isinstance(row, Broken)] == [
        f"parquet:a.parquet/train/a.parquet/{n}" for n in range(4, 8)
    ]
    assert str(tmp_path) not in details(rows)[0]


def test_pages_whose_checksum_is_wrong_are_refused(tmp_path: Path) -> None:
    """Without it, a changed byte of an uncompressed picture would be taken for the picture."""
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    path = parquet(tmp_path / "a.parquet", range(8), **options)
    data = path.read_bytes()
    at = data.index(len(PICTURE).to_bytes(4, "little") + PICTURE) + 40
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert reasons(read(ParquetSource(path=str(path)))) == ["shard_unreadable"] * 4 + [""] * 4


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>please log in</html>", b"PAR1" + bytes(90) + b"PAR1"])
def test_a_file_without_a_footer_is_one_refused_row(tmp_path: Path, content: bytes) -> None:
    parquet(tmp_path / "0.parquet", range(2))
    (tmp_path / "1.parquet").write_bytes(content)
    parquet(tmp_path / "2.parquet", range(2, 4))
    rows = read(ParquetSource(path=str(tmp_path)))
    assert reasons(rows) == ["", "", "shard_unreadable", "", ""]
    assert details(rows)[0].startswith("1.parquet: ")
    assert str(tmp_path) not in details(rows)[0]


def test_a_file_cut_short_is_one_refused_row(tmp_path: Path) -> None:
    path = parquet(tmp_path / "0.parquet", range(4))
    path.write_bytes(path.read_bytes()[:-9])
    assert reasons(read(ParquetSource(path=str(path)))) == ["shard_unreadable"]


DRIFTED = {
    "there is no column messages; the columns are text, images": [("text", pa.string()), ("images", IMAGES)],
    "there is no column images; the columns are messages": [("messages", MESSAGES)],
    "messages is string": [("messages", pa.string()), ("images", IMAGES)],
    "messages is list<element: string>": [("messages", pa.list_(pa.string())), ("images", IMAGES)],
    "images is struct<bytes: binary>": [("messages", MESSAGES), ("images", pa.struct([("bytes", pa.binary())]))],
    "images is list<element: int64>": [("messages", MESSAGES), ("images", pa.list_(pa.int64()))],
}  # fmt: skip


@pytest.mark.parametrize("detail", DRIFTED)
def test_a_file_of_another_schema_is_refused_row_by_row(tmp_path: Path, detail: str) -> None:
    parquet(tmp_path / "0.parquet", range(2))
    drifted = pa.table([pa.nulls(3, kind) for _, kind in DRIFTED[detail]], schema=pa.schema(DRIFTED[detail]))
    pq.write_table(drifted, tmp_path / "1.parquet")
    parquet(tmp_path / "2.parquet", range(2, 4))
    rows = read(ParquetSource(path=str(tmp_path)))
    assert reasons(rows) == ["", "", *["schema_drift"] * 3, "", ""]
    assert details(rows) == [detail] * 3


def test_other_columns_large_types_and_strings_as_content_are_no_drift(tmp_path: Path) -> None:
    message = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    image = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("messages", pa.large_list(message)),
            ("images", pa.large_list(image)),
            ("source", pa.string()),
        ]
    )
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "me"}]
    rows = [{"id": n, "messages": said, "images": [{"bytes": PICTURE}], "source": "x"} for n in (None, 8)]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    found = read(ParquetSource(path=str(tmp_path)))
    assert [row for row in found if isinstance(row, Broken)] == []
    assert [normalise(row).id for row in found if isinstance(row, dict)] == [
        f"parquet:{tmp_path.name}/train/a.parquet/0",
        "8",
    ]
    assert found[0]["images"] == [{"bytes": PICTURE}]  # type: ignore[index]


def test_shards_that_datasets_wrote_are_read_alike(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    item = {"index": Value("int64"), "text": Value("string"), "type": Value("string")}
    features = Features(
        {"messages": List({"content": List(item), "role": Value("string")}), "images": List(ImageFeature())}
    )
    row = {"messages": turns(1), "images": [{"bytes": PICTURE, "path": None}]}
    Dataset.from_list([row], features=features).to_parquet(tmp_path / "train-0.parquet")
    rows = read(ParquetSource(path=str(tmp_path)))
    assert (reasons(rows), answers(rows), rows[0]["images"]) == ([""], ["1"], [{"bytes": PICTURE}])  # type: ignore[index]


def test_a_text_that_is_not_utf8_spoils_its_own_row_only(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", range(3), compression="none", use_dictionary=False)
    data = path.read_bytes().replace(b"\x01\0\0\x001", b"\x01\0\0\0\xff")  # the answer "1" with its length
    path.write_bytes(data)
    rows = read(ParquetSource(path=str(path)))
    assert (reasons(rows), details(rows)) == (["", "malformed", ""], ["a text is not UTF-8"])


def test_two_pieces_of_a_row_group_can_be_read_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_pipeline.data.sources.parquet.BATCH_BYTES", 2000)
    parquet(tmp_path / "a.parquet", range(3 * PIECE_ROWS), 3 * PIECE_ROWS)
    reader = open_source(ParquetSource(path=str(tmp_path)), "train")
    first, second, third = reader.pieces(Cursor())
    assert len(list(reader.rows(first))) == PIECE_ROWS  # which leaves the row group open behind it
    pairs = list(zip(reader.rows(second), reader.rows(third), strict=True))
    assert answers([row for row, _ in pairs]) == [f"{n}" for n in range(PIECE_ROWS, 2 * PIECE_ROWS)]
    assert answers([row for _, row in pairs]) == [f"{n}" for n in range(2 * PIECE_ROWS, 3 * PIECE_ROWS)]


def test_a_footer_that_contradicts_itself_is_not_believed(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", range(8))
    data = path.read_bytes()
    num_rows = b"\x16\x10\x19"  # 8, between the schema and the row groups of 4
    assert data.count(num_rows) == 1
    path.write_bytes(data.replace(num_rows, b"\x16\x12\x19"))
    rows = read(ParquetSource(path=str(path)))
    assert (reasons(rows), details(rows)) == (
        ["shard_unreadable"],
        ["a.parquet: the footer contradicts itself about the number of rows"],
    )


def test_a_row_group_is_decoded_once_by_one_who_reads_its_pieces_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_pipeline.data.sources import parquet as module

    decoded: list[int] = []
    batches = module._batches

    def counted(group: module.Group) -> Iterator[Any]:
        for batch in batches(group):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(module, "_batches", counted)
    parquet(tmp_path / "a.parquet", range(3 * PIECE_ROWS), 3 * PIECE_ROWS)
    assert len(read(ParquetSource(path=str(tmp_path)))) == sum(decoded) == 3 * PIECE_ROWS


# --------------------------------------------------------------------------------------------- JSON: good rows


def test_llava_turns_become_messages_as_vsft_has_them(tmp_path: Path) -> None:
    said = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "red"},
        {"from": "user", "value": "And here?\n<image>"},
        {"from": "assistant", "value": "blue"},
        {"from": "narrator", "value": ""},
    ]
    for source in (
        lines(tmp_path / "a.jsonl", llava(0, conversations=said)),
        array(tmp_path / "a.json", llava(0, conversations=said)),
    ):
        (row,) = read(source)
        assert isinstance(row, dict)
        assert row["id"] == "row-0"
        assert [message["role"] for message in row["messages"]] == [
            "system",
            "user",
            "assistant",
            "user",
            "assistant",
            "narrator",
        ]
        assert row["messages"][1]["content"] == [
            {"index": 0, "text": None, "type": "image"},
            {"index": None, "text": "\nWhat is it?", "type": "text"},
        ]
        assert row["messages"][3]["content"] == [
            {"index": None, "text": "And here?\n", "type": "text"},
            {"index": 1, "text": None, "type": "image"},
        ]


@pytest.mark.parametrize("images", [["a.png"], [{"path": "a.png"}]])
def test_vsft_rows_name_their_pictures_by_path(tmp_path: Path, images: list[Any]) -> None:
    rows = read(lines(tmp_path / "a.jsonl", vsft(1, images=images, kinds=["number"], id=5)))
    assert rows == [{"id": "5", "messages": turns(1), "images": [{"bytes": PICTURE}], "kinds": ["number"]}]


def test_pictures_are_looked_for_in_the_folder_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "coco/train").mkdir(parents=True)
    (tmp_path / "coco/train/b.png").write_bytes(a_picture(9))
    row = llava(1, image="train/b.png")
    for source in (lines(tmp_path / "a.jsonl", row), array(tmp_path / "a.json", row)):
        (found,) = read(source.model_copy(update={"images": str(tmp_path / "coco")}))
        assert isinstance(found, dict)
        assert found["images"] == [{"bytes": a_picture(9)}]
        assert reasons(read(source)) == ["image_missing"]


def test_a_conversation_without_a_picture_is_a_row(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]
    rows = read(
        lines(
            tmp_path / "a.jsonl", {"conversations": said}, llava(1, image=None, conversations=said), vsft(2, images=[])
        )
    )
    assert [row["images"] for row in rows if isinstance(row, dict)] == [[], [], []]


def test_empty_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    one, two = (json.dumps(vsft(n)).encode() for n in (1, 2))
    assert answers(read(lines(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + one + b"\r", b"", b" \t\r", two))) == ["1", "2"]
    assert answers(read(array(tmp_path / "a.json", raw=b"\xef\xbb\xbf \n[" + one + b"\n,\n" + two + b",\n]\n"))) == [
        "1",
        "2",
    ]
    assert read(array(tmp_path / "a.json", raw=b" [ ] ")) == read(lines(tmp_path / "a.jsonl")) == []


def test_a_text_of_10_mb_is_read(tmp_path: Path) -> None:
    text = 'a "quoted" \\ ' * 800_000
    for source in (
        lines(tmp_path / "a.jsonl", vsft(0), llava(text, id=1), vsft(2)),
        array(tmp_path / "a.json", llava(0), llava(text, id=1), llava(2)),
    ):
        assert answers(read(source)) == ["0", text.strip(), "2"]


@pytest.mark.parametrize("make", [lines, array])
def test_a_file_of_8_mb_is_read_in_2_mb(tmp_path: Path, make: Callable[..., Source]) -> None:
    source = make(tmp_path / "a.json", *(llava(n, image=None, text="x" * 20_000) for n in range(400)))
    reader = open_source(source, "train")
    tracemalloc.start()
    try:
        assert sum(1 for piece in reader.pieces(Cursor()) for _ in reader.rows(piece)) == 400
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------- JSON: bad rows

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
BAD_JSON: dict[str, tuple[bytes, str]] = {
    "no JSON": (b'{"id": }', "not JSON: Expecting value"),
    "single quotes": (b"{'id': 'a'}", "not JSON"),
    "a list": (b'["a"]', "not an object but list"),
    "a number": (b"5", "not an object but int"),
    "null": (b"null", "not an object but NoneType"),
    "a string": (b'"a, b] and {"', "not an object but str"),
    "NaN": (b'{"score": NaN}', "NaN is not a number"),
    "Infinity": (b'{"score": -Infinity}', "-Infinity is not a number"),
    "a huge number": (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
    "deep": (DEEP, "nested too deeply"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
    "neither": (b'{"id": null}', "neither messages nor conversations"),
    "conversations": (b'{"conversations": {"from": "human"}}', "conversations is not a list"),
    "turn": (b'{"conversations": ["Who?"]}', "a turn of conversations has no from or no value"),
    "value": (b'{"conversations": [{"from": "human", "value": 5}]}', "a turn of conversations has no from or no value"),
    "images": (b'{"messages": [], "images": "a.png"}', "images is not a list but str"),
    "image": (b'{"conversations": [], "image": {"path": "a.png"}}', "neither a path nor a list of paths but dict"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_what_is_no_row_is_refused_and_the_next_ones_are_read(tmp_path: Path, name: str) -> None:
    data, detail = BAD_JSON[name]
    for source in (
        lines(tmp_path / "a.jsonl", vsft(0), data, vsft(2)),
        array(tmp_path / "a.json", llava(0), data, llava(2)),
    ):
        rows = read(source)
        assert (reasons(rows), answers(rows)) == (["", "malformed", ""], ["0", "2"])
        assert isinstance(rows[1], Broken)
        assert detail in rows[1].detail
        assert (len(rows[1].digest), rows[1].id) == (
            64,
            f"{open_source(source, 'train').origin}/{Path(source.path).name}/1",
        )


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("gone.png", "image_missing"),
        ("sub", "image_missing"),
        ("a.png/b.png", "image_missing"),
        ("x" * 5000, "image_missing"),
        ("loop", "image_missing"),
        ("../secret.png", "image_path_escapes"),
        ("sub/../../secret.png", "image_path_escapes"),
        ("/etc/passwd", "image_path_escapes"),
        ("link.png", "image_path_escapes"),
        ("", "malformed"),
        ("a.png\0", "malformed"),
        ("\ud83d.png", "malformed"),
        (["a.png", None], "malformed"),
        ([["a.png"]], "malformed"),
        ([{"path": "a.png"}], "malformed"),
        (5, "malformed"),
        ({"path": "a.png"}, "malformed"),
        (None, "image_count_mismatch"),
        ([], "image_count_mismatch"),
        (["a.png", "a.png"], "image_count_mismatch"),
    ],
)  # fmt: skip
def test_a_picture_that_cannot_be_had_refuses_its_row(tmp_path: Path, image: Any, reason: str) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(PICTURE)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop").symlink_to(folder / "loop")
    for source in (
        lines(folder / "a.jsonl", llava(0, image=image), vsft(1)),
        array(folder / "a.json", llava(0, image=image), llava(1)),
    ):
        assert reasons(read(source)) == [reason, ""]


@pytest.mark.parametrize(
    "image", ["data:image/png;base64,iVBORw0KGgo=", {"bytes": "iVBORw0KGgo="}, {"path": None}, 5, None]
)
def test_pictures_in_jsonl_are_named_by_path_only(tmp_path: Path, image: Any) -> None:
    (reason,) = reasons(read(lines(tmp_path / "a.jsonl", vsft(0, images=[image]))))
    assert reason == ("image_missing" if isinstance(image, str) else "malformed")


def test_of_a_picture_no_more_is_read_than_the_gate_takes(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", vsft(0))
    os.truncate(tmp_path / "a.png", 10 * MAX_BYTES)
    (row,) = read(source)
    assert isinstance(row, dict)
    assert len(row["images"][0]["bytes"]) == MAX_BYTES + 1


def test_a_row_with_a_million_pictures_reads_none(tmp_path: Path) -> None:
    many = [{"from": "human", "value": "<image>" * 1_000_000}, {"from": "gpt", "value": "red"}]
    names = ["a.png"] * 1000
    source = lines(tmp_path / "a.jsonl", llava(0, conversations=many), llava(1, image=names), vsft(2, images=names))
    (tmp_path / "a.png").unlink()
    tracemalloc.start()
    try:
        assert reasons(read(source)) == ["image_count_mismatch", "image_count_mismatch", "not_one_image"]
        assert tracemalloc.get_traced_memory()[1] < 60_000_000  # the row alone has 7 MB; a million items have 200
    finally:
        tracemalloc.stop()


def test_a_line_or_element_that_is_too_long_is_refused_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_pipeline.data.sources import llava_json

    for module in (jsonl, llava_json, conversation):
        monkeypatch.setattr(module, "MAX_JSON_BYTES", 10_000)
    for source in (
        lines(tmp_path / "a.jsonl", vsft(0), vsft("x" * 35_000), vsft(2)),
        array(tmp_path / "a.json", llava(0), llava("x" * 35_000), llava(2)),
    ):
        rows = read(source)
        assert (reasons(rows), answers(rows)) == (["", "malformed", ""], ["0", "2"])
        assert "of more than 10000 bytes" in details(rows)[0]
    with (tmp_path / "a.json").open("rb") as array_file, (tmp_path / "a.jsonl").open("rb") as lines_file:
        assert max(len(element.data) for element in elements(array_file)) == 10_001
        assert max(len(line) for _, line in jsonl.lines(lines_file)) <= 10_001
    just_fits = json.dumps(vsft(1)).encode().ljust(10_000)
    assert answers(read(lines(tmp_path / "a.jsonl", vsft(0), just_fits, vsft(2)))) == ["0", "1", "2"]


def test_an_id_that_is_no_name_is_replaced(tmp_path: Path) -> None:
    nested: Any = "x"
    for _ in range(900):
        nested = [nested]
    rows = read(lines(tmp_path / "a.jsonl", *(vsft(n, id=own) for n, own in enumerate([nested, {}, None, "", 3.5]))))
    assert [row["id"] for row in rows if isinstance(row, dict)] == [
        *(f"jsonl:a.jsonl/train/a.jsonl/{n}" for n in range(4)),
        "3.5",
    ]


def test_half_a_surrogate_pair_in_an_id_can_be_written_down(tmp_path: Path) -> None:
    (row,) = read(lines(tmp_path / "a.jsonl", llava(0, id="\ud83d" * 300, image="gone.png")))
    assert isinstance(row, Broken)
    assert row.id.encode()[:6] == b"\\ud83d"
    assert len(row.id) <= 200


@pytest.mark.parametrize(
    ("raw", "found", "detail"),
    [
        (b"", ["shard_unreadable"], "the file is empty"),
        (b'{"conversations": []}', ["shard_unreadable"], "the file begins with b'{\"conversations\":"),
        (b"\xff\xfe[\0]\0", ["shard_unreadable"], "the file begins with"),
        (b"[ROW, ROW", ["", "shard_unreadable"], "the file ends within the array"),  # the second may lack its end
        (b"[ROW, ROW,", ["", "", "shard_unreadable"], "the file ends within the array"),
        (b"[ROW, {'", ["", "shard_unreadable"], "the file ends within the array"),
        (b'[ROW, {"a": "b', ["", "shard_unreadable"], "the file ends within the array"),
        (b"[ROW] [ROW]", ["", "shard_unreadable"], "goes on behind its array: b'[{"),
        (b"[ROW}, ROW]", ["malformed", ""], "not JSON"),
        (b'[{"a": 1]}, ROW]', ["malformed", ""], "not JSON"),
    ],
)  # fmt: skip
def test_a_damaged_array_is_read_as_far_as_it_goes(tmp_path: Path, raw: bytes, found: list[str], detail: str) -> None:
    source = array(tmp_path / "a.json", raw=raw.replace(b"ROW", json.dumps(llava(0)).encode()))
    rows = read(source)
    assert reasons(rows) == found
    assert detail in details(rows)[-1]
    again = [row for n in range(len(rows)) for row in read(source, start=Cursor(row=n))[:1]]
    assert again == rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text() | st.dictionaries(st.text(max_size=5), st.text(), max_size=3) | st.lists(st.integers()), max_size=6
    ),
    st.integers(1, 9),
)
def test_elements_are_found_wherever_a_chunk_ends(values: list[Any], step: int) -> None:
    class Dripping(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(step, size or 0) if size == CHUNK and self.tell() else size)

    data = b"[" + json.dumps(values, indent=step % 3, ensure_ascii=step % 2 == 0).encode()[1:]
    found = list(elements(Dripping(data)))
    assert [json.loads(element.data) for element in found] == values
    for number, element in enumerate(found):
        assert list(elements(Dripping(data), element.offset)) == found[number:]


# --------------------------------------------------------------------------------------------- WebDataset


def test_a_picture_with_a_caption_is_asked_the_question(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", ("a.jpg", PICTURE), ("a.caption", "  Zwei Käse\n".encode()))
    (row,) = read(source.model_copy(update={"question": "What do you see?"}))
    assert isinstance(row, dict)
    assert row["id"] == "webdataset:a.tar/train/a.tar/a"
    assert row["messages"][0]["content"] == [
        {"index": 0, "text": None, "type": "image"},
        {"index": None, "text": "\nWhat do you see?", "type": "text"},
    ]
    assert (normalise(row).pairs, row["images"]) == ([("What do you see?", "Zwei Käse")], [{"bytes": PICTURE}])


@pytest.mark.parametrize("end", ["jpg", "jpeg", "png", "webp", "gif", "bmp", "PNG"])
def test_rows_in_json_take_their_picture_from_the_shard(tmp_path: Path, end: str) -> None:
    rows = read(
        tar(
            tmp_path / "a.tar",
            (f"x/a.{end}", PICTURE),
            ("x/a.json", vsft(1)),
            ("x/b.json", llava(2)),
            (f"x/b.{end}", PICTURE),
        )
    )
    assert (reasons(rows), answers(rows)) == (["", ""], ["1", "2"])
    assert [row["id"] for row in rows if isinstance(row, dict)] == ["webdataset:a.tar/train/a.tar/x/a", "row-2"]


def test_shards_as_img2dataset_writes_them_are_read(tmp_path: Path) -> None:
    about = {"caption": "1", "url": "https://example.org/1.jpg", "key": "000000001", "status": "success"}
    rows = read(
        tar(tmp_path / "00000.tar", ("000000001.jpg", PICTURE), ("000000001.json", about), ("000000001.txt", b"one"))
    )
    assert (reasons(rows), answers(rows)) == ([""], ["one"])


BAD_SAMPLES: dict[str, tuple[list[tuple[str, Any]], str, str]] = {
    "no text": ([("a.jpg", PICTURE)], "malformed", "no .json, .txt or .caption"),
    "no picture": ([("a.txt", b"one")], "malformed", "no picture; there is txt"),
    "a picture in the name only": ([("a.seg.png", PICTURE), ("a.txt", b"one")], "malformed", "no picture"),
    "an empty caption": ([("a.jpg", PICTURE), ("a.txt", b" \n")], "caption_missing", "a.txt is empty"),
    "a caption that is not UTF-8": ([("a.jpg", PICTURE), ("a.txt", b"K\xe4se")], "malformed", "not UTF-8 at byte 1"),
    "a long caption": ([("a.jpg", PICTURE), ("a.txt", b"x" * (1 << 21))], "malformed", "2097152 bytes, at most"),
    "no JSON": ([("a.jpg", PICTURE), ("a.json", b"{")], "malformed", "not JSON"),
    "JSON without a conversation": ([("a.jpg", PICTURE), ("a.json", {"url": "x"})], "malformed", "neither messages"),
    "two captions": ([("a.jpg", PICTURE), ("a.txt", b"one"), ("a.txt", b"two")], "malformed", "two files txt"),
    "two pictures": ([("a.jpg", PICTURE), ("a.png", PICTURE), ("a.txt", b"one")], "image_count_mismatch", ""),
    "many pictures": ([("a.jpg", PICTURE)] * 17 + [("a.txt", b"one")], "not_one_image", "17 images"),
    "out of the archive": ([("../a.jpg", PICTURE), ("../a.txt", b"one")], "malformed", "leads out of the archive"),
    "from the root": ([("/etc/a.jpg", PICTURE), ("/etc/a.txt", b"one")], "malformed", "leads out of the archive"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_refused_and_the_next_ones_are_read(tmp_path: Path, name: str) -> None:
    bad, reason, detail = BAD_SAMPLES[name]
    rows = read(tar(tmp_path / "s.tar", *captioned(0), *bad, *captioned(2)))
    assert (reasons(rows), answers(rows)[:1], answers(rows)[-1:]) == (["", reason, ""], ["0"], ["2"])
    assert all(detail in told for told in details(rows))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_never_followed(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(a_picture(99))
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname, link.size = kind, str(secret), 2000  # nothing of the sort follows
    rows = read(tar(tmp_path / "s.tar", *captioned(0), ("", link), ("a.txt", b"one"), *captioned(2)))
    assert (reasons(rows), answers(rows)) == (["", "malformed", ""], ["0", "2"])
    is_link = kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)
    assert details(rows) == [f"a.jpg: {'a link is not followed' if is_link else 'not a plain file'}"]


def test_folders_and_files_without_a_sample_are_passed_over(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("000000.d")
    folder.type = tarfile.DIRTYPE
    others = [("", folder), ("README", b"x"), ("._000000.jpg", b"x"), ("__index__.json", b"{}"), (".DS_Store", b"x")]
    rows = read(tar(tmp_path / "s.tar", *captioned(0)[:1], *others, *captioned(0)[1:]))
    assert (reasons(rows), answers(rows)) == ([""], ["0"])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_format_of_names_is_read(tmp_path: Path, format: int) -> None:
    folder = "x" * 120
    key = f"{folder}/{'y' * (60 if format == tarfile.USTAR_FORMAT else 300)}/ä"
    members = [(f"{key}{n}.{end}", data) for n in range(3) for end, data in (("jpg", PICTURE), ("txt", b"one"))]
    source = tar(tmp_path / "s.tar", *members, *captioned(3), format=format)
    rows = read(source)
    assert [row["id"] for row in rows if isinstance(row, dict)] == [
        *(f"webdataset:s.tar/train/s.tar/{key}{n}" for n in range(3)),
        "webdataset:s.tar/train/s.tar/000003",
    ]
    assert [read(source, start=Cursor(row=n))[0] for n in range(4)] == rows


def test_shards_joined_with_cat_are_read_whole(tmp_path: Path) -> None:
    for number in (0, 1):
        tar(tmp_path / f"{number}", *captioned(number))
    joined = tmp_path / "joined.tar"
    joined.write_bytes((tmp_path / "0").read_bytes() + (tmp_path / "1").read_bytes())
    assert answers(read(WebDatasetSource(path=str(joined)))) == ["0", "1"]


def test_the_rest_of_a_truncated_shard_is_one_refused_row_wherever_it_breaks_off(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", *captioned(0, 1, 2))
    whole = Path(source.path).read_bytes()
    size = 2048  # of a sample: two headers and two blocks, of which the last holds one byte
    for length in range(0, 3 * size + 512, 128):
        Path(source.path).write_bytes(whole[:length])
        rows = read(source)
        assert reasons(rows) == [""] * ((length + 511) // size) + ["shard_unreadable"], length
        assert "breaks off at byte" in details(rows)[0]
        assert [read(source, start=Cursor(row=n))[0] for n in range(len(rows))] == rows


def test_a_sample_that_is_cut_behind_its_caption_is_part_of_the_rest(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", *captioned(0, 1), ("000001.json", llava(1)))
    os.truncate(source.path, 2 * 2048 + 520)
    rows = read(source)
    assert (reasons(rows), answers(rows)) == (["", "shard_unreadable"], ["0"])
    assert details(rows) == ["a.tar: it breaks off at byte 4616, within 000001.json"]


def test_damage_between_samples_costs_the_rest_only(tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar", *captioned(0, 1, 2))
    data = bytearray(Path(source.path).read_bytes())
    data[2048:2560] = b"\x07" * 512
    Path(source.path).write_bytes(data)
    rows = read(source)
    assert (reasons(rows), answers(rows)) == (["", "shard_unreadable"], ["0"])
    assert details(rows) == ["a.tar: no header of an archive at byte 2048"]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_no_bytes_make_a_reader_raise(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Files with a few bytes overwritten; only what is read counts, and every row is given or refused."""
    folder = tmp_path_factory.mktemp("fuzz")
    source: Source = data.draw(
        st.sampled_from(
            [
                tar(
                    folder / "a.tar",
                    *captioned(0, 1),
                    ("b.jpg", PICTURE),
                    ("b.json", llava(2)),
                    format=tarfile.PAX_FORMAT,
                ),
                lines(folder / "a.jsonl", vsft(0), llava(1), vsft(2)),
                array(folder / "a.json", llava(0), llava(1), llava(2)),
                ParquetSource(path=str(parquet(folder / "a.parquet", range(8)))),
            ]
        )
    )
    path = Path(source.path)  # type: ignore[union-attr]
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[place : place + len(new)] = new
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]))
    rows = read(source)
    assert open_source(source, "train").num_rows() == len(rows)
    for row in rows:
        if isinstance(row, Broken):
            row.detail.encode()
            row.id.encode()
        else:
            with contextlib.suppress(Malformed):
                normalise(row)


# --------------------------------------------------------------------------------------------- folders


def test_the_first_line_of_the_text_beside_a_picture_is_its_caption(tmp_path: Path) -> None:
    (tmp_path / "Tiere").mkdir()
    (tmp_path / "Tiere/Katze.JPG").write_bytes(PICTURE)
    (tmp_path / "Tiere/Katze.txt").write_bytes("\ufeffA cat.\r\nde.utf8=Eine Katze.\n".encode())
    (tmp_path / "a.b.png").write_bytes(PICTURE)
    (tmp_path / "a.b.txt").write_text("\n a dog \n")
    for name in ("notes.md", "drawing.svg", ".hidden.png", "a.txt"):
        (tmp_path / name).write_text("no row")
    rows = read(FolderSource(path=str(tmp_path), question="What?"))
    assert reasons(rows) == ["", ""]
    assert [(row["id"], normalise(row).pairs) for row in rows if isinstance(row, dict)] == [
        (f"folder:{tmp_path.name}/train/Tiere/Katze.JPG", [("What?", "A cat.")]),
        (f"folder:{tmp_path.name}/train/a.b.png", [("What?", "a dog")]),
    ]
    assert isinstance(rows[0], dict)
    assert rows[0]["messages"][0]["content"][1]["text"] == "\nWhat?"


@pytest.mark.parametrize(
    ("caption", "reason", "detail"),
    [
        (None, "caption_missing", "b.txt: No such file"),
        (b"", "caption_missing", "b.txt is empty"),
        (b" \n\t\n", "caption_missing", "b.txt is empty"),
        (b"K\xe4se", "malformed", "b.txt is not UTF-8 at byte 1"),
        (b"a\nde.utf8=\xff", "malformed", "b.txt is not UTF-8 at byte 10"),
        ("link", "image_path_escapes", "b.txt leads out"),
    ],
)  # fmt: skip
def test_a_picture_without_a_caption_is_refused(tmp_path: Path, caption: Any, reason: str, detail: str) -> None:
    root = tmp_path / "stamps"
    source = stamps(root, 1)
    (root / "b.png").write_bytes(PICTURE)
    if caption == "link":
        (tmp_path / "secret.txt").write_text("secret")
        (root / "b.txt").symlink_to(tmp_path / "secret.txt")
    elif caption is not None:
        (root / "b.txt").write_bytes(caption)
    rows = read(source)
    assert reasons(rows) == ["", reason]
    assert details(rows)[0].startswith(detail)
    assert isinstance(rows[1], Broken)
    assert rows[1].id == "folder:stamps/train/b.png"


def test_pictures_that_are_links_out_of_the_folder_are_refused_and_such_folders_not_entered(tmp_path: Path) -> None:
    source = stamps(tmp_path / "stamps", 1)
    stamps(tmp_path / "elsewhere", 3)
    (tmp_path / "stamps/others").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "stamps/link.png").symlink_to(tmp_path / "elsewhere/000000.png")
    (tmp_path / "stamps/link.txt").write_text("a link")
    assert reasons(read(source)) == ["", "image_path_escapes"]


def test_a_name_that_is_not_utf8_on_disk_can_be_written_down(tmp_path: Path) -> None:
    stamps(tmp_path / "stamps", 1)
    for end, data in ((b".png", PICTURE), (b".txt", b"cheese")):
        with open(os.fsencode(tmp_path / "stamps") + b"/K\xe4se" + end, "wb") as file:
            file.write(data)
    rows = read(FolderSource(path=str(tmp_path / "stamps")))
    assert (reasons(rows), answers(rows)) == (["", ""], ["0", "cheese"])
    assert isinstance(rows[1], dict)
    assert rows[1]["id"] == "folder:stamps/train/K\\udce4se.png"


def test_a_picture_that_is_put_between_those_that_were_read_is_noticed(tmp_path: Path) -> None:
    source = stamps(tmp_path / "stamps", PIECE_ROWS + 5)
    reader = FolderReader(source, "train")
    place = Cursor(shard=1, row=2, behind=reader.behind(1))
    (tmp_path / "stamps/zebra.png").write_bytes(PICTURE)
    assert len(read(source, start=place)) == 4
    (tmp_path / "stamps/000000b.png").write_bytes(PICTURE)
    with pytest.raises(RevisionMoved, match="before shard 1"):
        read(source, start=place)


def test_reasons_are_counted_once_for_each_picture(tmp_path: Path) -> None:
    source = stamps(tmp_path / "stamps", 6)
    for number in (1, 4):
        (tmp_path / f"stamps/{number:06}.txt").unlink()
    assert Counter(reasons(read(source))) == {"": 4, "caption_missing": 2}
