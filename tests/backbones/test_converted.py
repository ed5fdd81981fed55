"""A GGUF is read by transformers once, and from plain files after that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pipeline import store
from llava_pipeline.backbones import converted, weights
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import FetchedBackbone
from llava_pipeline.errors import DiskFull
from llava_pipeline.model.assemble import load_language_model
from llava_pipeline.spec import FolderBackbone
from tests.backbones.test_weights import write_tiny_gguf


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FetchedBackbone:
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    (tmp_path / "parts").mkdir()
    write_tiny_gguf(tmp_path / "parts" / "tiny.gguf")
    return fetch(FolderBackbone(path=str(tmp_path / "parts"), weights="tiny.gguf"), None, 1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GGUF files that transformers was asked to read."""
    read, found = weights.read_gguf, []

    def counted(folder: Path, name: str) -> Any:
        found.append(name)
        return read(folder, name)

    monkeypatch.setattr(weights, "read_gguf", counted)
    return found


def conversion(part: FetchedBackbone) -> Path:
    return converted.plain(part)[0]


def test_a_gguf_is_read_once_and_is_the_same_model_from_plain_files(part: FetchedBackbone, reads: list[str]) -> None:
    config, tokenizer, tensors = weights.read_gguf(store.open_artifact(part.files), part.weights)
    del reads[:]
    for _ in range(2):
        found, same, state = load_language_model(part)
        assert reads == ["tiny.gguf"]
        left, right = (one.to_dict() | {"_name_or_path": ""} for one in (config, found))
        assert left == right
        assert same.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert same.special_tokens_map == tokenizer.special_tokens_map
        assert same.chat_template == tokenizer.chat_template
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_conversion_that_is_damaged_or_gone_is_made_anew(part: FetchedBackbone, reads: list[str]) -> None:
    folder = conversion(part)
    path, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    path.write_bytes(whole[:-100])
    store._verified.clear()
    assert conversion(part) == folder
    assert path.read_bytes() == whole
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert (conversion(part) / "model.safetensors").read_bytes() == whole
    (told,) = (store.home() / "cache" / "gguf").iterdir()
    told.write_text("half a ref")
    assert (conversion(part) / "model.safetensors").read_bytes() == whole
    assert len(reads) == 4


def test_a_large_gguf_is_not_written_a_second_time(
    part: FetchedBackbone, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converted, "LARGEST_BYTES", part.files.num_bytes - 1)
    assert converted.plain(part) == (store.open_artifact(part.files), "tiny.gguf")
    assert load_language_model(part)[2].keys() >= {"model.embed_tokens.weight"}
    assert not (store.home() / "cache").exists()


def test_another_version_of_its_reader_reads_it_again(
    part: FetchedBackbone, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion(part)
    monkeypatch.setattr(converted, "version", lambda name: "99.0")
    conversion(part)
    assert len(reads) == 2


def test_a_disk_without_room_for_the_plain_files_is_told(
    part: FetchedBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DiskFull):
        conversion(part)
    assert not list((store.home() / "store" / "backbone").glob(".writing-*"))
    assert not (store.home() / "cache").exists()
