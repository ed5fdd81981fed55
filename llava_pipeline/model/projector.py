"""What a training leaves behind explains itself: 23 MB of projector and a manifest of all it depends on.

``projector.safetensors`` holds ``linear_1`` and ``linear_2`` as transformers names them; ``manifest.json`` names both
backbones with their digests, the feature layer, the template and the data. It refuses to load on anything else. The
artifact grows by what else was trained: ``adapter/`` holds a LoRA as peft reads it (some MB), and
``language_model.safetensors`` a language model that was trained whole.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers import LlavaForConditionalGeneration

from llava_pipeline.contracts import AssembledModel, FetchedBackbone
from llava_pipeline.errors import IncompatibleParts, WeightsMismatch
from llava_pipeline.model import adapter
from llava_pipeline.model.freeze import LANGUAGE_MODEL, full
from llava_pipeline.spec import TrainingSpec

WEIGHTS, MANIFEST = "projector.safetensors", "manifest.json"
ADAPTER, WHOLE = "adapter/adapter_model.safetensors", "language_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what peft puts before the name of every weight
VISION_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
LANGUAGE_FILES = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
State = dict[str, torch.Tensor]
# Weights that a model had before a language model that was trained whole took their place.
_OWN: WeakKeyDictionary[LlavaForConditionalGeneration, State] = WeakKeyDictionary()


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
    """Write what was trained, each part in its file; ``facts`` (steps, data digests, ...) go into the manifest."""
    parts = split(state)
    _write(folder / WEIGHTS, parts[""])
    if parts[adapter.PREFIX]:
        _write_adapter(folder / ADAPTER, parts[adapter.PREFIX])
    if parts[LANGUAGE_MODEL]:
        _write(folder / WHOLE, parts[LANGUAGE_MODEL])
    libraries = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    known = {"identity": identity(model), "names": names(model), "digest": digest_of(state), "versions": libraries}
    manifest = known | facts
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def split(state: State) -> dict[str, State]:
    """A state by what it holds: the projector under "", an adapter and a whole language model under their prefixes."""
    parts: dict[str, State] = {"": {}, adapter.PREFIX: {}, LANGUAGE_MODEL: {}}
    for name, tensor in state.items():
        parts[next((p for p in (adapter.PREFIX, LANGUAGE_MODEL) if name.startswith(p)), "")][name] = tensor
    return parts


def _write(path: Path, state: State) -> None:
    """Written by Python, for safetensors' own writer tells a full disk as no OSError."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(to_bytes(state, metadata={"format": "pt"}))


def _write_adapter(path: Path, state: State) -> None:
    """A LoRA as ``PeftModel.from_pretrained`` reads it beside a language model."""
    weights = {key: value for key, value in state.items() if key != adapter.SCALE}
    targets = sorted({name.split(".lora_")[0].removeprefix(adapter.PREFIX) for name in weights})
    rank = next(len(value) for name, value in weights.items() if name.endswith(".lora_A.weight"))
    _write(path, {PEFT_PREFIX + name.removeprefix(adapter.PREFIX): value for name, value in weights.items()})
    config = {
        "peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": rank, "target_modules": targets, "bias": "none",
        "lora_alpha": float(state[adapter.SCALE]) * rank, "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    path.with_name("adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path) -> State:
    """All that was trained, under its names in a state."""
    state: State = load_file(folder / WEIGHTS)
    if (folder / ADAPTER).exists():
        config = json.loads((folder / ADAPTER).with_name("adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / ADAPTER)
        state |= {adapter.PREFIX + name.removeprefix(PEFT_PREFIX): value for name, value in weights.items()}
        state[adapter.SCALE] = torch.tensor(config["lora_alpha"] / config["r"])
    if (folder / WHOLE).exists():
        state |= load_file(folder / WHOLE)
    return state


def load(folder: Path, model: AssembledModel, *, spoken_otherwise: bool = False) -> State:
    """The weights, after checking that they belong to this model and are what was saved.

    A training may go on from a projector that was ``spoken_otherwise``, in another chat template.

    Raises:
        IncompatibleParts: trained with other parts; the first difference is named.
        WeightsMismatch: damaged or not finite.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, found_names = dict(manifest["identity"]), dict(manifest.get("names", {}))
        digest = str(manifest["digest"])
        state = _read(folder)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsMismatch(f"the projector in {folder.name} cannot be read ({type(error).__name__})") from error
    if spoken_otherwise:
        found["chat_template"] = identity(model)["chat_template"]
    if difference := _first_difference(found, found_names, model):
        raise IncompatibleParts(f"this projector was trained with {difference}; choose the profile it was trained with")
    if digest_of(state) != digest:
        raise WeightsMismatch("the projector's weights differ from its manifest; fetch it again")
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise WeightsMismatch("the projector holds numbers that are not finite; train it again")
    return state


def put(model: LlavaForConditionalGeneration, state: State) -> None:
    """Make the model what was trained: its projector copied, strictly, an adapter put beside the language model or
    taken away, and a whole language model put in place of the backbone's."""
    parts = _put_small(model, state)
    put_whole(model, parts[LANGUAGE_MODEL])


def _put_small(model: LlavaForConditionalGeneration, state: State) -> dict[str, State]:
    """Projector and adapter in their places; the state by its parts."""
    parts = split(state)
    model.model.multi_modal_projector.load_state_dict(parts[""], strict=True)
    adapter.put(model.model.language_model, parts[adapter.PREFIX])
    return parts


def begin_with(model: LlavaForConditionalGeneration, state: State, spec: TrainingSpec) -> None:
    """Put what an earlier training has left in place, for one that goes on from it.

    Raises:
        IncompatibleParts: this one would leave a part of it behind, because that does not learn any more.
        WeightsMismatch: it does not fit.
    """
    refuse_dropped(state, spec)
    parts = _put_small(model, state)
    if parts[LANGUAGE_MODEL]:  # for good: what it had before is not kept
        copy_whole(model, parts[LANGUAGE_MODEL])


def refuse_dropped(state: State, spec: TrainingSpec) -> None:
    """What learned besides the projector goes on learning in the same way, or it would be lost on the way.

    Raises:
        IncompatibleParts: it does not.
    """
    parts, mode = split(state), spec.language_mode
    had = "lora" if parts[adapter.PREFIX] else "full" if parts[LANGUAGE_MODEL] else None
    if had is not None and mode != had:
        raise IncompatibleParts(
            f"it begins with a language model trained in mode {had}, which training.language_model.mode={mode} would "
            f"leave behind; set the mode to {had}, or begin with a version of stage align"
        )


def put_whole(model: LlavaForConditionalGeneration, state: State) -> None:
    """A language model that was trained whole in place of the backbone's own, which are put back where there is none.

    Raises:
        WeightsMismatch: it is not this language model's.
    """
    own = _OWN.get(model)
    if not state and own is None:
        return
    into = full(model)
    if own is None:
        own = _OWN[model] = {name: value.detach().to("cpu", copy=True) for name, value in into.items()}
    copy_whole(model, state or own)


def copy_whole(model: LlavaForConditionalGeneration, state: State) -> None:
    """Copy all weights of a language model, and of its head where that is not tied.

    Raises:
        WeightsMismatch: they are another model's.
    """
    into = full(model)
    if state.keys() != into.keys() or any(state[name].shape != value.shape for name, value in into.items()):
        raise WeightsMismatch("the trained language model has other weights than this one; train it again")
    with torch.no_grad():
        for name, value in into.items():
            value.copy_(state[name])
