"""Pieces are read in order, whoever checks them: same digest, goes on behind what is done, loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.contracts import AssembledModel, CheckedPiece, Cursor, Piece, ValidatedData
from llava_pipeline.data import parts
from llava_pipeline.data.snapshot import open_rows
from llava_pipeline.data.sources import open_source
from llava_pipeline.data.sources.reader import PIECE_ROWS
from llava_pipeline.errors import NothingToLearn, SourceUnavailable, SpecError, WorkerDied
from llava_pipeline.spec import DataSpec, FolderSource, ScenesSource, Split, WorkersSpec, load_spec
from llava_pipeline.stages import validate as stage
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.validate import Done, check_piece, planned

SCENES = ScenesSource(seed=5)


@pytest.fixture(scope="session")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AssembledModel]:
    """The tiny profile's model, and the home that holds it."""
    home = tmp_path_factory.mktemp("assembled")
    spec = load_spec("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(home))
        return home, assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)


@pytest.fixture
def model(assembled: tuple[Path, AssembledModel], home: Path) -> AssembledModel:
    """The same in this test's own home."""
    shutil.copytree(assembled[0], home)
    return assembled[1]


def a_spec(max_samples: int, **changes: Any) -> DataSpec:
    return DataSpec.model_validate({"source": SCENES, "max_samples": max_samples, "max_tokens": 256} | changes)


def validate_stream(model: AssembledModel, spec: DataSpec, num_held_out: int, submit: Any = None) -> ValidatedData:
    """From the beginning."""
    return stage.validate_stream(model, spec, num_held_out, lambda *_: Cursor(), submit)


def digests(data: ValidatedData) -> tuple[str, str]:
    return data.train.rows.digest, data.held_out.rows.digest


# --------------------------------------------------------------------------------------------- who checks


@pytest.mark.parametrize("workers", [{"num": 3}, {"kind": "processes", "num": 2}], ids=str)
def test_the_digest_does_not_depend_on_who_checks(workers: dict[str, Any], model: AssembledModel) -> None:
    alone = validate_stream(model, a_spec(PIECE_ROWS + 100), 30)
    shared = validate_stream(model, a_spec(PIECE_ROWS + 100, workers=workers), 30)
    assert digests(shared) == digests(alone)
    assert alone.train.num_kept == PIECE_ROWS + 100


def test_a_cluster_is_for_the_flow(model: AssembledModel) -> None:
    with pytest.raises(SpecError, match=r"data\.workers\.kind=dask works in the flow only; use processes here"):
        validate_stream(model, a_spec(10, workers={"kind": "dask"}), 5)


def test_results_are_taken_in_order_however_late_they_come(model: AssembledModel) -> None:
    """Every second piece is held back until the one behind it has been handed out."""
    handed_out: list[Piece] = []

    class Late:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def result(self) -> CheckedPiece:
            assert self.what[3].start == 0 or len(handed_out) > 1
            return check_piece(*self.what)

    def submit(model: AssembledModel, spec: DataSpec, split: Split, piece: Piece) -> Late:
        handed_out.append(piece)
        return Late(model, spec, split, piece)

    spec = a_spec(PIECE_ROWS + 60, workers={"num": 2})
    assert digests(validate_stream(model, spec, 20, submit)) == digests(validate_stream(model, spec, 20))


def test_no_more_is_checked_than_is_wanted(model: AssembledModel) -> None:
    checked: list[CheckedPiece] = []

    def submit(*what: Any) -> Done:
        checked.append(check_piece(*what))
        return Done(checked[-1])

    data = validate_stream(model, a_spec(PIECE_ROWS + 7, workers={"num": 4}), 9, submit)
    assert sum(one.num_read for one in checked) == PIECE_ROWS + 7 + 9 == data.train.num_read + data.held_out.num_read


def test_pieces_cover_every_row_once_from_any_place() -> None:
    reader = open_source(SCENES, "train")
    for start, wanted in ((0, 5), (0, PIECE_ROWS), (100, 1000), (PIECE_ROWS - 1, 3), (3, 5 * PIECE_ROWS + 1)):
        pieces = list(itertools.islice(planned(reader, Cursor(row=start), wanted), 12))
        rows = [row for piece in pieces for row in range(piece.start, piece.stop or 0)]
        assert rows == list(range(start, start + len(rows)))
        assert start + wanted in {piece.stop for piece in pieces}


# --------------------------------------------------------------------------------------------- going on


def fails_at(row: int) -> Any:
    """Checks pieces, until one holds this row."""
    seen: list[Piece] = []

    def submit(model: AssembledModel, spec: DataSpec, split: Split, piece: Piece) -> Done:
        if split == "train" and piece.start <= row < (piece.stop or 0):
            raise SourceUnavailable("the hub went away")
        seen.append(piece)
        return Done(check_piece(model, spec, split, piece))

    return submit, seen


def test_what_was_checked_before_the_source_went_away_is_not_checked_again(
    model: AssembledModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = a_spec(2 * PIECE_ROWS + 50)
    undisturbed = validate_stream(model, spec, 20)
    submit, _ = fails_at(2 * PIECE_ROWS)
    with pytest.raises(SourceUnavailable):
        validate_stream(model, spec, 20, submit)
    assert len(list((home / "parts").rglob("*-0*"))) == 3  # of the held-out rows, and two whole pieces
    examined = counted(monkeypatch)
    assert digests(validate_stream(model, spec, 20)) == digests(undisturbed)
    assert len(examined) == 50
    assert list((home / "parts").iterdir()) == []


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the rows that are examined from now on."""
    examined: list[str] = []
    original = parts.examine

    def examine(row: Any, *rest: Any) -> Any:
        examined.append(row["id"])
        return original(row, *rest)

    monkeypatch.setattr(parts, "examine", examine)
    return examined


def test_other_rules_do_not_reuse_what_was_checked(
    model: AssembledModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, _ = fails_at(PIECE_ROWS)
    with pytest.raises(SourceUnavailable):
        validate_stream(model, a_spec(PIECE_ROWS + 5), 20, submit)
    examined = counted(monkeypatch)
    validate_stream(model, a_spec(30, max_tokens=255), 20)
    assert len(examined) == 50


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_part_that_was_damaged_on_disk_is_made_anew(
    damage: str, model: AssembledModel, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "llava_pipeline")
    hurt: list[Path] = []

    def submit(*what: Any) -> Done:
        done = check_piece(*what)
        path = home / "parts" / done.part
        if what[2] == "train" and not hurt:
            hurt.append(path)
            content = path.read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes(changed if damage == "flipped" else content[:middle])
            if damage == "gone":
                path.unlink()
        return Done(done)

    spec = a_spec(300)
    data = validate_stream(model, spec, 20, submit)
    assert hurt
    assert "its rows are checked again" in caplog.text
    assert digests(data) == digests(validate_stream(model, spec, 20))


KILLED = """
    import os, sys
    from llava_pipeline.contracts import AssembledModel
    from llava_pipeline.spec import DataSpec
    from llava_pipeline.contracts import Cursor
    from llava_pipeline.stages.validate import validate_stream
    if __name__ == "__main__":
        model, spec = AssembledModel.model_validate_json(sys.argv[1]), DataSpec.model_validate_json(sys.argv[2])
        print("begun", flush=True)
        validate_stream(model, spec, 20, lambda *_: Cursor())
"""


def test_a_run_that_is_killed_leaves_whole_parts_and_the_next_one_goes_on(
    model: AssembledModel, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = a_spec(4 * PIECE_ROWS)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), model.model_dump_json(), spec.model_dump_json()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 120
    while len(list((home / "parts").rglob("000000-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list((home / "parts").rglob("000000-*"))) - 1  # one of them holds the held-out rows
    assert done >= 2
    examined = counted(monkeypatch)
    resumed = validate_stream(model, spec, 20)
    assert len(examined) == (4 - done) * PIECE_ROWS
    assert digests(resumed) == digests(validate_stream(model, spec, 20))


def test_a_worker_that_is_killed_is_told(model: AssembledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import Future
    from concurrent.futures.process import BrokenProcessPool

    def submit(*what: Any) -> Any:
        future: Future[CheckedPiece] = Future()
        future.set_exception(BrokenProcessPool("gone"))
        return future

    with pytest.raises(WorkerDied, match=r"scenes/5/test from row 0 on was killed, perhaps for its memory; run again"):
        validate_stream(model, a_spec(10), 5, submit)


# --------------------------------------------------------------------------------------------- increments


def test_night_after_night_every_row_is_taken_once_and_the_same_questions_are_held_out(model: AssembledModel) -> None:
    """``tests/tracking/test_reading.py`` asks MLflow for the place; here the test keeps it."""
    told: list[Cursor] = []
    ids: list[str] = []
    held_out = set()
    for wanted in (40, PIECE_ROWS + 30, 1, 25):
        data = stage.validate_stream(
            model, a_spec(wanted, increment=True), 15, lambda *_: told[-1] if told else Cursor()
        )
        assert data.train.began == (told[-1] if told else Cursor())
        ids += open_rows(data.train.rows).ids
        held_out.add(data.held_out.rows.digest)
        told.append(data.train.ended)
    assert ids == open_rows(validate_stream(model, a_spec(len(ids)), 15).train.rows).ids
    assert len(held_out) == 1


# --------------------------------------------------------------------------------------------- nothing held out


def test_a_source_too_small_to_hold_anything_out_is_told(model: AssembledModel, tmp_path: Path) -> None:
    from llava_pipeline.data import scenes

    for number in range(2):
        scenes.draw(scenes.scene_at(0, "train", number)[0]).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    spec = a_spec(10, source=FolderSource(path=str(tmp_path)), held_out_share=0.001)
    with pytest.raises(NothingToLearn, match=r"raise data\.held_out_share=0\.001, or give more pictures"):
        validate_stream(model, spec, 5)


def test_workers_are_not_part_of_what_a_snapshot_is(model: AssembledModel) -> None:
    data = validate_stream(model, a_spec(5, workers=WorkersSpec(num=2)), 5)
    assert "workers" not in json.dumps(data.model_dump(mode="json"))


def test_files_that_changed_after_a_run_was_stopped_are_checked_again(model: AssembledModel, tmp_path: Path) -> None:
    from llava_pipeline.data import scenes

    for number in range(30):
        scenes.draw(scenes.scene_at(0, "train", number)[0]).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    spec = a_spec(20, source=FolderSource(path=str(tmp_path)))

    def stopped(model: AssembledModel, spec: DataSpec, split: Split, piece: Piece) -> Done:
        if split == "train":
            raise SourceUnavailable("stopped")
        return Done(check_piece(model, spec, split, piece))

    with pytest.raises(SourceUnavailable):
        validate_stream(model, spec, 1, stopped)
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("a picture of shapes")
    data = validate_stream(model, spec, 1)
    assert {answer for answers in open_rows(data.train.rows).answers for answer in answers} == {"a picture of shapes"}
