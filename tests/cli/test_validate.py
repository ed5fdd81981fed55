"""``llava-pipeline validate``: totals that reconcile, the same digest each time, a report, and a clear verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.data import scenes
from tests.cli.conftest import Command

TINY = ("--profile", "tiny")


def reconciles(document: Any) -> bool:
    return all(
        document[split]["num_read"] == document[split]["num_kept"] + sum(document[split]["rejected"].values())
        for split in ("train", "held_out")
    )


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """Forty rows: one picture is missing, one truncated, one answer empty, one question without its image token."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(40):
        scenes.draw(scenes.scene_at(1, "train", number)[0]).save(tmp_path / "images" / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"picture {number}"}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (tmp_path / "images" / "3.jpg").unlink()
    truncated = tmp_path / "images" / "4.jpg"
    truncated.write_bytes(truncated.read_bytes()[:900])
    rows[5]["conversations"][1]["value"] = " "  # type: ignore[index]
    rows[6]["conversations"][0]["value"] = "What is it?"  # type: ignore[index]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


BROKEN = {"image_missing": 1, "image_unreadable": 1, "empty_turn": 1, "image_count_mismatch": 1}


def test_scenes_twice_and_with_two_workers_have_one_digest(command: Command) -> None:
    found = []
    for workers in ("1", "1", "2"):
        ended = command("validate", "scenes", "--limit", "40", "--workers", workers, *TINY, "--json")
        assert ended.exit_code == 0, ended.err
        assert reconciles(ended.document)
        found.append((ended.document["train"]["rows"]["digest"], ended.document["held_out"]["rows"]["digest"]))
    assert len(set(found)) == 1


def test_a_llava_file_is_accounted_for_row_by_row(command: Command, llava: Path) -> None:
    asked = ("validate", str(llava), "--images", str(llava.parent / "images"), *TINY, "--json")
    ended = command(*asked, "--set", "data.max_rejected_share=0.2")
    assert ended.exit_code == 0, ended.err
    document = ended.document
    assert reconciles(document)
    assert document["train"]["rejected"] == BROKEN
    assert document["train"]["num_read"] + document["held_out"]["num_read"] == 40
    assert document["train"]["num_left"] == 0
    assert "image_missing" in Path(document["report"]).read_text(encoding="utf-8").replace("<wbr>", "")


def test_too_many_refusals_fail_the_command_but_not_the_report(command: Command, llava: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    images = ("--images", str(llava.parent / "images"))
    ended = command("validate", str(llava), *images, *TINY, "--report", str(page))
    assert ended.exit_code == 1
    assert "were refused 4 (" in ended.error
    assert "more than data.max_rejected_share=0.02" in ended.error
    assert "image_missing" in ended.out
    assert page.stat().st_size > 1000


def test_what_is_not_there_is_told_in_one_sentence(command: Command) -> None:
    ended = command("validate", "nowhere.json", *TINY)
    assert ended.exit_code == 2
    assert ended.error == (
        "there is no file or folder nowhere.json; give a path, owner/name of a hub data set, scenes or easy-vqa"
    )
