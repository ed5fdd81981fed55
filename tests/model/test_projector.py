"""A projector comes back as it was saved, to the model it was trained in, and to no other."""

from __future__ import annotations

import hashlib
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
from tests.tiny import SPEC

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


def test_the_manifest_names_all_it_depends_on(saved: Path, assembled: AssembledModel, shared: Llava) -> None:
    manifest = json.loads((saved / projector.MANIFEST).read_text())
    parts = assembled.backbones
    tower, language = parts.vision_tower.sha256, parts.language_model.sha256
    assert manifest["identity"] == {
        "vision_tower": {
            "weights": tower["model.safetensors"],
            "config.json": tower["config.json"],
            "preprocessor_config.json": tower["preprocessor_config.json"],
        },
        "language_model": {
            "weights": language["model.safetensors"],
            "config.json": language["config.json"],
            "tokenizer.json": language["tokenizer.json"],
            "tokenizer_config.json": language["tokenizer_config.json"],
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "chat_template": {"text": hashlib.sha256(shared.processor.template.encode()).hexdigest()},
        "num_image_tokens": assembled.num_image_tokens,
        "frozen_digest": assembled.frozen_digest,
    }
    assert manifest["names"] == {
        "vision_tower": "random:pocket/vision_tower#0",
        "language_model": "random:pocket/language_model#0",
        "chat_template": "native",
    }
    assert manifest.keys() == {"identity", "names", "digest", "versions", *FACTS}
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert manifest["versions"]["torch"] == torch.__version__


def with_part(model: AssembledModel, which: str, origin: str, changed: str | None = None) -> AssembledModel:
    """The model with a part from elsewhere, one file of it changed."""
    part = getattr(model.backbones, which)
    digests = part.sha256 | ({changed: "0" * 64} if changed else {})
    other = part.model_copy(update={"origin": origin, "sha256": digests})
    return model.model_copy(update={"backbones": model.backbones.model_copy(update={which: other})})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_image_tokens": 49, "frozen_digest": "0" * 64}, "num_image_tokens = 4, the model has 49;"),
        ({"spec": SPEC.model.model_copy(update={"vision_feature_layer": -1})}, "layer = -2, the model has -1;"),
        (
            {"spec": SPEC.model.model_copy(update={"chat_template": "llava"}), "chat_template_digest": "0" * 64},
            "chat_template = native, the model has llava (different: text);",
        ),
        ({"chat_template_digest": "0" * 64}, "chat_template = native, the model has native (different: text);"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(
    saved: Path, assembled: AssembledModel, change: dict[str, Any], told: str
) -> None:
    with pytest.raises(IncompatibleParts) as error:
        projector.load(saved, assembled.model_copy(update=change))
    assert str(error.value).startswith("this projector was trained with ")
    assert f"{told} choose the profile it was trained with" in str(error.value)


def test_other_frozen_weights_are_refused(saved: Path, assembled: AssembledModel) -> None:
    with pytest.raises(IncompatibleParts, match=f"frozen_digest = {assembled.frozen_digest}, the model has 0000"):
        projector.load(saved, assembled.model_copy(update={"frozen_digest": "0" * 64}))


@pytest.mark.parametrize(
    ("which", "changed", "called"),
    [
        ("vision_tower", "model.safetensors", "weights"),
        ("vision_tower", "config.json", "config.json"),
        ("vision_tower", "preprocessor_config.json", "preprocessor_config.json"),
        ("language_model", "model.safetensors", "weights"),
        ("language_model", "config.json", "config.json"),
        ("language_model", "tokenizer.json", "tokenizer.json"),
        ("language_model", "tokenizer.model", "tokenizer.model"),
    ],
)
def test_a_part_with_one_other_file_is_refused_by_its_name(
    saved: Path, assembled: AssembledModel, which: str, changed: str, called: str
) -> None:
    with pytest.raises(IncompatibleParts) as error:
        projector.load(saved, with_part(assembled, which, "folder:mine", changed))
    told = f"{which} = random:pocket/{which}#0, the model has folder:mine (different: {called}); choose the profile"
    assert told in str(error.value)


@pytest.mark.parametrize("changed", [None, "generation_config.json"])
def test_the_same_files_from_elsewhere_are_the_same_part(
    saved: Path, assembled: AssembledModel, changed: str | None
) -> None:
    assert projector.load(saved, with_part(assembled, "language_model", "folder:mine", changed))


def test_a_projector_from_before_the_names_is_refused_not_damaged(saved: Path, assembled: AssembledModel) -> None:
    def age(content: dict[str, Any]) -> None:
        del content["names"]
        content["identity"]["vision_tower"] = {"origin": "embedded:pocket/vision_tower", "sha256": "0" * 64}

    rewrite(saved, age)
    with pytest.raises(IncompatibleParts, match=r"vision_tower = .*embedded:pocket/vision_tower"):
        projector.load(saved, assembled)


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
