"""Scenes are the same everywhere, split by image, told truly, and give nothing to a model that is blind."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_pipeline.data import scenes
from llava_pipeline.data.scenes import (
    BLIND_RATE,
    COLORS,
    COUNTS,
    KINDS,
    PLACES,
    SHAPES,
    SIZES,
    Mix,
    Question,
    Scene,
    Shape,
    Split,
)
from llava_pipeline.evaluation.score import BlindGuesser

SEED, NUM_TRAIN, NUM_TEST = 3, 4000, 7200


Rows = list[tuple[Scene, list[Question]]]


@pytest.fixture(scope="module")
def train() -> Rows:
    return [scenes.questions_at(SEED, "train", index) for index in range(NUM_TRAIN)]


@pytest.fixture(scope="module")
def held_out() -> Rows:
    return [scenes.questions_at(SEED, "test", index) for index in range(NUM_TEST)]


# --------------------------------------------------------------------------------------------- determinism


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(), split=st.sampled_from(["train", "test"]), index=st.integers(0, 10**9))
def test_a_row_is_a_function_of_seed_split_and_index(seed: int, split: Split, index: int) -> None:
    row, again = (scenes.record(seed, split, index) for _ in range(2))
    assert row["images"][0].tobytes() == again["images"][0].tobytes()
    assert {**row, "images": None} == {**again, "images": None}
    assert row["id"] == f"scenes/{seed}/{split}/{index}"


def test_a_stream_started_late_goes_on_as_one_from_the_beginning() -> None:
    whole = list(itertools.islice(scenes.records(SEED, "train"), 6))
    rest = list(itertools.islice(scenes.records(SEED, "train", start=4), 2))
    assert [(row["id"], row["messages"]) for row in rest] == [(row["id"], row["messages"]) for row in whole[4:]]


def test_scenes_are_the_same_on_every_machine() -> None:
    scene, questions = scenes.questions_at(1, "train", 0)
    assert scene.caption == "a large gray rectangle at the left and a small black triangle at the bottom"
    assert scene.background == (228, 245, 229)
    assert [question.text for question in questions[:3]] == [
        "Is there a brown triangle in the picture?",
        "How many shapes are in the picture?",
        "What shape is at the bottom?",
    ]


def test_each_of_seed_split_and_index_makes_another_scene() -> None:
    where = [(0, "train", 0), (1, "train", 0), (0, "test", 0), (0, "train", 1)]
    assert len({scenes.questions_at(seed, split, index)[0] for seed, split, index in where}) == len(where)


def test_a_share_of_single_shapes_makes_way_for_others_and_leaves_all_other_rows_as_they_are() -> None:
    whole, fewer = (
        [scenes.questions_at(SEED, "train", index, Mix(single_shapes=share)) for index in range(NUM_TRAIN)]
        for share in (1, 0.25)
    )
    alone = [k for k, (scene, _) in enumerate(whole) if len(scene.shapes) == 1]
    kept = [k for k in alone if len(fewer[k][0].shapes) == 1]
    assert all(one == other for one, other in zip(whole, fewer, strict=True) if len(one[0].shapes) > 1)
    # A scene that made way is drawn anew, and by one in three is single once more.
    assert len(kept) / len(alone) == pytest.approx(1 / 3, abs=0.05)
    row = scenes.record(SEED, "train", 0, Mix(single_shapes=0.25))
    assert row["id"] == f"scenes/{SEED}/train/single_shapes=0.25/0"


def test_test_scenes_know_nothing_of_a_mix() -> None:
    mix = Mix(single_shapes=0.25, yes_no_pairs=True)
    for index in range(60):
        assert scenes.questions_at(SEED, "test", index, mix) == scenes.questions_at(SEED, "test", index)
        assert scenes.scene_at(SEED, "test", index, mix)[0] == scenes.scene_at(SEED, "test", index)[0]
    assert scenes.name_of(SEED, "test", mix) == f"scenes/{SEED}/test"


def test_mixes_that_differ_anywhere_name_different_rows() -> None:
    mixes = [Mix(share, pairs) for share in (1.0, 0.3, 0.30000001) for pairs in (False, True)]
    assert len({scenes.name_of(SEED, "train", mix) for mix in mixes}) == len(mixes)
    assert scenes.name_of(SEED, "train", Mix()) == f"scenes/{SEED}/train"


def test_pairs_add_a_counterpart_after_every_yes_or_no_and_change_nothing_else(train: Rows) -> None:
    num_pairs = 0
    for index, (scene, questions) in enumerate(train):
        paired_scene, paired = scenes.questions_at(SEED, "train", index, Mix(yes_no_pairs=True))
        asked = [k for k, question in enumerate(paired) if question.kind == "yes/no"]
        num_pairs += len(asked) // 2
        assert paired_scene == scene
        assert [question for k, question in enumerate(paired) if k not in asked[1:]] == questions
        assert asked in ([], [asked[0], asked[0] + 1] if asked else [])
        assert sorted(paired[k].answer for k in asked) in ([], ["no", "yes"])
    assert num_pairs > NUM_TRAIN / 2


@settings(deadline=None, max_examples=300)
@given(index=st.integers(0, 10**9), draw=st.integers())
def test_a_counterpart_is_told_truly_and_is_near(index: int, draw: int) -> None:
    scene, rng = scenes.scene_at(SEED, "train", index)
    question = scenes.ask_yes_no(rng, scene)
    other = scenes.counterpart(random.Random(draw), scene, question)
    assert {other.answer} == true_answers(other.text, scene)
    assert other.answer != question.answer
    assert question.about is not None
    assert other.about is not None
    (color, shape), (other_color, other_shape) = question.about, other.about
    assert (color == "") == (other_color == "")
    assert (shape == "shape") == (other_shape == "shape")
    # What is not in the scene may share nothing with what is.
    near = (color == other_color) != (shape == other_shape)
    assert near or (
        other.answer == "yes" and not {color, shape} & {x for s in scene.shapes for x in (s.color, s.shape)}
    )


def test_most_counterparts_that_are_not_there_ask_for_what_is_there_but_not_together(train: Rows) -> None:
    bound = []
    for index, (scene, _) in enumerate(train):
        asked = [q for q in scenes.questions_at(SEED, "train", index, Mix(yes_no_pairs=True))[1] if q.about]
        colors, shapes = {shape.color for shape in scene.shapes}, {shape.shape for shape in scene.shapes}
        if asked and asked[1].answer == "no" and len(colors) == len(shapes) == len(scene.shapes) > 1:
            color, shape = asked[1].about or ("", "")
            if color and shape != "shape":
                bound.append(color in colors and shape in shapes)
    assert len(bound) > 200
    assert 0.5 < sum(bound) / len(bound) < 0.75


def test_a_yes_or_no_hardly_asks_what_belongs_together_unless_it_is_a_counterpart(train: Rows, held_out: Rows) -> None:
    def share_right(rows: Rows) -> float:
        """Of a guesser who looks for the colour and for the shape anywhere in the scene."""
        right = []
        for scene, questions in rows:
            for question in questions:
                color, shape = question.about or ("", "")
                if color and shape != "shape":
                    seen = color in {s.color for s in scene.shapes} and shape in {s.shape for s in scene.shapes}
                    right.append((question.answer == "yes") == seen)
        assert len(right) > 500
        return sum(right) / len(right)

    paired = [scenes.questions_at(SEED, "train", k, Mix(yes_no_pairs=True)) for k in range(NUM_TRAIN)]
    assert share_right(held_out) > 0.97
    assert share_right(train) > 0.97
    assert share_right(paired) < 0.93


def test_only_a_yes_no_question_has_a_counterpart() -> None:
    scene, _ = scenes.scene_at(SEED, "train", 0)
    with pytest.raises(ValueError, match=re.escape("only a yes/no question has a counterpart, not 'How many?'")):
        scenes.counterpart(random.Random(0), scene, Question("count", "How many?", "one"))


# --------------------------------------------------------------------------------------------- split


def test_no_layout_is_in_both_splits_whatever_the_seed(train: Rows, held_out: Rows) -> None:
    others = {scenes.questions_at(SEED + 1, "train", index)[0].layout_digest for index in range(1000)}
    trained = {scene.layout_digest for scene, _ in train} | others
    asked = {scene.layout_digest for scene, _ in held_out}
    assert len(trained) > 3000
    assert len(asked) > 3000
    assert not trained & asked


# --------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_is_in_the_vsft_format(split: Split) -> None:
    for index in range(30):
        _, questions = scenes.questions_at(SEED, split, index)
        row = scenes.record(SEED, split, index)
        expected = []
        for number, question in enumerate(questions):
            asked = {"index": None, "text": question.text, "type": "text"}
            if number == 0:
                asked["text"] = "\n" + question.text
            image = [{"index": 0, "text": None, "type": "image"}] if number == 0 else []
            answered = {"index": None, "text": question.answer, "type": "text"}
            expected += [{"role": "user", "content": [*image, asked]}, {"role": "assistant", "content": [answered]}]
        assert set(row) == {"id", "messages", "images", "kinds"}
        assert row["messages"] == expected
        assert row["kinds"] == [question.kind for question in questions]
        (picture,) = row["images"]
        assert isinstance(picture, Image.Image)
        assert (picture.mode, picture.size) == ("RGB", (scenes.PICTURE_SIZE, scenes.PICTURE_SIZE))


def test_a_training_row_is_a_conversation_of_different_kinds(train: Rows) -> None:
    for _, questions in train:
        kinds = [question.kind for question in questions]
        assert 1 <= len(kinds) == len(set(kinds)) <= 5


def test_captions_come_last_in_every_other_training_row(train: Rows) -> None:
    for index, (_, questions) in enumerate(train):
        kinds = [question.kind for question in questions]
        assert "caption" not in kinds[:-1]
        assert (kinds[-1] == "caption") == (index % 2 == 0)


def test_a_test_row_asks_one_question_and_the_kinds_take_turns(held_out: Rows) -> None:
    assert [[question.kind for question in questions] for _, questions in held_out[:12]] == [
        [kind] for kind in KINDS * 2
    ]


# --------------------------------------------------------------------------------------------- blind chance


def test_every_kind_has_its_blind_rate() -> None:
    answers = {"color": COLORS, "shape": SHAPES, "count": COUNTS, "yes/no": "yn", "place": PLACES, "size": SIZES}
    assert {kind: 1 / len(answers[kind]) for kind in KINDS} == BLIND_RATE


@pytest.mark.parametrize("kind", KINDS)
def test_who_never_looks_does_no_better_than_chance(kind: str, train: Rows, held_out: Rows) -> None:
    guesser = BlindGuesser((q.kind, q.text, q.answer) for _, questions in train for q in questions)
    asked = [questions[0] for _, questions in held_out if questions[0].kind == kind]
    assert len(asked) == NUM_TEST // len(KINDS)
    rate = sum(guesser.answer(q.kind, q.text) == q.answer for q in asked) / len(asked)
    margin = 3 * math.sqrt(BLIND_RATE[kind] * (1 - BLIND_RATE[kind]) / len(asked))
    assert rate <= BLIND_RATE[kind] + margin


@pytest.mark.parametrize("kind", KINDS)
def test_who_guesses_with_hindsight_gains_little_over_chance(kind: str, train: Rows) -> None:
    """The most frequent answer to each form of question, counted on the very questions it is scored on."""
    asked = [q for _, questions in train for q in questions if q.kind == kind]
    forms: dict[str, Counter[str]] = {}
    for question in asked:
        forms.setdefault(form_of(question.text), Counter())[question.answer] += 1
    rate = sum(max(answers.values()) for answers in forms.values()) / len(asked)
    assert rate <= BLIND_RATE[kind] + 0.05


def form_of(text: str) -> str:
    """The question with what it names left out."""
    return re.sub("|".join(sorted((*COLORS, *SHAPES, *PLACES), key=len, reverse=True)), "_", text)


# --------------------------------------------------------------------------------------------- truth


def meant(noun: str, scene: Scene) -> list[Shape]:
    """The shapes that ``circle``, ``red circle``, ``red shape`` or ``shape at the top left`` may mean."""
    noun, _, place = noun.partition(" at the ")
    *color, name = noun.split()
    return [
        shape
        for shape in scene.shapes
        if name in ("shape", shape.shape) and color in ([], [shape.color]) and place in ("", shape.place)
    ]


def true_answers(question: str, scene: Scene) -> set[str]:
    """What is true of the scene, read off the question's words alone."""
    for pattern, attribute in (
        (r"What color is the (.+)\?", "color"),
        (r"What is the color of the (.+)\?", "color"),
        (r"What is the (.+ shape)\?", "shape"),
        (r"Where is the (.+)\?", "place"),
        (r"Is the (.+) small or large\?", "size"),
    ):
        if found := re.fullmatch(pattern, question):
            return {getattr(shape, attribute) for shape in only(meant(found[1], scene))}
    if found := re.fullmatch(r"What shape is at the (.+)\?", question):
        return {shape.shape for shape in only(meant(f"shape at the {found[1]}", scene))}
    if found := re.fullmatch(r"What shape is (\w+)\?", question):
        return {shape.shape for shape in only(meant(f"{found[1]} shape", scene))}
    if found := re.fullmatch(r"Is there a (.+?)(?: in the picture)?\?", question):
        return {"yes" if meant(found[1], scene) else "no"}
    if question in ("How many shapes are there?", "How many shapes are in the picture?"):
        return {{1: "one", 2: "two", 3: "three"}[len(scene.shapes)]}
    assert question in ("Describe the picture.", "What is in the picture?")
    in_order = sorted(scene.shapes, key=lambda shape: (round(shape.y * 3 - 0.5), round(shape.x * 3 - 0.5)))
    return {" and ".join(f"a {s.size} {s.color} {s.shape} at the {s.place}" for s in in_order)}


def only(shapes: list[Shape]) -> list[Shape]:
    """What a question names must be one shape."""
    assert len(shapes) == 1
    return shapes


def test_every_answer_is_true_of_its_scene(train: Rows, held_out: Rows) -> None:
    for scene, questions in (*train, *held_out):
        for question in questions:
            assert true_answers(question.text, scene) == {question.answer}, (question, scene.caption)


def test_places_and_sizes_are_what_they_are_called(train: Rows) -> None:
    for scene, _ in train:
        places = [shape.place for shape in scene.shapes]
        assert 1 <= len(places) == len(set(places)) <= 3
        for shape in scene.shapes:
            row, column = divmod(PLACES.index(shape.place), 3)
            assert (int(shape.y * 3), int(shape.x * 3)) == (row, column)
            assert (shape.radius > 0.125) == (shape.size == "large")


def test_the_picture_shows_every_shape_in_its_colour_at_its_place() -> None:
    for index in range(60):
        scene, _ = scenes.questions_at(SEED, "train", index)
        picture = scenes.draw(scene)
        for shape in scene.shapes:
            center = round(shape.x * picture.width), round(shape.y * picture.height)
            assert picture.getpixel(center) == COLORS[shape.color], scene.caption
        assert scene.background in (picture.getpixel((x, y)) for x in range(0, 128, 9) for y in range(0, 128, 9))


def test_a_large_shape_covers_more_than_a_small_one() -> None:
    def covered(size: str, name: str) -> int:
        radius = 0.105 if size == "small" else 0.145  # the largest small one, the smallest large one
        scene = Scene((Shape(name, "black", size, "center", 0.5, 0.5, radius),), (255, 255, 255))
        return sum(count for count, color in scenes.draw(scene).getcolors(1 << 14) or [] if color != (255, 255, 255))

    assert all(covered("large", name) > 1.5 * covered("small", name) for name in SHAPES)
