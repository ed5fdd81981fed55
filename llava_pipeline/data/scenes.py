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
    present = {"both": {(s.color, s.shape) for s in scene.shapes}}
    present["shape"] = {("", s.shape) for s in scene.shapes}
    present["color"] = {(s.color, "shape") for s in scene.shapes}
    every = {
        "both": [(c, s) for c in COLORS for s in SHAPES],
        "shape": [("", s) for s in SHAPES],
        "color": [(c, "shape") for c in COLORS],
    }[form]
    if yes:
        color, shape = rng.choice(sorted(present[form]))
    else:
        absent = [pair for pair in every if pair not in present[form]]
        if form == "both" and rng.random() < 0.5:  # half of what is absent shares a colour or a shape with the scene
            colors, shapes = {s.color for s in scene.shapes}, {s.shape for s in scene.shapes}
            absent = [(c, s) for c, s in absent if (c in colors) != (s in shapes)] or absent
        color, shape = rng.choice(absent)
    thing = f"{color} {shape}".strip()
    text = rng.choice((f"Is there a {thing}?", f"Is there a {thing} in the picture?"))
    return Question("yes/no", text, "yes" if yes else "no")


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


def name_of(seed: int, split: Split, single_shapes: float = 1.0) -> str:
    """What a split's rows are called: equal names have equal rows, so a share that changes them is part of it."""
    fewer = f"/single_shapes={single_shapes}" if split == "train" and single_shapes < 1 else ""
    return f"scenes/{seed}/{split}{fewer}"


def scene_rng(seed: int, split: Split, index: int) -> random.Random:
    """The generator of one record: independent of every other record's."""
    return random.Random(f"scenes/{seed}/{split}/{index}")


def scene_at(seed: int, split: Split, index: int, single_shapes: float = 1.0) -> tuple[Scene, random.Random]:
    """The scene with this index, and the generator that goes on to make its questions.

    Of the training scenes with one shape the share ``single_shapes`` (above 0, at most 1) is kept, and others are drawn
    in the place of the rest; test scenes are the same whatever it is.
    """
    rng = scene_rng(seed, split, index)
    while True:
        scene = sample_scene(rng)
        of_test = int(scene.layout_digest[:8], 16) % TEST_SHARE == 0
        thinned = split == "train" and single_shapes < 1 and len(scene.shapes) == 1
        if of_test == (split == "test") and not (thinned and rng.random() >= single_shapes):
            return scene, rng


def questions_at(seed: int, split: Split, index: int, single_shapes: float = 1.0) -> tuple[Scene, list[Question]]:
    """The scene of row ``index`` of a split and what is asked about it; nothing is drawn.

    A train row is a conversation of up to five questions of different kinds, ending with a caption in every other
    row (a caption answers everything, so nothing may come after it). A test row asks one question.
    """
    scene, rng = scene_at(seed, split, index, single_shapes)
    if split == "train":
        kinds = rng.sample(KINDS, 5)
        questions = [question for kind in kinds if (question := ASK[kind](rng, scene)) is not None]
        return scene, [*questions[:3], ask_caption(rng, scene)] if index % 2 == 0 else questions
    kind = KINDS[index % len(KINDS)]
    while (question := ASK[kind](rng, scene)) is None:
        scene = sample_scene(rng)
        if int(scene.layout_digest[:8], 16) % TEST_SHARE != 0:
            scene = scene_at(seed, split, rng.randrange(1 << 40))[0]
    return scene, [question]


def record(seed: int, split: Split, index: int, single_shapes: float = 1.0) -> dict[str, Any]:
    """Row ``index`` of a split: ``{"id", "messages", "images", "kinds"}``."""
    scene, questions = questions_at(seed, split, index, single_shapes)
    messages = []
    for k, question in enumerate(questions):
        messages += [turn("user", question.text, with_image=k == 0), turn("assistant", question.answer)]
    return {
        "id": f"{name_of(seed, split, single_shapes)}/{index}",
        "messages": messages,
        "images": [draw(scene)],
        "kinds": [question.kind for question in questions],
    }


def records(seed: int, split: Split, start: int = 0, single_shapes: float = 1.0) -> Iterator[dict[str, Any]]:
    """Rows from ``start`` on, without end."""
    index = start
    while True:
        yield record(seed, split, index, single_shapes)
        index += 1
