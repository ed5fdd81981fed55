"""A projector comes back as it was saved, to the model it was trained in, and to no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import frozen_digest

FACTS = {"num_steps": 350, "train_digest": "d" * 64}


@pytest.fixture
def saved(tmp_path: Path, llava: Llava, assembled: AssembledModel) -> Path:
    """A saved projector that is not the fresh one."""
    with torch.no_grad():
        for k, parameter in enumerate(llava.model.model.multi_modal_projector.parameters()):
            parameter.add_(0.25 * (k + 1))
    projector.save(tmp_path, projector.state_of(llava.model), assembled, FACTS)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / projector.MANIFEST).read_text())
    change(content)
    (folder / projector.MANIFEST).write_text(json.dumps(content))


def test_it_comes_back_as_it_was_saved(saved: Path, llava: Llava, shared: Llava, assembled: AssembledModel) -> None:
    state = projector.load(saved, assembled)
    trained = llava.model.model.multi_modal_projector.state_dict()
    assert state.keys() == trained.keys() == {f"linear_{k}.{name}" for k in (1, 2) for name in ("weight", "bias")}
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
    fresh = shared.model.model.multi_modal_projector.state_dict()
    assert not any(torch.equal(state[name], tensor) for name, tensor in fresh.items())


def test_it_is_put_into_a_model_and_changes_nothing_else(saved: Path, llava: Llava, assembled: AssembledModel) -> None:
    with torch.no_grad():
        llava.model.model.multi_modal_projector.linear_1.weight.zero_()
    projector.put(llava.model, projector.load(saved, assembled))
    assert projector.digest_of(projector.state_of(llava.model)) == projector.digest_of(projector.load(saved, assembled))
    assert frozen_digest(llava.model) == assembled.frozen_digest


def test_a_state_is_a_copy_in_full_precision(llava: Llava) -> None:
    llava.model.model.multi_modal_projector.to(torch.bfloat16)
    state = projector.state_of(llava.model)
    digest = projector.digest_of(state)
    with torch.no_grad():
        for parameter in llava.model.model.multi_modal_projector.parameters():
            parameter.zero_()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert projector.digest_of(state) == digest


def test_the_manifest_names_all_it_depends_on(saved: Path, assembled: AssembledModel) -> None:
    manifest = json.loads((saved / projector.MANIFEST).read_text())
    parts = assembled.backbones
    assert manifest["identity"] == {
        "vision_tower": {"origin": parts.vision_tower.origin, "sha256": parts.vision_tower.sha256["model.safetensors"]},
        "language_model": {
            "origin": parts.language_model.origin,
            "sha256": parts.language_model.sha256["model.safetensors"],
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "chat_template": "native",
        "num_image_tokens": assembled.num_image_tokens,
        "frozen_digest": assembled.frozen_digest,
    }
    assert manifest.keys() == {"identity", "digest", "versions", *FACTS}
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda m: {"spec": m.spec.model_copy(update={"chat_template": "llava"})}, "chat_template"),
        (lambda m: {"spec": m.spec.model_copy(update={"vision_feature_layer": -1})}, "vision_feature_layer"),
        (lambda m: {"frozen_digest": "0" * 64}, "frozen_digest"),
        (lambda m: {"num_image_tokens": 49, "frozen_digest": "0" * 64}, "num_image_tokens"),
        (
            lambda m: {"backbones": m.backbones.model_copy(update={"language_model": m.backbones.vision_tower})},
            "language_model",
        ),
    ],
)
def test_another_model_is_refused_with_the_first_difference(
    saved: Path, assembled: AssembledModel, change: Callable[[AssembledModel], dict[str, Any]], first: str
) -> None:
    other = assembled.model_copy(update=change(assembled))
    found, wanted = (projector.identity(model)[first] for model in (assembled, other))
    with pytest.raises(IncompatibleParts) as error:
        projector.load(saved, other)
    assert f"trained with {first} = {found}, the model has {wanted}; choose the profile" in str(error.value)


@pytest.mark.parametrize("name", [projector.WEIGHTS, projector.MANIFEST])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_file_is_told(saved: Path, assembled: AssembledModel, name: str, share: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsMismatch, match="cannot be read"):
        projector.load(saved, assembled)


@pytest.mark.parametrize("name", [projector.WEIGHTS, projector.MANIFEST])
def test_a_missing_file_is_told(saved: Path, assembled: AssembledModel, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(WeightsMismatch, match="cannot be read"):
        projector.load(saved, assembled)


@pytest.mark.parametrize("content", ["{}", "[]", '"text"', '{"identity": 7, "digest": ""}', '{"identity": {}}'])
def test_a_manifest_that_says_nothing_is_told(saved: Path, assembled: AssembledModel, content: str) -> None:
    (saved / projector.MANIFEST).write_text(content)
    with pytest.raises(WeightsMismatch, match="cannot be read"):
        projector.load(saved, assembled)


@pytest.mark.parametrize("lost", [True, False])
def test_other_weights_than_the_manifest_says_are_told(saved: Path, assembled: AssembledModel, lost: bool) -> None:
    state = load_file(saved / projector.WEIGHTS)
    if lost:
        del state["linear_2.bias"]
    else:
        state["linear_2.bias"][0] += 1e-3
    save_file(state, saved / projector.WEIGHTS)
    with pytest.raises(WeightsMismatch, match="differ from its manifest; fetch it again"):
        projector.load(saved, assembled)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_told(
    tmp_path: Path, llava: Llava, assembled: AssembledModel, value: float
) -> None:
    state = projector.state_of(llava.model)
    state["linear_1.weight"][3, 3] = value
    projector.save(tmp_path, state, assembled, {})
    with pytest.raises(WeightsMismatch, match="not finite; train it again"):
        projector.load(tmp_path, assembled)


def test_extra_facts_in_a_manifest_do_no_harm(saved: Path, assembled: AssembledModel) -> None:
    rewrite(saved, lambda content: content.update({"note": "from a later version"}))
    assert projector.load(saved, assembled)
