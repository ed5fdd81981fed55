"""*scenes*: an endless, procedural visual question answering set, in the vsft message format.

A scene is a light background with one to three flat shapes, each in its own cell of a three by three grid. Everything
is a pure function of ``(seed, split, index)``, so a picture can be drawn again from its id on any machine.

Two properties matter more than beauty:

* **Split by image.** A scene's layout (which shape, colour, size and place) belongs to exactly one split, decided by
  its digest: no layout that is trained on is ever asked about in evaluation.
* **Blind chance.** For every kind of question the answer is drawn first and the question is built around it, so a
  model that never looks scores ``BLIND_RATE[kind]``; ``tests/data/test_scenes.py`` measures it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw

from llava_pipeline.data.record import turn

Split = Literal["train", "test"]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "green": (20, 200, 40),
    "blue": (25, 45, 235),
    "yellow": (245, 225, 20),
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (160, 48, 40),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "cross")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
COUNTS = ("one", "two", "three")
KINDS = ("color", "shape", "count", "yes/no", "place", "size")
BLIND_RATE = {"color": 1 / 8, "shape": 1 / 5, "count": 1 / 3, "yes/no": 1 / 2, "place": 1 / 9, "size": 1 / 2}
PICTURE_SIZE = 128
TEST_SHARE = 8  # one layout in eight belongs to the test split


@dataclass(frozen=True, slots=True)
class Shape:
    """One flat shape. ``x``, ``y`` (centre) and ``radius`` are in units of the picture's side, in [0, 1]."""

    shape: str
    color: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    aspect: float = 1.0

    @property
    def phrase(self) -> str:
        """``a small red circle at the top left``."""
        return f"a {self.size} {self.color} {self.shape} at the {self.place}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes in reading order on a background colour."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]

    @property
    def caption(self) -> str:
        """Every shape's phrase, in reading order, joined by ``and``."""
        return " and ".join(shape.phrase for shape in self.shapes)

    @property
    def layout_digest(self) -> str:
        """Digest of what the caption tells: two scenes with one digest differ only in jitter and background."""
        return hashlib.sha256(self.caption.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a scene with its single right answer."""

    kind: str
    text: str
    answer: str
    about: tuple[str, str] | None = None
    """Colour and shape of what a yes/no question asks for: ("red", "circle"), ("", "circle") or ("red", "shape")."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What training rows are made of; test rows are the same whatever it says."""

    single_shapes: float = 1.0
    """Share of the scenes with one shape that is kept, above 0 and at most 1; others are drawn in place of the rest."""
    yes_no_pairs: bool = False
    """After a question that "yes" or "no" answers comes its counterpart, which asks for something near and has the
    other answer: balanced pairs (arXiv 1612.00837, where one question is about two pictures; here two about one)."""

    @property
    def name(self) -> str:
        """Equal names have equal rows."""
        fewer = f"/single_shapes={self.single_shapes}" if self.single_shapes < 1 else ""
        return fewer + ("/yes_no_pairs" if self.yes_no_pairs else "")


AS_DRAWN = Mix()

# --------------------------------------------------------------------------------------------- drawing


def sample_background(rng: random.Random) -> tuple[int, int, int]:
    """A light colour: every shape's colour stands out from it."""
    return (rng.randint(226, 255), rng.randint(226, 255), rng.randint(226, 255))


def sample_shape(rng: random.Random, place: str) -> Shape:
    """A shape with uniform attributes, its centre jittered inside the cell named by ``place``."""
    row, column = divmod(PLACES.index(place), 3)
    size = rng.choice(SIZES)
    radius = rng.uniform(0.080, 0.105) if size == "small" else rng.uniform(0.145, 0.170)
    jitter = 0.035
    return Shape(
        shape=rng.choice(SHAPES),
        color=rng.choice(tuple(COLORS)),
        size=size,
        place=place,
        x=(2 * column + 1) / 6 + rng.uniform(-jitter, jitter),
        y=(2 * row + 1) / 6 + rng.uniform(-jitter, jitter),
        radius=radius,
        aspect=rng.choice((0.62, 0.75, 1.0, 1.33, 1.6)),
    )


def sample_scene(rng: random.Random) -> Scene:
    """One, two or three shapes (equally likely) in distinct cells."""
    places = sorted(rng.sample(PLACES, rng.randint(1, 3)), key=PLACES.index)
    return Scene(tuple(sample_shape(rng, place) for place in places), sample_background(rng))


def outline(shape: Shape, side: int) -> list[tuple[float, float]] | tuple[float, float, float, float]:
    """Polygon corners, or the bounding box of a circle, in pixels of a picture ``side`` wide."""
    from math import cos, pi, sin

    x, y, r = shape.x * side, shape.y * side, shape.radius * side
    if shape.shape == "circle":
        return (x - r, y - r, x + r, y + r)
    if shape.shape == "rectangle":
        w, h = (r, r / shape.aspect) if shape.aspect >= 1 else (r * shape.aspect, r)
        return [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]
    if shape.shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape.shape == "star":
        return [
            (
                x + (r if k % 2 == 0 else 0.42 * r) * sin(k * pi / 5),
                y - (r if k % 2 == 0 else 0.42 * r) * cos(k * pi / 5),
            )
            for k in range(10)
        ]
    t = 0.34 * r  # half the thickness of a cross's bars
    return [
        *((x - t, y - r), (x + t, y - r), (x + t, y - t), (x + r, y - t), (x + r, y + t), (x + t, y + t)),
        *((x + t, y + r), (x - t, y + r), (x - t, y + t), (x - r, y + t), (x - r, y - t), (x - t, y - t)),
    ]


def draw(scene: Scene, side: int = PICTURE_SIZE) -> Image.Image:
    """The scene as an RGB picture, drawn at twice the size and averaged down so that edges are smooth."""
    picture = Image.new("RGB", (side * 2, side * 2), scene.background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        points = outline(shape, side * 2)
        if shape.shape == "circle":
            pen.ellipse(points, fill=COLORS[shape.color])
        else:
            pen.polygon(points, fill=COLORS[shape.color])
    return picture.reduce(2)


# --------------------------------------------------------------------------------------------- questions


def unique(scene: Scene, attribute: str) -> list[Shape]:
    """Shapes whose value of ``attribute`` no other shape of the scene has: they can be referred to by it."""
    values = [getattr(shape, attribute) for shape in scene.shapes]
    return [shape for shape in scene.shapes if values.count(getattr(shape, attribute)) == 1]


def reference(rng: random.Random, scene: Scene, *attributes: str) -> tuple[Shape, str] | None:
    """A shape and a phrase that names only it, by one of ``attributes``; None where nothing is unique."""
    named: list[tuple[Shape, str]] = []
    for attribute in attributes:
        for shape in unique(scene, attribute):
            phrase = {
                "shape": f"the {shape.shape}",
                "color": f"the {shape.color} shape",
                "place": f"the shape at the {shape.place}",
            }[attribute]
            named.append((shape, phrase))
    return rng.choice(named) if named else None


def ask_color(rng: random.Random, scene: Scene) -> Question | None:
    """What color is the circle?"""
    if (found := reference(rng, scene, "shape", "shape", "place")) is None:
        return None
    shape, phrase = found
    text = rng.choice((f"What color is {phrase}?", f"What is the color of {phrase}?"))
    return Question("color", text, shape.color)


def ask_shape(rng: random.Random, scene: Scene) -> Question | None:
    """What shape is red?"""
    if (found := reference(rng, scene, "color", "color", "place")) is None:
        return None
    shape, phrase = found
    if phrase.endswith(" shape"):
        text = rng.choice((f"What shape is {shape.color}?", f"What is the {shape.color} shape?"))
    else:
        text = f"What shape is at the {shape.place}?"
    return Question("shape", text, shape.shape)


def ask_count(rng: random.Random, scene: Scene) -> Question:
    """How many shapes are there?"""
    text = rng.choice(("How many shapes are there?", "How many shapes are in the picture?"))
    return Question("count", text, COUNTS[len(scene.shapes) - 1])


def ask_yes_no(rng: random.Random, scene: Scene) -> Question:
    """Is there a red circle? (The answer is tossed first; what a "no" asks for is as likely as what a "yes" does.)"""
    yes = rng.random() < 0.5
    form = rng.choice(("both", "both", "shape", "color"))
    present, absent = things(scene, form)
    if not yes and form == "both" and rng.random() < 0.5:  # half of what is absent shares a colour or a shape
        colors, shapes = {s.color for s in scene.shapes}, {s.shape for s in scene.shapes}
        absent = [(c, s) for c, s in absent if (c in colors) != (s in shapes)] or absent
    return is_there(rng, rng.choice(present if yes else absent), yes=yes)


def things(scene: Scene, form: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What is in the scene and what is not, as ``Question.about`` has it, told by ``both`` or by one of them."""

    def told(color: str, shape: str) -> tuple[str, str]:
        return "" if form == "shape" else color, "shape" if form == "color" else shape

    present = sorted({told(shape.color, shape.shape) for shape in scene.shapes})
    every = dict.fromkeys(told(color, shape) for color in COLORS for shape in SHAPES)
    return present, [thing for thing in every if thing not in present]


def is_there(rng: random.Random, about: tuple[str, str], *, yes: bool) -> Question:
    """Is there a red circle?"""
    thing = " ".join(about).strip()
    text = rng.choice((f"Is there a {thing}?", f"Is there a {thing} in the picture?"))
    return Question("yes/no", text, "yes" if yes else "no", about)


def counterpart(rng: random.Random, scene: Scene, question: Question) -> Question:
    """A yes/no question with the other answer, told by the same attributes and near to it where anything is: its colour
    or its shape, but not both, is what was asked for. Of a colour and a shape that are not there, half the time
    both are in the scene, though not together, where there are such."""
    if question.about is None:
        raise ValueError(f"only a yes/no question has a counterpart, not {question.text!r}")
    color, shape = question.about
    present, absent = things(scene, "shape" if not color else "color" if shape == "shape" else "both")
    yes = question.answer == "no"
    others = present if yes else absent
    near = [(c, s) for c, s in others if (c == color) != (s == shape)] or others
    if not yes and rng.random() < 0.5:
        colors, shapes = {s.color for s in scene.shapes}, {s.shape for s in scene.shapes}
        near = [(c, s) for c, s in near if c in colors and s in shapes] or near
    return is_there(rng, rng.choice(near), yes=yes)


def ask_place(rng: random.Random, scene: Scene) -> Question | None:
    """Where is the circle?"""
    if (found := reference(rng, scene, "shape", "color")) is None:
        return None
    shape, phrase = found
    return Question("place", f"Where is {phrase}?", shape.place)


def ask_size(rng: random.Random, scene: Scene) -> Question | None:
    """Is the circle small or large?"""
    if (found := reference(rng, scene, "shape", "color", "place")) is None:
        return None
    shape, phrase = found
    return Question("size", f"Is {phrase} small or large?", shape.size)


ASK = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "yes/no": ask_yes_no,
    "place": ask_place,
    "size": ask_size,
}


def ask_caption(rng: random.Random, scene: Scene) -> Question:
    """Describe the picture."""
    text = rng.choice(("Describe the picture.", "What is in the picture?"))
    return Question("caption", text, scene.caption)


# --------------------------------------------------------------------------------------------- records


def name_of(seed: int, split: Split, mix: Mix = AS_DRAWN) -> str:
    """What a split's rows are called: equal names have equal rows, so a mix that changes them is part of it."""
    return f"scenes/{seed}/{split}{mix.name if split == 'train' else ''}"


def scene_rng(seed: int, split: Split, index: int) -> random.Random:
    """The generator of one record: independent of every other record's."""
    return random.Random(f"scenes/{seed}/{split}/{index}")


def scene_at(seed: int, split: Split, index: int, mix: Mix = AS_DRAWN) -> tuple[Scene, random.Random]:
    """The scene with this index, and the generator that goes on to make its questions.

    Of the training scenes with one shape the mix keeps a share.
    """
    rng = scene_rng(seed, split, index)
    while True:
        scene = sample_scene(rng)
        of_test = int(scene.layout_digest[:8], 16) % TEST_SHARE == 0
        thinned = split == "train" and mix.single_shapes < 1 and len(scene.shapes) == 1
        if of_test == (split == "test") and not (thinned and rng.random() >= mix.single_shapes):
            return scene, rng


def questions_at(seed: int, split: Split, index: int, mix: Mix = AS_DRAWN) -> tuple[Scene, list[Question]]:
    """The scene of row ``index`` of a split and what is asked about it; nothing is drawn.

    A train row is a conversation of up to five questions of different kinds, ending with a caption in every other
    row (a caption answers everything, so nothing may come after it). A yes/no question's counterpart follows it where
    the mix asks for pairs; nothing else changes. A test row asks one question.
    """
    scene, rng = scene_at(seed, split, index, mix)
    if split == "train":
        kinds = rng.sample(KINDS, 5)
        questions = [question for kind in kinds if (question := ASK[kind](rng, scene)) is not None]
        asked = [*questions[:3], ask_caption(rng, scene)] if index % 2 == 0 else questions
        return scene, with_counterparts(seed, index, scene, asked) if mix.yes_no_pairs else asked
    kind = KINDS[index % len(KINDS)]
    while (question := ASK[kind](rng, scene)) is None:
        scene = sample_scene(rng)
        if int(scene.layout_digest[:8], 16) % TEST_SHARE != 0:
            scene = scene_at(seed, split, rng.randrange(1 << 40))[0]
    return scene, [question]


def with_counterparts(seed: int, index: int, scene: Scene, questions: list[Question]) -> list[Question]:
    """The same questions; after each that "yes" or "no" answers, its counterpart, drawn by a generator of its own."""
    rng = random.Random(f"scenes/{seed}/train/{index}/opposite")  # another word would make other rows
    paired = []
    for question in questions:
        paired.append(question)
        if question.about is not None:
            paired.append(counterpart(rng, scene, question))
    return paired


def record(seed: int, split: Split, index: int, mix: Mix = AS_DRAWN) -> dict[str, Any]:
    """Row ``index`` of a split: ``{"id", "messages", "images", "kinds"}``."""
    scene, questions = questions_at(seed, split, index, mix)
    messages = []
    for k, question in enumerate(questions):
        messages += [turn("user", question.text, with_image=k == 0), turn("assistant", question.answer)]
    return {
        "id": f"{name_of(seed, split, mix)}/{index}",
        "messages": messages,
        "images": [draw(scene)],
        "kinds": [question.kind for question in questions],
    }


def records(seed: int, split: Split, start: int = 0, mix: Mix = AS_DRAWN) -> Iterator[dict[str, Any]]:
    """Rows from ``start`` on, without end."""
    index = start
    while True:
        yield record(seed, split, index, mix)
        index += 1
