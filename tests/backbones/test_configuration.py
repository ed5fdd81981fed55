"""A part's configuration and tokenizer come from its folder as data, or are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.backbones.configuration import read_config, read_tokenizer
from llava_pipeline.errors import IncompatibleParts
from tests.backbones.gguf import write_tiny_gguf

POCKET = Path(str(resources.files("llava_pipeline.backbones"))) / "pocket" / "language_model"
FOREIGN = {"AutoConfig": "foreign.Config", "AutoTokenizer": ["foreign.Tokenizer", "foreign.Tokenizer"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pocket language model without its weights, beside code that does harm when it is run or agreed to."""

    def asked(*_: object) -> str:
        (tmp_path / "asked").touch()
        return "y"

    monkeypatch.setattr("builtins.input", asked)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "part").mkdir(exist_ok=True)
        shutil.copy(POCKET / name, tmp_path / "part")
    (tmp_path / "part" / "foreign.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w').close()\n")
    return tmp_path / "part"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(read: Any, folder: Path, weights: str = "model.safetensors") -> str:
    with pytest.raises(IncompatibleParts) as caught:
        read(folder, weights, "hub:owner/name")
    told = str(caught.value)
    assert told.startswith("hub:owner/name has no ")
    assert "beside its weights" in told
    assert "\n" not in told
    assert str(folder) not in told
    return told


def test_code_that_lies_in_a_folder_is_neither_run_nor_asked_about(folder: Path) -> None:
    change(folder / "config.json", auto_map=FOREIGN, model_type="foreign")
    change(folder / "tokenizer_config.json", auto_map=FOREIGN, tokenizer_class="Foreign")
    for read in (read_config, read_tokenizer):
        assert "it asks to run code of its own, which is never done" in refusal(read, folder)
    assert [name for name in ("asked", "harm") if (folder.parent / name).exists()] == []


def test_a_model_transformers_knows_is_read_without_the_code_beside_it(folder: Path) -> None:
    change(folder / "config.json", auto_map=FOREIGN)
    assert read_config(folder, "model.safetensors", "hub:owner/name").model_type == "llama"
    assert [name for name in ("asked", "harm") if (folder.parent / name).exists()] == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b"GGUF", b'{"model_type": "nosuch"}'])
def test_a_damaged_configuration_is_told(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "has no config.json that can be used" in refusal(read_config, folder)


@pytest.mark.parametrize("values", [{"hidden_size": "large"}, {"num_hidden_layers": None}, {"rope_parameters": 7}])
def test_a_configuration_with_values_of_another_type_is_told(folder: Path, values: dict[str, Any]) -> None:
    change(folder / "config.json", **values)
    refusal(read_config, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"GGUF"])
def test_a_damaged_tokenizer_is_told(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    assert "has no tokenizer.json that can be used" in refusal(read_tokenizer, folder)


def test_a_tokenizer_without_its_parts_is_told(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "KeyError: 'added_tokens'" in refusal(read_tokenizer, folder)


def test_a_folder_without_the_files_is_told_and_no_hub_is_asked(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))
    for read in (read_config, read_tokenizer):
        refusal(read, tmp_path)


def test_a_gguf_holds_both(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert read_config(tmp_path, "tiny.gguf", "folder:x").hidden_size == 8
    assert len(read_tokenizer(tmp_path, "tiny.gguf", "folder:x")) == 260


def test_a_damaged_gguf_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and nothing more")
    for read in (read_config, read_tokenizer):
        assert "has no tiny.gguf that can be used" in refusal(read, tmp_path, "tiny.gguf")
