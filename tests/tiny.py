"""The tiny profile for tests of the model, training and evaluation rooms: assembled once, copied for each test."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import AssembledModel, Backbones
from llava_pipeline.model.assemble import Llava, assemble, describe
from llava_pipeline.model.processor import Encoded, Message, Processor
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.training.features import tower_features
from llava_pipeline.training.samples import Samples, collect

SPEC: RunSpec = load_spec("tiny")
NUM_PICTURES = 3
CONVERSATIONS = [  # of three lengths, one to three rounds
    ["What color is the circle?", "red"],
    ["How many shapes?", "three", "And how many of them are large and blue?", "two of them"],
    ["Is there a square at the top?", "yes", "Which color?", "green", "What is below it?", "a small yellow triangle"],
    ["?", "blue"],
    ["What is the large shape on the left side of the picture?", "circle"],
]


@pytest.fixture(scope="package", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store of this package's tests alone."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_PIPELINE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="package")
def backbones(home: Path) -> Backbones:
    """Both parts, with random weights."""
    parts = SPEC.backbones
    return Backbones(
        vision_tower=fetch(parts.vision_tower, None, 0), language_model=fetch(parts.language_model, None, 0)
    )


@pytest.fixture(scope="package")
def shared(backbones: Backbones) -> Llava:
    """The assembled model of all tests; not to be changed."""
    return assemble(backbones, SPEC.model)


@pytest.fixture(scope="package")
def processor(shared: Llava) -> Processor:
    """Its processor, which nothing changes."""
    return shared.processor


@pytest.fixture
def llava(shared: Llava) -> Llava:
    """A copy to do anything with."""
    return replace(shared, model=copy.deepcopy(shared.model))


@pytest.fixture
def assembled(backbones: Backbones, shared: Llava) -> AssembledModel:
    """The facts of the assembled model."""
    return describe(shared, backbones, SPEC.model)


@pytest.fixture
def lively(llava: Llava) -> Llava:
    """Larger random weights: predictions that differ by word, place and picture."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in llava.model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return llava


def talk(*texts: str) -> list[Message]:
    """A conversation about one picture: question, answer, question, ..."""
    roles = ("user", "assistant")
    messages = [{"role": roles[k % 2], "content": [{"type": "text", "text": text}]} for k, text in enumerate(texts)]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "\n" + texts[0]}]
    return messages


def encoded(processor: Processor) -> list[Encoded]:
    """Every conversation in ids and labels."""
    return [processor.encode(talk(*texts)) for texts in CONVERSATIONS]


def pictures(llava: Llava, count: int = NUM_PICTURES) -> torch.Tensor:
    """Random ``pixel_values``."""
    side = llava.processor.images.side
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


IMAGES = [k % NUM_PICTURES for k in range(len(CONVERSATIONS))]


def samples_of(llava: Llava, seed_labels: bool = False, **changes: Any) -> Samples:
    """The conversations to train on, about pictures in turn; with the seed's labels every token is supervised."""
    rows = encoded(llava.processor)
    labels = [torch.tensor(row.input_ids if seed_labels else row.labels) for row in rows]
    return replace(collect([torch.tensor(row.input_ids) for row in rows], labels, IMAGES), **changes)


def features_of(llava: Llava) -> torch.Tensor:
    """Tower features of the random pictures."""
    return tower_features(llava.model, pictures(llava))
