"""A hub data set gives every row once and in order, whatever the hub does; ``datasets`` runs unpatched on loopback."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_pipeline.contracts import Cursor, Piece
from llava_pipeline.data.images import decode
from llava_pipeline.data.record import Row, normalise
from llava_pipeline.data.sources import hub as hub_module
from llava_pipeline.data.sources import patient
from llava_pipeline.data.sources.hub import HubReader
from llava_pipeline.data.sources.reader import Broken
from llava_pipeline.errors import NotFound, SourceUnavailable
from llava_pipeline.spec import HubSource, Split
from tests.backbones.hub import Fault, Hub, follow, running_hub
from tests.data.rows import IMAGE, says

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = HubSource(repo_id="owner/data", revision=COMMIT)
FIRST, SECOND, TEST = (
    f"data/{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
)
PER_GROUP = 10
IDS = [f"row-{number}" for number in range(50)]
QUICK = 20.0  # seconds of patience that a fault which passes never needs


def a_photo(number: int) -> bytes:
    """A picture of noise, so that it takes its 3 kB in a file."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.Random(number).randbytes(32 * 32 * 3)).save(buffer, "PNG")
    return buffer.getvalue()


def some_rows(start: int, stop: int) -> list[Row]:
    messages = [says("user", "What is it?", {**IMAGE, "text": None}), says("assistant", "noise")]
    return [
        {"id": f"row-{n}", "messages": messages, "images": [{"bytes": a_photo(n), "path": f"{n}.png"}]}
        for n in range(start, stop)
    ]


def parquet(rows: list[Row]) -> bytes:
    """A Parquet file with row groups of ten rows."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=PER_GROUP)
    return buffer.getvalue()


def span(content: bytes, group: int) -> tuple[int, int]:
    """Where a row group's bytes begin and end."""
    found = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(group)
    columns = [found.column(number) for number in range(found.num_columns)]
    start = min(column.dictionary_page_offset or column.data_page_offset for column in columns)
    return start, start + sum(column.total_compressed_size for column in columns)


@pytest.fixture(scope="session")
def files() -> dict[str, bytes]:
    """Fifty training rows in five row groups of two files, and five held-out ones."""
    return {
        FIRST: parquet(some_rows(0, 30)),
        SECOND: parquet(some_rows(30, 50)),
        TEST: parquet(some_rows(90, 95)),
        "README.md": b"---\nlicense: mit\n---\n# Noise\n",
    }


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the data set, and a process that has asked for nothing yet and does not wait long."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(hub_module, "_opened", {})
    monkeypatch.setattr(patient, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(patient, "SILENT_SECONDS", 1.0)
    with running_hub() as hub:
        hub.add("owner/data", COMMIT, dict(files))
        follow(hub, monkeypatch)
        huggingface_hub.close_session()
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield hub
    huggingface_hub.close_session()


def a_reader(split: Split = "train", patience: float = QUICK, **changes: Any) -> HubReader:
    return HubReader(SOURCE.model_copy(update=changes), split, patience)


def all_rows(reader: HubReader, start: Cursor | None = None) -> Iterator[Row | Broken]:
    for piece in reader.pieces(start or Cursor()):
        yield from reader.rows(piece)


def ids(rows: Iterator[Row | Broken]) -> list[str]:
    """Ids of rows that are all sound, and of refused ones the reason."""
    return [row.reason if isinstance(row, Broken) else row["id"] for row in rows]


# ------------------------------------------------------------------------------------------------ rows and pieces


def test_every_row_comes_once_and_in_order_and_its_picture_is_bytes(hub: Hub) -> None:
    rows = list(all_rows(a_reader()))
    assert [row["id"] for row in rows if isinstance(row, dict)] == IDS
    for number, row in enumerate(rows):
        assert isinstance(row, dict)
        assert normalise(row).images == [a_photo(number)]
        assert decode(normalise(row).images[0]).size == (32, 32)


def test_a_piece_is_a_row_group_named_by_its_file(hub: Hub) -> None:
    reader = a_reader()
    assert list(reader.pieces(Cursor())) == [
        Piece(shard=0, name=f"{FIRST}#0", start=0, stop=10),
        Piece(shard=1, name=f"{FIRST}#1", start=0, stop=10),
        Piece(shard=2, name=f"{FIRST}#2", start=0, stop=10),
        Piece(shard=3, name=f"{SECOND}#0", start=0, stop=10),
        Piece(shard=4, name=f"{SECOND}#1", start=0, stop=10),
    ]
    assert (reader.num_rows(), reader.num_before(Cursor(shard=3, row=4)), reader.behind(3)) == (50, 34, "")
    assert (reader.origin, reader.source) == (f"hub:owner/data@{COMMIT}/train", SOURCE)


def test_a_row_group_that_is_far_too_long_is_cut_at_the_same_places_from_wherever_one_starts(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MOST_ROWS", 4)
    whole = [(p.start, p.stop) for p in a_reader().pieces(Cursor()) if p.shard == 1]
    rest = [(p.start, p.stop) for p in a_reader().pieces(Cursor(shard=1, row=5)) if p.shard == 1]
    assert (whole, rest) == ([(0, 4), (4, 8), (8, 10)], [(5, 8), (8, 10)])
    assert ids(all_rows(a_reader())) == IDS


@pytest.mark.parametrize(("shard", "row"), [(0, 0), (0, 7), (2, 9), (3, 0), (4, 10), (5, 0)])
def test_reading_goes_on_at_any_row(hub: Hub, shard: int, row: int) -> None:
    assert ids(all_rows(a_reader(), Cursor(shard=shard, row=row))) == IDS[shard * PER_GROUP + row :]


def test_a_piece_downloads_its_row_group_and_no_other(hub: Hub) -> None:
    rows = some_rows(0, 30)
    for number, row in enumerate(rows):
        row["images"][0]["bytes"] = random.Random(number).randbytes(60_000)
    content = parquet(rows)
    hub.add("owner/data", COMMIT, {FIRST: content})
    worker = a_reader()
    hub.sent.clear()
    assert ids(worker.rows(Piece(shard=1, name=f"{FIRST}#1", start=0, stop=10))) == IDS[10:20]
    start, stop = span(content, 1)
    end_of_file = len(content) - hub_module.READ_AHEAD
    parts = [(first, first + size) for _, first, size in hub.sent if first < end_of_file]
    assert min(first for first, _ in parts) == start
    assert stop <= max(last for _, last in parts) <= stop + hub_module.READ_AHEAD
    # All that came: 600 kB of the row group, what was read ahead, and the end of the file, each time it was opened.
    assert stop - start > 600_000
    assert sum(size for _, _, size in hub.sent) <= stop - start + 4 * hub_module.READ_AHEAD


def test_a_worker_opens_a_data_set_without_the_ends_of_all_its_files(hub: Hub) -> None:
    a_reader()
    assert {name for name, _, size in hub.sent if name.endswith(".parquet")} == {FIRST}


def test_threads_that_share_a_data_set_get_what_one_gets(hub: Hub) -> None:
    reader = a_reader()
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda piece: ids(a_reader().rows(piece)), reader.pieces(Cursor()))
        assert [name for part in parts for name in part] == IDS
    assert sum("/tree/" in path and path.endswith("/data") for _, path in hub.requests) <= 5


def test_the_held_out_split_is_the_hub_s_own(hub: Hub) -> None:
    reader = a_reader("test")
    assert (reader.has_split, reader.origin) == (True, f"hub:owner/data@{COMMIT}/test")
    assert ids(all_rows(reader)) == [f"row-{n}" for n in range(90, 95)]


def test_without_a_test_split_both_are_read_from_the_training_rows(hub: Hub) -> None:
    reader = a_reader("test", test_split=None)
    assert (reader.has_split, ids(all_rows(reader))) == (False, IDS)


def test_a_split_that_is_not_there_is_the_person_s_mistake(hub: Hub) -> None:
    with pytest.raises(NotFound, match=r"no split trian, only train, test; correct data\.source\.train_split"):
        a_reader(train_split="trian")


def test_one_picture_a_row_is_a_list_of_one_and_a_row_without_an_id_gets_one(hub: Hub) -> None:
    rows = [{"messages": row["messages"], "image": row["images"][0]} for row in some_rows(0, 3)]
    hub.add("owner/data", COMMIT, {"data/train.parquet": parquet(rows)})
    found = list(all_rows(a_reader()))
    assert ids(iter(found)) == [f"hub:owner/data@{COMMIT}/train/data/train.parquet#0/{n}" for n in range(3)]
    assert [normalise(row).images for row in found if isinstance(row, dict)] == [[a_photo(n)] for n in range(3)]


def test_a_card_s_image_feature_is_not_decoded(hub: Hub) -> None:
    from datasets import Features, List
    from datasets import Image as ImageFeature

    rows = some_rows(0, 2)
    rows[1]["images"][0]["bytes"] = b"no picture"
    table = pa.Table.from_pylist(rows)
    features = Features.from_arrow_schema(table.schema) | {"images": List(ImageFeature())}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(Features(features).arrow_schema.metadata), buffer)
    hub.add("owner/data", COMMIT, {"data/train.parquet": buffer.getvalue()})
    found = [normalise(row).images for row in all_rows(a_reader()) if isinstance(row, dict)]
    assert found == [[a_photo(0)], [b"no picture"]]


def test_a_data_set_that_is_not_parquet_has_a_piece_a_file_of_unknown_length(hub: Hub) -> None:
    lines = {n: json.dumps({"id": f"row-{n}", "messages": [{"role": "user", "content": "?"}]}) for n in range(6)}
    content = {f"data/train-{i}.jsonl": "\n".join(lines[n] for n in range(3 * i, 3 * i + 3)).encode() for i in range(2)}
    hub.add("owner/data", COMMIT, content)
    reader = a_reader()
    assert [(p.shard, p.start, p.stop) for p in reader.pieces(Cursor())] == [(0, 0, None), (1, 0, None)]
    assert (reader.num_rows(), reader.num_before(Cursor()), reader.num_before(Cursor(shard=1))) == (None, 0, None)
    hub.faults.append(Fault("cut", file="train-0.jsonl"))
    assert ids(all_rows(reader)) == IDS[:6]
    assert ids(all_rows(reader, Cursor(shard=0, row=2))) == IDS[2:6]


def test_a_connection_that_is_cut_again_and_again_between_rows_repeats_none(hub: Hub) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(40):
            for ending, content in (("json", b'{"n": %d}' % number), ("png", a_photo(number))):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    hub.add("owner/data", COMMIT, {"data/train-0.tar": buffer.getvalue()})
    reader, found, images = a_reader(), [], []
    hub.faults.append(Fault("cut", times=40, file=".tar"))
    for row in all_rows(reader):
        assert isinstance(row, dict)
        found.append(row["json"]["n"])
        images.append(row["png"]["bytes"])
    assert (found, images) == (list(range(40)), [a_photo(n) for n in range(40)])
    assert hub.faults[0].times == 0


# ------------------------------------------------------------------------------------------------ faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, times=3),
        Fault(429, headers={"Retry-After": "1"}),
        Fault(502, times=2, stored=True),
        Fault("cut", times=2),
        Fault("short", times=2),
        Fault("garbled"),
        Fault("slow"),
        Fault("silent"),
    ],
    ids=lambda fault: str(fault.kind),
)
def test_a_fault_that_passes_costs_no_row_and_repeats_none(
    hub: Hub, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(fault.kind, fault.times, ".parquet", fault.headers, fault.stored)
    reader, found, times = a_reader(), [], fault.times
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "llava_pipeline"):
        for row in all_rows(reader):
            assert isinstance(row, dict)
            found.append(row["id"])
            if len(found) == 25:  # in the third row group: the fault meets the fourth
                hub.faults.append(fault)
    assert found == IDS
    assert fault.times == 0
    told = [record for record in caplog.records if record.name.startswith("llava_pipeline")]
    assert len(told) >= times
    assert all("again in" in record.getMessage() or "anew" in record.getMessage() for record in told)
    assert time.monotonic() - began > (1 if fault.kind == 429 else 0)


@pytest.mark.parametrize("kind", [503, 429, "silent", "garbled"])
def test_a_fault_of_the_listing_that_passes_is_waited_for(hub: Hub, kind: int | str) -> None:
    hub.faults += [Fault(kind, times=2, listing=True)]
    assert ids(all_rows(a_reader())) == IDS
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("kind", ["garbled", "cut", "short"])
def test_the_end_of_a_file_that_came_wrong_is_fetched_anew(hub: Hub, kind: str) -> None:
    hub.faults.append(Fault(kind, times=2, file=".parquet"))
    assert ids(all_rows(a_reader())) == IDS
    assert hub.faults[0].times == 0


def test_a_card_that_came_wrong_is_not_kept(hub: Hub, files: dict[str, bytes]) -> None:
    card = (
        b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/test-*.parquet\n---\n"
    )
    hub.add("owner/data", COMMIT, {**files, "README.md": card})
    hub.faults.append(Fault("garbled", file="README.md"))
    assert ids(all_rows(a_reader(test_split=None))) == [f"row-{n}" for n in range(90, 95)]


def test_a_hub_that_goes_down_and_comes_back_is_waited_for(hub: Hub) -> None:
    reader, found = a_reader(patience=20), []
    with ThreadPoolExecutor(1) as pool:
        for row in all_rows(reader):
            assert isinstance(row, dict)
            found.append(row["id"])
            if len(found) == 15:
                hub.stop()
                pool.submit(lambda: (time.sleep(1), hub.start()))
    assert found == IDS


# ------------------------------------------------------------------------------------------------ faults that stay


@pytest.mark.parametrize(
    "fault",
    [Fault(503), Fault("cut"), Fault("silent"), Fault("slow"), Fault("short")],
    ids=lambda fault: str(fault.kind),
)
def test_when_patience_ends_it_is_told_with_a_remedy_and_a_later_reader_goes_on(hub: Hub, fault: Fault) -> None:
    fault = Fault(fault.kind, 999, ".parquet")
    rows, found = all_rows(a_reader(patience=0.3)), []
    while len(found) < 20:
        found += ids(iter([next(rows)]))
    hub.faults.append(fault)
    began = time.monotonic()
    with pytest.raises(SourceUnavailable) as caught:
        next(rows)
    assert time.monotonic() - began < 30
    for part in ("owner/data", "asked for 0.3 s", "connect to the hub", "kind: parquet", "data.source=scenes"):
        assert part in str(caught.value)
    hub.faults.clear()
    assert found + ids(all_rows(a_reader(), Cursor(shard=2, row=0))) == IDS


def test_a_hub_that_asks_for_more_than_there_is_patience_is_not_waited_for(hub: Hub) -> None:
    hub.faults.append(Fault(429, times=99, listing=True, headers={"RateLimit": '"api";r=0;t=300'}))
    began = time.monotonic()
    with pytest.raises(SourceUnavailable, match="asks to wait 300 s; asked for 20 s"):
        a_reader()
    assert time.monotonic() - began < 30


def test_a_hub_that_is_not_there_is_told(hub: Hub) -> None:
    hub.stop()
    with pytest.raises(SourceUnavailable, match="connect to the hub"):
        a_reader(patience=0.1)
    with pytest.raises(SourceUnavailable, match="connect to the hub"):
        a_reader(patience=0.1, revision="main")


def test_offline_is_not_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    began = time.monotonic()
    for revision in (COMMIT, "main"):
        with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
            a_reader(patience=60, revision=revision)
    assert time.monotonic() - began < 30
    assert hub.requests == []


@pytest.mark.parametrize("changes", [{"repo_id": "owner/nothing"}, {"revision": "f" * 40}])
def test_what_is_not_there_is_not_waited_for(hub: Hub, changes: dict[str, str]) -> None:
    began = time.monotonic()
    with pytest.raises(NotFound, match=r"correct data\.source\.repo_id or data\.source\.revision"):
        a_reader(patience=60, **changes)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_gated_data_set_is_told_as_such(hub: Hub, revision: str) -> None:
    hub.gated.add("owner/data")
    with pytest.raises(SourceUnavailable, match="gated; accept its terms"):
        a_reader(patience=60, revision=revision)


def test_a_refusal_in_the_middle_is_final(hub: Hub) -> None:
    reader = a_reader(patience=60)
    pieces = list(reader.pieces(Cursor()))
    hub.faults.append(Fault(403, times=99, file=".parquet"))
    began = time.monotonic()
    with pytest.raises(SourceUnavailable, match="403"):
        list(reader.rows(pieces[0]))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("place", ["owner/model", "datasets/owner/other"])
def test_other_repositories_are_asked_for_as_before(hub: Hub, place: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    a_reader()
    hub.faults.append(Fault(503, times=99))
    hub.add(place.removeprefix("datasets/"), COMMIT, {"config.json": b"{}"})
    url = f"{hub.endpoint}/{place}/resolve/main/config.json"
    with pytest.raises(errors.HfHubHTTPError, match="503"):
        huggingface_hub.get_hf_file_metadata(url, retry_on_errors=False)
    assert hub.faults[0].times == 98


# ------------------------------------------------------------------------------------------------ files that are wrong


def damage(content: bytes, group: int) -> bytes:
    """The file with the bytes of one row group turned."""
    start, stop = span(content, group)
    return content[:start] + bytes(255 - byte for byte in content[start:stop]) + content[stop:]


def test_a_row_group_that_stays_corrupt_is_refused_row_by_row_and_the_next_is_read(
    hub: Hub, files: dict[str, bytes]
) -> None:
    hub.add("owner/data", COMMIT, {**files, FIRST: damage(files[FIRST], 1)})
    rows = list(all_rows(a_reader()))
    assert ids(iter(rows)) == [*IDS[:10], *["shard_unreadable"] * 10, *IDS[20:]]
    assert isinstance(rows[12], Broken)
    assert f"{FIRST}#1: " in rows[12].detail
    assert rows[12].id == f"hub:owner/data@{COMMIT}/train/{FIRST}#1/2"


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_a_file_whose_end_is_damaged_is_refused_as_one_row(hub: Hub, files: dict[str, bytes], name: str) -> None:
    hub.add("owner/data", COMMIT, {**files, name: files[name][:-200]})
    reader = a_reader()
    sound = IDS[30:] if name == FIRST else IDS[:30]
    expected = ["shard_unreadable", *sound] if name == FIRST else [*sound, "shard_unreadable"]
    assert ids(all_rows(reader)) == expected
    assert reader.num_rows() == len(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: {**row, "score": 1},
        lambda row: {key: value for key, value in row.items() if key != "messages"},
        lambda row: {**row, "messages": row["messages"][0]["role"]},
        lambda row: {**row, "images": {"a": 1}},
    ],
    ids=["one more", "one less", "text", "another structure"],
)
def test_a_file_with_other_columns_than_the_first_is_refused_row_by_row(
    hub: Hub, files: dict[str, bytes], change: Any
) -> None:
    hub.add("owner/data", COMMIT, {**files, SECOND: parquet([change(row) for row in some_rows(30, 50)])})
    rows = list(all_rows(a_reader()))
    assert ids(iter(rows)) == [*IDS[:30], *["schema_drift"] * 20]


def test_a_file_that_lacks_a_column_nobody_needs_is_read(hub: Hub, files: dict[str, bytes]) -> None:
    first = parquet([{**row, "score": 1} for row in some_rows(0, 30)])
    hub.add("owner/data", COMMIT, {**files, FIRST: first})
    assert ids(all_rows(a_reader())) == IDS


# ------------------------------------------------------------------------------------------------ another process


def test_a_process_of_its_own_reads_the_same_with_nothing_but_HF_ENDPOINT(hub: Hub, tmp_path: Path) -> None:
    hub.faults += [Fault(503, times=1, file=".parquet"), Fault("cut", file=".parquet")]
    code = (
        "import sys, json\n"
        "from llava_pipeline.contracts import Cursor\n"
        "from llava_pipeline.data.sources import open_source\n"
        "from llava_pipeline.spec import HubSource\n"
        "reader = open_source(HubSource(repo_id='owner/data'), 'train', 5)\n"
        "print(json.dumps([reader.origin, [row['id'] for p in reader.pieces(Cursor()) for row in reader.rows(p)]]))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout or done.stderr) == [f"hub:owner/data@{COMMIT}/train", IDS]


def test_a_worker_that_opens_the_resolved_source_does_not_ask_for_the_branch(hub: Hub) -> None:
    source = a_reader(revision="main").source
    assert source == SOURCE
    hub.requests.clear()
    assert ids(all_rows(HubReader(source, "train", QUICK))) == IDS
    assert not [path for _, path in hub.requests if path.endswith("/main")]
