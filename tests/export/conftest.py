"""Real models at small size to export, and questions about pictures of several shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.data import scenes
from llava_pipeline.export.card import Facts
from llava_pipeline.export.verify import Question
from llava_pipeline.model.assemble import Llava, assemble
from llava_pipeline.spec import load_spec
from tests.tiny import home

__all__ = ["home"]
SPEC = load_spec("pocket")


@pytest.fixture(scope="package")
def parts(home: Path) -> Backbones:
    """The pocket parts."""
    both = SPEC.backbones
    return Backbones(vision_tower=fetch(both.vision_tower, None, 0), language_model=fetch(both.language_model, None, 0))


@pytest.fixture(scope="package")
def pocket(parts: Backbones) -> Llava:
    """Both with a projector from its seed."""
    return assemble(parts, SPEC.model)


@pytest.fixture(scope="package")
def facts(parts: Backbones) -> Facts:
    """What is told of it."""
    return Facts("llava-pocket", SPEC.title, "0" * 32, "pocket", "It sees.", "scenes", parts)


def ask(count: int) -> list[Question]:
    """About scenes; some pictures are cut so that they are no squares."""
    asked = []
    for number in range(count):
        scene, (question,) = scenes.questions_at(1, "test", number)
        picture = scenes.draw(scene)
        if number % 6 == 2:
            picture = picture.crop((0, 20, 128, 80))
        if number % 6 == 5:
            picture = picture.crop((30, 0, 121, 128))
        asked.append(Question(question.text.strip(), picture))
    return asked


@pytest.fixture(scope="package")
def questions() -> list[Question]:
    """A few."""
    return ask(6)
