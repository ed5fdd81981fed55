"""A part whose files are damaged or of another kind is refused by its origin, in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones, FetchedBackbone
from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.model.assemble import assemble
from llava_pipeline.spec import FolderBackbone
from llava_pipeline.store import open_artifact
from tests.tiny import SPEC


def damaged(part: FetchedBackbone, path: Path, name: str, content: str | dict[str, Any]) -> FetchedBackbone:
    """The part with another content of one file; a mapping changes some of its values, None drops one."""
    shutil.copytree(open_artifact(part.files), path)
    if isinstance(content, dict):
        changed = json.loads((path / name).read_text()) | content
        content = json.dumps({key: value for key, value in changed.items() if value is not None})
    (path / name).write_text(content)
    return fetch(FolderBackbone(path=str(path)), None, 0)


@pytest.mark.parametrize(
    ("which", "name", "content"),
    [
        ("vision_tower", "config.json", "{"),
        ("vision_tower", "config.json", {"hidden_size": "large"}),
        ("vision_tower", "config.json", {"patch_size": 0}),
        ("vision_tower", "config.json", {"num_attention_heads": 7}),
        ("vision_tower", "preprocessor_config.json", "{"),
        ("vision_tower", "preprocessor_config.json", "[]"),
        ("vision_tower", "preprocessor_config.json", {"image_mean": None}),
        ("vision_tower", "preprocessor_config.json", {"image_mean": [0.5, 0.5]}),
        ("vision_tower", "preprocessor_config.json", {"image_mean": ["a", "b", "c"]}),
        ("vision_tower", "preprocessor_config.json", {"image_std": [0.5, 0.0, 0.5]}),
        ("language_model", "config.json", {"num_hidden_layers": "two"}),
        ("language_model", "tokenizer.json", "{}"),
        ("language_model", "tokenizer_config.json", "{"),
    ],
)
def test_a_damaged_file_is_told_with_its_part(
    backbones: Backbones, tmp_path: Path, which: str, name: str, content: str | dict[str, Any]
) -> None:
    part = damaged(getattr(backbones, which), tmp_path / "mine", name, content)
    with pytest.raises(IncompatibleParts, match=r"folder:mine .*put the model's .* beside its weights") as caught:
        assemble(backbones.model_copy(update={which: part}), SPEC.model)
    told = str(caught.value)
    assert "\n" not in told
    assert part.files.digest not in told


def test_a_gguf_is_no_vision_tower(backbones: Backbones, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    part = fetch(FolderBackbone(path=str(tmp_path), weights="model.gguf"), None, 0)
    with pytest.raises(IncompatibleParts, match=r"not read from a GGUF file such as model\.gguf; name its"):
        assemble(backbones.model_copy(update={"vision_tower": part}), SPEC.model)
