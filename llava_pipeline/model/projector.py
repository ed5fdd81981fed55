"""The projector artifact explains itself: 23 MB of weights and a manifest of all they depend on.

``projector.safetensors`` holds ``linear_1`` and ``linear_2`` as transformers names them; ``manifest.json`` names both
backbones with their digests, the feature layer, the template and the data. It refuses to load on anything else.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers import LlavaForConditionalGeneration

from llava_pipeline.contracts import AssembledModel, FetchedBackbone
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch

WEIGHTS, MANIFEST = "projector.safetensors", "manifest.json"
VISION_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
LANGUAGE_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
State = dict[str, torch.Tensor]


def identity(model: AssembledModel) -> dict[str, Any]:
    """What a projector depends on: equal identities can exchange projectors, wherever their parts came from."""
    return {
        "vision_tower": _digests(model.backbones.vision_tower, VISION_FILES),
        "language_model": _digests(model.backbones.language_model, LANGUAGE_FILES),
        "vision_feature_layer": model.spec.vision_feature_layer,
        "vision_feature_select_strategy": model.spec.vision_feature_select_strategy,
        "chat_template": {"text": model.chat_template_digest},
        "num_image_tokens": model.num_image_tokens,
        "frozen_digest": model.frozen_digest,
        **model.spec.model_dump(include={"image_size", "pixel_shuffle"}, exclude_defaults=True),
    }


def _digests(part: FetchedBackbone, files: tuple[str, ...]) -> dict[str, str]:
    """sha256 of the weights, whatever their file is called, and of those files that the part has."""
    return {"weights": part.sha256[part.weights]} | {name: part.sha256[name] for name in files if name in part.sha256}


def names(model: AssembledModel) -> dict[str, str]:
    """How people call what the identity has by digest only."""
    return {
        "vision_tower": model.backbones.vision_tower.origin,
        "language_model": model.backbones.language_model.origin,
        "chat_template": model.spec.chat_template,
    }


def _first_difference(theirs: dict[str, Any], their_names: dict[str, Any], model: AssembledModel) -> str:
    """What a projector's identity has and the model has not, in words; empty where they are equal."""
    our_names = names(model)
    ours = identity(model)
    for key in ours | theirs:
        wanted, found = ours.get(key), theirs.get(key)
        if found == wanted:
            continue
        told = f"{key} = {their_names.get(key, found)}, the model has {our_names.get(key, wanted)}"
        if isinstance(found, dict) and isinstance(wanted, dict):
            other = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
            told += f" (different: {', '.join(other)})"
        return told
    return ""


def state_of(model: LlavaForConditionalGeneration) -> State:
    """A copy of the projector's weights, float32 on the CPU."""
    state = model.model.multi_modal_projector.state_dict()
    return {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in state.items()}


def digest_of(state: State) -> str:
    """sha256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, state: State, model: AssembledModel, facts: dict[str, Any]) -> None:
    """Write both files; ``facts`` (steps, data digests, ...) go into the manifest."""
    # Written by Python, for safetensors' own writer tells a full disk as no OSError.
    (folder / WEIGHTS).write_bytes(to_bytes(state, metadata={"format": "pt"}))
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    known = {"identity": identity(model), "names": names(model), "digest": digest_of(state), "versions": libraries}
    manifest = known | facts
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(folder: Path, model: AssembledModel) -> State:
    """The weights, after checking that they belong to this model and are what was saved.

    Raises:
        IncompatibleParts: trained with other parts; the first difference is named.
        WeightsMismatch: damaged or not finite.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, found_names = dict(manifest["identity"]), dict(manifest.get("names", {}))
        digest = str(manifest["digest"])
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsMismatch(f"the projector in {folder.name} cannot be read ({type(error).__name__})") from error
    if difference := _first_difference(found, found_names, model):
        raise IncompatibleParts(f"this projector was trained with {difference}; choose the profile it was trained with")
    if digest_of(state) != digest:
        raise WeightsMismatch("the projector's weights differ from its manifest; fetch it again")
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise WeightsMismatch("the projector holds numbers that are not finite; train it again")
    return state


def put(model: LlavaForConditionalGeneration, state: State) -> None:
    """Copy weights into the model's projector, strictly."""
    model.model.multi_modal_projector.load_state_dict(state, strict=True)
