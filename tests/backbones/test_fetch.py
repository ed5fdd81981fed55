from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_pipeline import store
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.backbones.weights import read_state_dict
from llava_pipeline.errors import NotFound, SpecError
from llava_pipeline.spec import EmbeddedBackbone, FolderBackbone, HubBackbone, RandomBackbone
from tests.backbones.conftest import REVISION

HUB_PART = HubBackbone(repo_id="owner/name", revision=REVISION, sha256={"model.safetensors": "0" * 64})
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}


def a_folder(path: Path, *extra: str, weights: str = "model.safetensors") -> Path:
    path.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", weights, *extra):
        (path / name).write_text(f"{name} in {path.name}")
    return path


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """A folder of embedded parts."""
    for name, config in (("vision_tower", VISION), ("language_model", LANGUAGE)):
        folder = a_folder(tmp_path / "embedded" / "pocket" / name, "README.md", "preprocessor_config.json")
        (folder / "config.json").write_text(json.dumps(config))
    return tmp_path / "embedded"


def test_a_folder_is_copied_without_what_is_not_needed(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "mine", "README.md", "pytorch_model.bin")
    fetched = fetch(FolderBackbone(path=str(folder), license="MIT"), None, 0)
    assert set(fetched.sha256) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (fetched.origin, fetched.license) == ("folder:mine", "MIT")
    assert (folder / "model.safetensors").stat().st_nlink == 1


def test_the_only_other_weight_file_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = a_folder(tmp_path / "mine", weights="pytorch_model.bin")
    assert fetch(FolderBackbone(path=str(folder)), None, 0).weights == "pytorch_model.bin"
    assert "its only weight file pytorch_model.bin is taken" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json"], r"has no model\.safetensors.*\(none\); name the one"),
        (["config.json", "a.gguf", "b.gguf"], r"2 \(a\.gguf, b\.gguf\); name the one"),
        (["model.safetensors"], r"no config\.json; put the model's"),
    ],
)
def test_a_folder_that_is_no_part_is_told(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "mine").mkdir()
    for name in names:
        (tmp_path / "mine" / name).write_text("")
    with pytest.raises(NotFound, match=message):
        fetch(FolderBackbone(path=str(tmp_path / "mine")), None, 0)


def test_a_gguf_needs_no_configuration_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("weights")
    assert fetch(FolderBackbone(path=str(tmp_path), weights="model.gguf"), None, 0).weights == "model.gguf"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"there is no folder .*nowhere"):
        fetch(FolderBackbone(path=str(tmp_path / "nowhere")), None, 0)


@pytest.mark.parametrize(
    "place",
    ["owner/name", "name", f"models--owner--name/snapshots/{REVISION}", "models--owner--name/snapshots/another"],
)
def test_a_source_is_read_in_each_layout(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    a_folder(tmp_path / "source" / place)
    fetched = fetch(HUB_PART, str(tmp_path / "source"), 0)
    assert fetched.origin == "folder:owner/name"
    expected = store.sha256_of(tmp_path / "source" / place / "model.safetensors")
    assert fetched.sha256["model.safetensors"] == expected
    assert "model.safetensors of folder:owner/name is not the pinned file" in caplog.text


def test_the_pinned_snapshot_of_a_source_is_preferred(tmp_path: Path) -> None:
    snapshots = tmp_path / "models--owner--name" / "snapshots"
    a_folder(snapshots / "0another")
    pinned = a_folder(snapshots / REVISION)
    fetched = fetch(HUB_PART, str(tmp_path), 0)
    assert fetched.sha256["config.json"] == store.sha256_of(pinned / "config.json")


def test_a_source_without_the_part_names_the_places_looked_at(tmp_path: Path) -> None:
    snapshots = f"models--owner--name/snapshots/{REVISION}"
    with pytest.raises(NotFound, match=f"looked for owner/name, name, {snapshots}: put"):
        fetch(HUB_PART, str(tmp_path), 0)


def test_two_snapshots_without_the_pinned_one_are_not_guessed_from(tmp_path: Path) -> None:
    for name in ("one", "two"):
        a_folder(tmp_path / "models--owner--name" / "snapshots" / name)
    with pytest.raises(NotFound, match="looked for"):
        fetch(HUB_PART, str(tmp_path), 0)


def test_a_source_leaves_other_kinds_alone(tmp_path: Path, embedded: Path) -> None:
    fetched = fetch(EmbeddedBackbone(name="pocket/vision_tower"), str(tmp_path / "nowhere"), 0, embedded)
    assert fetched.origin == "embedded:pocket/vision_tower"


def test_an_embedded_part_is_unpacked(embedded: Path) -> None:
    fetched = fetch(EmbeddedBackbone(name="pocket/vision_tower"), None, 0, embedded)
    assert set(fetched.sha256) == {"config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"}
    assert fetched.weights == "model.safetensors"


def test_an_embedded_part_that_is_not_there_is_told(embedded: Path) -> None:
    with pytest.raises(SpecError, match="no part 'pocket/ears' is shipped"):
        fetch(EmbeddedBackbone(name="pocket/ears"), None, 0, embedded)


@pytest.mark.parametrize(
    ("like", "overrides", "name", "shape"),
    [
        ("vision_tower", {"hidden_size": 8}, "embeddings.patch_embedding.weight", (8, 3, 8, 8)),
        ("language_model", {"vocab_size": 40}, "model.embed_tokens.weight", (40, 16)),
    ],
)
def test_a_random_part_has_its_overrides_and_depends_on_its_seed_alone(
    embedded: Path, like: str, overrides: dict[str, int], name: str, shape: tuple[int, ...]
) -> None:
    import torch

    def part(seed: int) -> Any:
        spec = RandomBackbone(like=f"pocket/{like}", overrides=overrides, seed=seed)
        return fetch(spec, None, 0, embedded)

    before = torch.get_rng_state()
    first = part(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert part(1) == first
    assert part(2).sha256["model.safetensors"] != first.sha256["model.safetensors"]
    assert first.origin == f"random:pocket/{like}#1"

    folder = store.open_artifact(first.files)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in overrides} == overrides
    tensors = read_state_dict(folder / first.weights)
    found = next(tensor for key, tensor in tensors.items() if key.endswith(name))
    assert tuple(found.shape) == shape
    assert found.dtype == torch.float32


def test_an_override_the_configuration_does_not_have_is_told(embedded: Path) -> None:
    with pytest.raises(SpecError, match="CLIPVisionConfig has no hiden_size"):
        fetch(RandomBackbone(like="pocket/vision_tower", overrides={"hiden_size": 8}), None, 0, embedded)


def test_a_random_part_of_another_type_is_told(embedded: Path) -> None:
    (embedded / "pocket" / "vision_tower" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SpecError, match="cannot make a random 'bert'"):
        fetch(RandomBackbone(like="pocket/vision_tower"), None, 0, embedded)


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path / "mine")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copyfile", fail)
    with pytest.raises(KeyboardInterrupt):
        fetch(FolderBackbone(path=str(folder)), None, 0)
    assert list((home / "store" / "backbone").iterdir()) == []


def test_importing_loads_no_heavy_package() -> None:
    code = (
        "import sys, llava_pipeline.progress, llava_pipeline.backbones.fetch, llava_pipeline.backbones.weights\n"
        "print(*[name for name in ('torch', 'transformers', 'huggingface_hub', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
