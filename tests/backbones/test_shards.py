"""Large models come in several files, which an index names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava_pipeline import store
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.backbones.weights import read_state_dict
from llava_pipeline.errors import NotFound, WeightsMismatch
from llava_pipeline.spec import FolderBackbone, HubBackbone
from tests.backbones.conftest import REVISION, repository_files
from tests.backbones.hub import Hub

INDEX = "model.safetensors.index.json"
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, missing: bool = False, **index: object) -> Path:
    """A folder with two weights in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    for number, name in enumerate(FILES[: 1 if missing else 2]):
        save_file({f"w{number}": torch.full((2,), float(number))}, folder / name)
    names = {f"w{number}": name for number, name in enumerate(FILES)}
    (folder / INDEX).write_text(json.dumps(index or {"weight_map": names}))
    return folder


def test_the_weights_of_all_files_are_read(tmp_path: Path) -> None:
    fetched = fetch(FolderBackbone(path=str(sharded(tmp_path / "large")), weights=INDEX), None, 0)
    assert set(fetched.sha256) == {"config.json", INDEX, *FILES}
    state = read_state_dict(store.open_artifact(fetched.files) / fetched.weights)
    assert {name: weight.tolist() for name, weight in state.items()} == {"w0": [0.0, 0.0], "w1": [1.0, 1.0]}


def test_the_files_of_an_index_are_downloaded_with_it(hub: Hub, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "large")
    files = repository_files() | {name: (folder / name).read_bytes() for name in (INDEX, *FILES)}
    hub.add("owner/large", REVISION, files)
    fetched = fetch(HubBackbone(repo_id="owner/large", revision=REVISION, weights=INDEX), None, 0)
    assert {INDEX, *FILES} <= set(fetched.sha256)
    assert "model.safetensors" not in hub.downloads()


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "large", missing=True)
    with pytest.raises(NotFound, match=f"has no {FILES[1]}, which its {INDEX} names; put it there"):
        fetch(FolderBackbone(path=str(folder), weights=INDEX), None, 0)


@pytest.mark.parametrize("index", [{"other": 1}, {"weight_map": {"w0": "../elsewhere.safetensors"}}])
def test_an_index_that_is_none_is_told(tmp_path: Path, index: dict[str, object]) -> None:
    folder = sharded(tmp_path / "large", **index)
    with pytest.raises(WeightsMismatch, match="fetch it anew"):
        fetch(FolderBackbone(path=str(folder), weights=INDEX), None, 0)
