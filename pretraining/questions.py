"""Questions that the pocket language model is pretrained on: those of *scenes*, easy-VQA's wording, and descriptions.

Only words are shared with easy-VQA: none of its pictures or rows. As in *scenes*, the answer is drawn first.
"""

from __future__ import annotations

import random

from llava_pipeline.data import scenes
from llava_pipeline.data.scenes import Question, Scene

POSITIVE = ("is there a {}?", "is a {} present?", "is there a {} in the image?", "does the image contain a {}?")
NEGATIVE = (
    *("is there not a {}?", "is no {} present?", "is there not a {} in the image?"),
    "does the image not contain a {}?",
)
WHAT_SHAPE = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")


def sample_questions(rng: random.Random, scene: Scene, count: int, lookups_only: bool = False) -> list[Question]:
    """``count`` different questions in random order; a caption comes last, because it answers all that follows."""
    questions: list[Question] = []
    for _ in range(20 * count):
        if len(questions) == count:
            break
        question = (sample_lookup if lookups_only else sample_question)(rng, scene)
        if question is not None and question.text not in {q.text for q in questions}:
            questions.append(question)
    if rng.random() < 0.3 and not lookups_only:
        questions[-1] = scenes.ask_caption(rng, scene)
    return questions


def sample_lookup(rng: random.Random, scene: Scene) -> Question | None:
    """A question for which one shape has to be found by a word: what is learned first."""
    if rng.random() < 0.2:
        return scenes.ask_yes_no(rng, scene)
    if rng.random() < 0.2:
        return ask_description(rng, scene)
    return scenes.ASK[rng.choice(("color", "shape", "place", "size"))](rng, scene)


def sample_question(rng: random.Random, scene: Scene) -> Question | None:
    """One question, or None where the drawn kind cannot be asked of this scene."""
    draw = rng.random()
    if draw < 0.12:
        return ask_description(rng, scene)
    if draw < 0.47:
        return rng.choice((easy_color, easy_shape, easy_yes_no, easy_yes_no))(rng, scene)
    question = scenes.ASK[rng.choice(scenes.KINDS)](rng, scene)
    if question is not None and rng.random() < 0.15:
        return Question(question.kind, question.text.lower(), question.answer)
    return question


def ask_description(rng: random.Random, scene: Scene) -> Question | None:
    """Describe the circle. (Eight words are learned at once where other answers teach one.)"""
    if (found := scenes.reference(rng, scene, "shape", "color", "place")) is None:
        return None
    shape, phrase = found
    return Question("description", f"Describe {phrase}.", shape.phrase)


def easy_color(rng: random.Random, scene: Scene) -> Question | None:
    """what color is the circle? (``the shape`` where there is only one)"""
    if not (found := scenes.unique(scene, "shape")):
        return None
    shape = rng.choice(found)
    name = rng.choice(("shape", shape.shape)) if len(scene.shapes) == 1 else shape.shape
    return Question(
        "color", rng.choice(("what color is the {}?", "what is the color of the {}?")).format(name), shape.color
    )


def easy_shape(rng: random.Random, scene: Scene) -> Question | None:
    """what shape is in the image? what is the red shape?"""
    if len(scene.shapes) == 1 and rng.random() < 0.6:
        return Question("shape", rng.choice(WHAT_SHAPE), scene.shapes[0].shape)
    if not (found := scenes.unique(scene, "color")):
        return None
    shape = rng.choice(found)
    return Question("shape", f"what is the {shape.color} shape?", shape.shape)


def easy_yes_no(rng: random.Random, scene: Scene) -> Question:
    """is there a red shape? and, as often, is there not a red shape?"""
    present, negated = rng.random() < 0.5, rng.random() < 0.5
    if rng.random() < 0.6:
        have, every = {f"{s.color} shape" for s in scene.shapes}, [f"{color} shape" for color in scenes.COLORS]
    else:
        have, every = {s.shape for s in scene.shapes}, list(scenes.SHAPES)
    thing = rng.choice([name for name in every if (name in have) == present])
    text = rng.choice(NEGATIVE if negated else POSITIVE).format(thing)
    return Question("negation" if negated else "yes/no", text, "yes" if present != negated else "no")
