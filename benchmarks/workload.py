"""What every arm of the training benchmark trains on: a model, its processors and conversations, from a seed alone.

    budget   random weights in the shapes of TinyLlama-1.1B and CLIP ViT-B/32; photographs and texts of LLaVA's lengths
    quick    the same with four layers each
    pocket   the embedded backbones with their real weights; the scenes that the pocket profile trains on

Random weights cost as much time as trained ones. They are exact in bfloat16, so an arm that keeps them in half the
bytes computes with the same numbers.
"""

from __future__ import annotations

import copy
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.initialization import no_init_weights
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones, Piece
from llava_pipeline.data.sources.procedural import ScenesReader
from llava_pipeline.model.assemble import Llava, assemble, init_projector
from llava_pipeline.model.families import CLIP_MEAN, CLIP_STD, num_image_tokens
from llava_pipeline.model.freeze import freeze_backbones
from llava_pipeline.model.processor import IMAGE_TOKEN, Encoded, ImageSettings, Message, Processor
from llava_pipeline.model.read_processor import add_tokens, load_tokenizer
from llava_pipeline.model.template import LLAVA
from llava_pipeline.spec import ModelSpec, RunSpec, ScenesSource, Split, load_spec

Shapes = Literal["budget", "quick", "pocket"]
Labels = Literal["seed", "answers"]

LAYERS: dict[Shapes, tuple[int, int]] = {"budget": (22, 12), "quick": (4, 4)}  # of the language model, of the tower
VOCAB = 32_001  # TinyLlama's and <image>
WEIGHT_STD = 0.02
PROJECTOR_SEED = 0

MEAN_TEXT, P95_TEXT = 240, 450  # tokens without the picture's: LLaVA-Instruct-150K, performance.md 1.2
TEXT_SPREAD = 0.4414  # of the lognormal with this mean and this 95th percentile
MAX_TOKENS = 1024  # as the budget profile has it
QUESTION_SHARE = 0.2
SIZES = ((640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (640, 360))  # what photographs of COCO measure

# One token each of the pocket tokenizer when a space stands before them.
WORDS = (
    "red", "green", "blue", "yellow", "black", "gray", "teal", "brown", "circle", "rectangle", "triangle", "star",
    "cross", "small", "large", "top", "bottom", "left", "right", "center", "the", "and", "of", "at", "is", "are",
    "in", "one", "two", "three", "shape", "shapes", "picture", "image", "color", "there", "present", "contain",
)  # fmt: skip
# The pocket tokenizer spells the system prompt in 118 tokens, Llama's in 35 up to <image>. What lies before <image>
# need be computed only once, so too long a prefix would flatter whoever does that: these words become tokens.
PROMPT_WORDS = (
    " chat", " between", " curious", " user", " artificial", " intelligence", " assistant", "The", " gives", " helpful",
    " detailed", " polite", " answers", " to the", " questions", "ASSISTANT", "USER",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation in the vsft format and the bytes of its picture, JPEG or PNG."""

    messages: list[Message]
    image: bytes


@dataclass(frozen=True)
class Work:
    """A model with our processor and the seed's, and what it trains on."""

    shapes: Shapes
    llava: Llava
    seed_processor: LlavaProcessor
    samples: list[Sample]


def workload(shapes: Shapes, count: int, seed: int = 0) -> Work:
    """Everything an arm needs. The model stays float32 on the CPU until an arm moves it."""
    llava = pocket_model() if shapes == "pocket" else random_model(shapes)
    return Work(shapes, llava, seed_processor(llava), conversations(shapes, count, seed))


def reset_projector(llava: Llava) -> None:
    """The projector as it was before any training; every arm starts from it."""
    init_projector(llava.model.model.multi_modal_projector, PROJECTOR_SEED)


# --------------------------------------------------------------------------------------------- models


@contextmanager
def temporary_home() -> Iterator[None]:
    """A store that nobody else sees and that is gone afterwards."""
    before = os.environ.get("LLAVA_PIPELINE_HOME")
    with tempfile.TemporaryDirectory() as home:
        os.environ["LLAVA_PIPELINE_HOME"] = home
        try:
            yield
        finally:
            if before is None:
                del os.environ["LLAVA_PIPELINE_HOME"]
            else:
                os.environ["LLAVA_PIPELINE_HOME"] = before


def pocket_backbones(spec: RunSpec) -> Backbones:
    """Both embedded parts, in the present store."""
    parts = spec.backbones
    return Backbones(
        vision_tower=fetch(parts.vision_tower, None, 0), language_model=fetch(parts.language_model, None, 0)
    )


def pocket_model() -> Llava:
    """The pocket profile's model as its runs assemble it."""
    spec = load_spec("pocket")
    with temporary_home():
        llava = assemble(pocket_backbones(spec), spec.model)
    reset_projector(llava)
    return llava


def budget_tokenizer() -> Any:
    """The pocket tokenizer with the system prompt's words and ``<image>``; its ids fit below ``VOCAB``."""
    with temporary_home():
        tokenizer = load_tokenizer(fetch(load_spec("pocket").backbones.language_model, None, 0))
    tokenizer.add_tokens(list(PROMPT_WORDS))
    add_tokens(tokenizer, "the pocket tokenizer")
    tokenizer.model_max_length = 2048
    return tokenizer


def budget_processor() -> Processor:
    """Our processor for the budget shapes; it needs no weights."""
    images = ImageSettings(224, CLIP_MEAN, CLIP_STD)
    return Processor(budget_tokenizer(), LLAVA, images, (224 // 32) ** 2)


def budget_config(shapes: Shapes, tokenizer: Any) -> LlavaConfig:
    """TinyLlama-1.1B behind CLIP ViT-B/32, with so many layers; the seed leaves the rest at LLaVA's defaults."""
    text_layers, tower_layers = LAYERS[shapes]
    vision = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=tower_layers, num_attention_heads=12,
        image_size=224, patch_size=32, projection_dim=512,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=2048, intermediate_size=5632, num_hidden_layers=text_layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
        tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_image_tokens(vision, ModelSpec()), vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Matrices and embeddings small and normal, exact in bfloat16; norms one, biases zero. In place: one copy."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0, WEIGHT_STD, generator=generator)
            parameter.copy_(parameter.bfloat16())


def random_model(shapes: Shapes) -> Llava:
    """The budget profile's shapes with random weights, frozen but for the projector."""
    processor = budget_processor()
    config = budget_config(shapes, processor.tokenizer)
    assert config.image_seq_length == processor.num_image_tokens
    with no_init_weights():
        model = LlavaForConditionalGeneration(config)
    model = model.to(torch.float32).eval()
    fill(model)
    freeze_backbones(model)
    llava = Llava(model, processor, {})
    reset_projector(llava)
    return llava


def seed_processor(llava: Llava) -> LlavaProcessor:
    """The seed's processor: CLIP's shortest edge and centre crop where ours letterboxes, the same tokenizer.

    The seed names no ``vision_feature_select_strategy``, which by accident gives the right number of image tokens;
    named, "default" takes one off, for which the class token has to be added. Without torchvision, which this project
    does not need, transformers gives CLIPImageProcessor as its Pillow version, which is also what it was in the seed's
    days; it is named here so that every machine prepares the same pixels.
    """
    config, ours = llava.model.config, llava.processor
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": ours.images.side}, crop_size={"height": ours.images.side, "width": ours.images.side},
        image_mean=list(ours.images.mean), image_std=list(ours.images.std),
    )  # fmt: skip
    tokenizer = copy.deepcopy(ours.tokenizer)
    tokenizer.chat_template = ours.template  # which the seed's collator renders with
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy, num_additional_image_tokens=1,
        chat_template=ours.template,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- conversations


def conversations(shapes: Shapes, count: int, seed: int = 0, split: Split = "train") -> list[Sample]:
    """So many conversations; each is a function of the seed, the split and its number alone.

    ``split="test"`` gives others of the same kind, to hold out.
    """
    if shapes == "pocket":
        return scenes(count, seed, split)
    compose = Composer(budget_processor())
    return [compose(np.random.default_rng((seed, split == "test", number))) for number in range(count)]


def scenes(count: int, seed: int, split: Split) -> list[Sample]:
    """Rows of the project's own scenes, as its reader gives them. The profile trains on seed 1, held out is "test"."""
    reader = ScenesReader(ScenesSource(seed=seed), split)
    rows = reader.rows(Piece(shard=0, name=reader.origin, start=0, stop=count))
    return [Sample(row["messages"], row["images"][0]["bytes"]) for row in rows]


def photograph(random: np.random.Generator) -> bytes:
    """A JPEG with the size and the bytes of a photograph: soft colours, some grain, no subject."""
    width, height = SIZES[random.integers(len(SIZES))]
    coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((width, height))
    grain = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    Image.blend(coarse, grain.filter(ImageFilter.GaussianBlur(1)), 0.5).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class Composer:
    """Conversations of one to three rounds whose lengths in tokens are drawn, not left to chance."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def __call__(self, random: np.random.Generator) -> Sample:
        mu = np.log(MEAN_TEXT) - TEXT_SPREAD**2 / 2
        num_images = self.processor.num_image_tokens
        rounds = int(random.integers(1, 4))
        wanted = int(np.clip(random.lognormal(mu, TEXT_SPREAD), 64, MAX_TOKENS - num_images)) + num_images
        spare = wanted - self.length(self.talk(random, rounds, 1, 1))
        question = max(1, int(QUESTION_SHARE * spare / rounds))
        answer = max(1, int((1 - QUESTION_SHARE) * spare / rounds))
        messages = self.talk(random, rounds, question, answer)
        last = messages[-1]["content"][0]
        words = last["text"].split()
        missing = wanted - self.length(messages)  # each word is a token
        words = words[:missing] if missing < 0 and len(words) > -missing else words + pick(random, max(missing, 0))
        last["text"] = " ".join(words)
        return Sample(messages, photograph(random))

    def talk(self, random: np.random.Generator, rounds: int, question: int, answer: int) -> list[Message]:
        """A conversation with so many words in each question and answer."""
        messages: list[Message] = []
        for number in range(rounds):
            asked = "What " + " ".join(pick(random, question)) + "?"
            content = [{"type": "text", "text": asked if number else "\n" + asked}]
            messages.append({"role": "user", "content": content if number else [{"type": "image"}, *content]})
            told = {"type": "text", "text": " ".join(pick(random, answer))}
            messages.append({"role": "assistant", "content": [told]})
        return messages

    def length(self, messages: list[Message]) -> int:
        """Tokens of a conversation, image tokens among them."""
        return len(self.processor.encode(messages).input_ids)


def pick(random: np.random.Generator, count: int) -> list[str]:
    """So many words."""
    return [WORDS[number] for number in random.integers(len(WORDS), size=count)]


# --------------------------------------------------------------------------------------------- tokens and pixels


def tokens(work: Work, sample: Sample, labels: Labels) -> Encoded:
    """``input_ids`` with the image tokens expanded, and labels of the same length.

    "seed" labels every token, as the seed's collator does: it copies ``input_ids`` and spares the padding alone, so
    the system prompt, the questions and the image tokens are labelled too. Today's LlavaForConditionalGeneration does
    not mask them: its forward hands the labels to ForCausalLMLoss as they are, so the model also learns to say
    ``<image>`` before each of its image tokens. (Before transformers expanded image tokens in the processor, the model
    merged the features in and left those places without a label.) "answers" labels what the assistant says.
    """
    encoded = work.llava.processor.encode(sample.messages)
    return encoded if labels == "answers" else Encoded(encoded.input_ids, list(encoded.input_ids))


def prefix_length(work: Work) -> int:
    """Tokens before the first image token: the same in every conversation."""
    ids = work.llava.processor.encode(work.samples[0].messages).input_ids
    return ids.index(work.llava.processor.image_token_id)


def decoded(sample: Sample) -> Image.Image:
    """The picture, decoded in full as ``datasets`` does."""
    picture = Image.open(io.BytesIO(sample.image))
    picture.load()
    return picture


def seed_pixels(work: Work, sample: Sample) -> torch.Tensor:
    """(3, S, S) as the seed prepares them; ours letterboxes. For arms that are compared by their losses."""
    pixels = work.seed_processor.image_processor(decoded(sample).convert("RGB"), return_tensors="pt")["pixel_values"]
    return pixels[0]


def facts(work: Work) -> dict[str, float]:
    """Lengths of the samples, to stand beside every number that is measured on them."""
    encoded = [tokens(work, sample, "answers") for sample in work.samples]
    lengths = np.array([len(one.input_ids) for one in encoded])
    text = lengths - work.llava.processor.num_image_tokens
    answered = np.array([sum(label >= 0 for label in one.labels) for one in encoded])
    return {
        "samples": len(lengths), "prefix_tokens": prefix_length(work),
        "image_tokens": work.llava.processor.num_image_tokens,
        "mean_tokens": round(float(lengths.mean()), 1), "mean_text_tokens": round(float(text.mean()), 1),
        "p95_text_tokens": float(np.percentile(text, 95)), "mean_answer_tokens": round(float(answered.mean()), 1),
        "mean_picture_bytes": round(float(np.mean([len(sample.image) for sample in work.samples]))),
    }  # fmt: skip
