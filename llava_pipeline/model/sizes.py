"""What is known of a run before anything is read: shapes, parameters and tokens, from configurations alone.

Parameters are counted on torch's meta device. How long conversations are is not in a configuration: it is a figure per
kind of source, measured or published, and named an estimate wherever it is told.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_pipeline.backbones.configuration import read_config, usable
from llava_pipeline.backbones.fetch import files_in, named_folder, source_folder
from llava_pipeline.backbones.layout import choose_weights
from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.model.families import check_context, num_image_tokens, vision_config_of
from llava_pipeline.model.freeze import count_parameters, freeze_backbones
from llava_pipeline.model.memory import Shape, adapter_parameters
from llava_pipeline.model.tower import empty_llava
from llava_pipeline.spec import (
    Backbone,
    EasyVqaSource,
    EmbeddedBackbone,
    FolderBackbone,
    FolderSource,
    HubBackbone,
    ModelSpec,
    RandomBackbone,
    RunSpec,
    ScenesSource,
    TrainingSpec,
    WheelBackbone,
)

WORDS = {ScenesSource: 10, EasyVqaSource: 8, FolderSource: 55}  # tokens of a question and its answer (measured)
OTHER_TEXT_TOKENS = 240  # of llava-instruct-mix-vsft, published; what a file holds is not known before it is read
CAPTION_TOKENS = 18  # of a caption of LLaVA-Pretrain, published: the template `plain` has nothing else
SUPERVISED: dict[type, int] = {ScenesSource: 17, EasyVqaSource: 40}  # of the text's tokens, measured
OTHER_SUPERVISED_SHARE = 0.7
SCENES_ROUNDS, PAIRED_SCENES_ROUNDS, EASY_VQA_ROUNDS = 4.5, 5.2, 10  # of a training conversation, measured


class Wrapping(NamedTuple):
    """Tokens that a chat template adds: to a conversation, to a round before its question and beside that, of which the
    last are after all that is predicted."""

    opening: int
    asked: int
    answered: int
    after: int


WRAPPING = {  # counted with the tokenizers of `pocket` (native) and `smol` (chatml); estimates of the others'
    "native": Wrapping(1, 1, 2, 1), "llava": Wrapping(35, 4, 6, 1), "vicuna": Wrapping(35, 4, 6, 1),
    "chatml": Wrapping(0, 3, 7, 2), "llama3": Wrapping(1, 4, 6, 1), "zephyr": Wrapping(1, 6, 10, 2),
}  # fmt: skip
LINE_BREAK = 1  # after a picture


@dataclass(frozen=True)
class Sizes:
    """What is known of a run before anything is read: shapes and counts.

    ``attended`` are the tokens of one sample, its picture's included; ``tokens`` what it adds to a step, in which
    ``samples_per_picture`` share a picture (1 where a step computes it for each of them).
    """

    shape: Shape
    image_tokens: int
    tokens: int
    attended: int
    longest: int
    supervised: int
    samples_per_picture: float
    trainable: dict[str, int]

    @property
    def text(self) -> Any:
        """Configuration of the language model."""
        return self.shape.text


def sizes_of(spec: RunSpec) -> Sizes:
    """Shapes and counts of a spec, from its configurations.

    Raises:
        IncompatibleParts, NotFound: as for ``plan``.
    """
    vision, text = config_of(spec.backbones.vision_tower, spec), config_of(spec.backbones.language_model, spec)
    vision = vision_config_of(vision)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise IncompatibleParts(f"the language model is a {text.model_type}, which does not write; choose another one")
    with usable("vision tower or language model", "config.json"):
        image_tokens = num_image_tokens(vision, spec.model)
        check_context(text, image_tokens)
        counts = count_on_meta(vision, text, spec.model)
    source, training = type(spec.data.source), spec.training
    rounds = rounds_of(spec)
    samples_per_picture = mean_per_picture(rounds, training.samples_per_step) if shares_pictures(training) else 1.0
    text_tokens, own = text_of_sample(spec, samples_per_picture)
    if (room := spec.data.max_tokens - image_tokens) <= 0:
        raise IncompatibleParts(
            f"data.max_tokens={spec.data.max_tokens} keeps no conversation: a picture alone takes {image_tokens} "
            "tokens; set it higher, or model.pixel_shuffle=2"
        )
    text_tokens, own = (max(1, min(count, room)) for count in (text_tokens, own))
    attended = image_tokens + math.ceil(text_tokens)
    learned = {
        "projector": counts["projector"] if training.projector.learns else 0,
        "adapter": adapter_parameters(text, training),
        "language model": counts["language model"] if training.language_mode == "full" else 0,
    }
    raw = image_tokens * spec.model.pixel_shuffle**2
    supervised = SUPERVISED.get(source, round(OTHER_SUPERVISED_SHARE * text_tokens))
    return Sizes(
        shape=Shape(text, vision, counts, raw),
        image_tokens=image_tokens,
        tokens=round(image_tokens / samples_per_picture + own),
        attended=attended,
        longest=attended if source in WORDS else spec.data.max_tokens,
        supervised=math.ceil(supervised / rounds),
        samples_per_picture=samples_per_picture,
        trainable={part: count for part, count in learned.items() if count or part == "projector"},
    )


def mean_per_picture(rounds: float, in_step: int) -> float:
    """Mean samples of a step for each of its pictures, if a picture has so many ``rounds``, each a sample: a step of so
    many begins and ends anywhere in a picture, so that its first and last one have some of theirs in another step."""
    return in_step / (1 + (in_step - 1) / rounds)


def text_of_sample(spec: RunSpec, samples_per_picture: float) -> tuple[float, float]:
    """Tokens of a sample's text, and those that it adds to a step: what is read after the last prediction is spared,
    and samples that share a picture share what stands before it and what they begin with after it."""
    template, source = spec.model.chat_template, type(spec.data.source)
    if template == "plain":
        return CAPTION_TOKENS, CAPTION_TOKENS
    if source not in WORDS:
        return OTHER_TEXT_TOKENS, OTHER_TEXT_TOKENS
    opening, asked, answered, after = WRAPPING[template]
    rounds = 1.0 if spec.training.rounds == "apart" else questions_of(spec)
    text = opening + LINE_BREAK + rounds * (asked + WORDS[source] + answered)
    shared = opening + asked + LINE_BREAK
    return text, text - after - shared * (1 - 1 / samples_per_picture)


def rounds_of(spec: RunSpec) -> float:
    """Samples that a conversation makes; of a source whose conversations are not known before they are read, one."""
    return questions_of(spec) if spec.training.rounds == "apart" else 1.0


def questions_of(spec: RunSpec) -> float:
    """Rounds of a conversation; of a source whose conversations are not known before they are read, one."""
    match spec.data.source:
        case EasyVqaSource(questions_per_image=asked):
            return float(min(EASY_VQA_ROUNDS, asked))
        case ScenesSource(yes_no_pairs=paired):
            return PAIRED_SCENES_ROUNDS if paired else SCENES_ROUNDS
        case _:
            return 1.0


def shares_pictures(training: TrainingSpec) -> bool:
    """Whether a step computes the tokens of a picture once for the samples about it."""
    plain = training.language_mode == "full" or training.lora.quantize is not None
    return training.step.pack and training.step.share_picture and not plain


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


def config_from_shape(shape: dict[str, int | str], name: str) -> Any:
    """A configuration from the sizes that a profile states: a CLIP tower, a Llama, or the kind that it names."""
    sizes = {key: value for key, value in shape.items() if key not in ("tied", "model_type")}
    if "model_type" in shape:
        with usable(name, "shape"):
            return AutoConfig.for_model(str(shape["model_type"]), **sizes)
    if "patch_size" in shape:
        return CLIPVisionConfig(**sizes)
    if "vocab_size" in shape:
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


def count_on_meta(vision: Any, text: Any, spec: ModelSpec) -> dict[str, int]:
    """Parameters by part; one embedding row is added for the image token."""
    text.vocab_size += 1
    tied = bool(text.tie_word_embeddings)
    config = LlavaConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=tied, image_token_index=text.vocab_size - 1,
        **({"pixel_shuffle": spec.pixel_shuffle} if spec.pixel_shuffle > 1 else {}),
    )  # fmt: skip
    with torch.device("meta"):
        model = empty_llava(config)
    freeze_backbones(model)
    return {part: total for part, (total, _) in count_parameters(model).items()}
