"""The processor of an assembled model from its files alone: no torch, so a process that checks rows stays small."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from llava_pipeline.backbones.configuration import read_tokenizer, usable
from llava_pipeline.backbones.converted import plain
from llava_pipeline.contracts import AssembledModel, FetchedBackbone
from llava_pipeline.errors import IncompatibleParts
from llava_pipeline.model.families import FAMILIES
from llava_pipeline.model.processor import IMAGE_TOKEN, ImageSettings, Processor
from llava_pipeline.model.template import chat_template
from llava_pipeline.store import open_artifact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def processor_of(model: AssembledModel) -> Processor:
    """Only the processor: no weights are read but a GGUF's that nobody has read before."""
    part = model.backbones.language_model
    tokenizer = load_tokenizer(part)
    template = chat_template(model.spec.chat_template, tokenizer)
    add_tokens(tokenizer, part.origin)
    images = image_settings(model.backbones.vision_tower, model.image_size)
    return Processor(tokenizer, template, images, model.num_image_tokens)


def load_tokenizer(part: FetchedBackbone) -> PreTrainedTokenizerFast:
    """Tokenizer of a language model; a GGUF holds its own."""
    folder, weights = plain(part)
    return read_tokenizer(folder, weights, part.origin)


def image_settings(part: FetchedBackbone, side: int) -> ImageSettings:
    """Mean and deviation from the image processor's file, those of the tower's family where there is none."""
    folder = open_artifact(part.files)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            with usable(part.origin, name, folder):
                content = json.loads((folder / name).read_text(encoding="utf-8"))
                content = content.get("image_processor", content)
                mean, std = tuple(content["image_mean"]), tuple(content["image_std"])
                if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
                    raise ValueError(f"image_mean is {mean}, image_std is {std}")
                return ImageSettings(side, mean, std)
    with usable(part.origin, "config.json", folder):
        family = FAMILIES[json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]]
    return ImageSettings(side, family.mean, family.std)


def add_tokens(tokenizer: PreTrainedTokenizerFast, origin: str) -> None:
    """``<image>`` once and, where the tokenizer has none, a padding token."""
    if IMAGE_TOKEN in tokenizer.get_vocab():
        raise IncompatibleParts(f"the tokenizer of {origin} already owns {IMAGE_TOKEN}; use the model it came from")
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
