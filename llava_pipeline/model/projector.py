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
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch

WEIGHTS, MANIFEST = "projector.safetensors", "manifest.json"
State = dict[str, torch.Tensor]


def identity(model: AssembledModel) -> dict[str, Any]:
    """What a projector depends on: equal identities can exchange projectors."""
    parts = {"vision_tower": model.backbones.vision_tower, "language_model": model.backbones.language_model}
    return {
        **{name: {"origin": p.origin, "sha256": p.sha256[p.weights]} for name, p in parts.items()},
        "vision_feature_layer": model.spec.vision_feature_layer,
        "vision_feature_select_strategy": model.spec.vision_feature_select_strategy,
        "chat_template": model.spec.chat_template,
        "num_image_tokens": model.num_image_tokens,
        "frozen_digest": model.frozen_digest,
    }


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
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    manifest = {"identity": identity(model), "digest": digest_of(state), "versions": libraries, **facts}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(folder: Path, model: AssembledModel) -> State:
    """The weights, after checking that they belong to this model and are what was saved.

    Raises:
        IncompatibleParts: trained with other parts; the first difference is named.
        WeightsMismatch: damaged or not finite.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, digest = dict(manifest["identity"]), str(manifest["digest"])
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsMismatch(f"the projector in {folder.name} cannot be read ({type(error).__name__})") from error
    wanted = identity(model)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise IncompatibleParts(
                f"this projector was trained with {key} = {found.get(key)}, the model has {value}; "
                "choose the profile it was trained with"
            )
    if digest_of(state) != digest:
        raise WeightsMismatch("the projector's weights differ from its manifest; fetch it again")
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise WeightsMismatch("the projector holds numbers that are not finite; train it again")
    return state


def put(model: LlavaForConditionalGeneration, state: State) -> None:
    """Copy weights into the model's projector, strictly."""
    model.model.multi_modal_projector.load_state_dict(state, strict=True)
