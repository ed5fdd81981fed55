"""Batches, padding and caches change no answer and no loss: they are those of transformers' own model, one by one."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_pipeline.data.snapshot import Rows
from llava_pipeline.evaluation.features import picture_features
from llava_pipeline.evaluation.lines import ask_all
from llava_pipeline.evaluation.questions import (
    Question,
    answer_ids,
    cut,
    first_round,
    opposite_of,
    questions_of,
    shuffled,
)
from llava_pipeline.evaluation.read import Job, Limits, Told, read, stop_ids
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IGNORE_INDEX, Processor
from llava_pipeline.model.template import PLAIN
from llava_pipeline.training.features import tower_features
from tests.tiny import CONVERSATIONS, NUM_PICTURES, encoded, pictures, talk

MAX_NEW_TOKENS = 8
IMAGE = [k % NUM_PICTURES for k in range(len(CONVERSATIONS))]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def prompts_of(llava: Llava) -> list[list[int]]:
    return [llava.processor.prompt("\n" + texts[0]) for texts in CONVERSATIONS]


def one_by_one(llava: Llava, stops: list[int]) -> list[list[int]]:
    """transformers' own greedy answers, from pictures; the stop token, where one was reached, is the last."""
    out = []
    pixels = pictures(llava)
    for prompt, image in zip(prompts_of(llava), IMAGE, strict=True):
        ids = torch.tensor([prompt])
        generated = llava.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels[image : image + 1],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=stops,
            pad_token_id=llava.model.config.pad_token_id,
        )
        out.append(generated[0, len(prompt) :].tolist())
    return out


def question_of(llava: Llava, prompt: list[int], truth: tuple[int, ...] = (0,)) -> Question:
    return Question(0, *cut(prompt, llava.processor.image_token_id), truth=truth)


def told_of(
    llava: Llava, jobs: list[Job], stops: set[int], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 64
) -> list[Told]:
    features = tower_features(llava.model, pictures(llava))
    return read(llava, jobs, features, Limits(batch_size, max_new_tokens, frozenset(stops)), lambda _: None)


def in_one_batch(llava: Llava, stops: set[int], max_new_tokens: int = MAX_NEW_TOKENS) -> list[list[int]]:
    jobs = [
        Job(question_of(llava, prompt), image, True) for prompt, image in zip(prompts_of(llava), IMAGE, strict=True)
    ]
    return [list(told.answer or ()) for told in told_of(llava, jobs, stops, max_new_tokens)]


def picture_of(llava: Llava, number: int) -> Image.Image:
    side = llava.processor.images.side
    pixels = np.random.default_rng(number).integers(0, 256, (side, 2 * side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def rows_of(llava: Llava) -> Rows:
    """The conversations as an opened snapshot."""
    rows = encoded(llava.processor)
    return Rows(
        ids=[str(k) for k in range(len(rows))],
        questions=[texts[::2] for texts in CONVERSATIONS],
        answers=[texts[1::2] for texts in CONVERSATIONS],
        kinds=[["all"] * (len(texts) // 2) for texts in CONVERSATIONS],
        input_ids=[np.asarray(row.input_ids, dtype=np.int32) for row in rows],
        labels=[np.asarray(row.labels, dtype=np.int32) for row in rows],
        image=IMAGE,
        images=[png(picture_of(llava, number)) for number in range(NUM_PICTURES)],
    )


# --------------------------------------------------------------------------------------------- answers


def test_answers_of_a_batch_are_those_of_each_alone(lively: Llava) -> None:
    expected = one_by_one(lively, stops=[])
    assert len({len(prompt) for prompt in prompts_of(lively)}) >= 3
    assert len({tuple(ids) for ids in expected}) == len(expected)
    assert all(len(ids) == MAX_NEW_TOKENS for ids in expected)
    assert in_one_batch(lively, set()) == expected


def test_each_answer_ends_before_its_stop_token(lively: Llava) -> None:
    free = one_by_one(lively, stops=[])
    stops = [free[0][2], free[1][0], free[2][5]]
    expected = one_by_one(lively, stops)
    found = in_one_batch(lively, set(stops))
    assert found == [ids[:-1] if ids[-1] in stops else ids for ids in expected]
    assert not {token for ids in found for token in ids} & set(stops)
    assert len(found[0]) <= 2
    assert found[1] == []
    assert len({len(ids) for ids in found}) > 1


def test_an_answer_is_no_longer_than_allowed(lively: Llava) -> None:
    expected = one_by_one(lively, stops=[])
    assert in_one_batch(lively, set(), max_new_tokens=3) == [ids[:3] for ids in expected]


def test_the_picture_matters(lively: Llava) -> None:
    jobs = [Job(question_of(lively, prompts_of(lively)[0]), image, True) for image in range(NUM_PICTURES)]
    assert len({told.answer for told in told_of(lively, jobs, set())}) > 1


def test_a_true_answer_that_is_the_greedy_one_is_not_generated_and_comes_out_the_same(lively: Llava) -> None:
    free = one_by_one(lively, stops=[])
    stops = {free[k][3] for k in range(len(free))}
    expected = [tuple(ids[:-1]) if ids[-1] in stops else tuple(ids) for ids in one_by_one(lively, sorted(stops))]
    greedy = [(*ids, next(iter(stops))) if len(ids) == MAX_NEW_TOKENS else ids for ids in expected]
    for truths in (greedy, [(0,)] * len(free), [(*ids[:1], 5) for ids in expected]):
        jobs = [
            Job(question_of(lively, prompt, tuple(truth) or (0,)), image, True)
            for prompt, truth, image in zip(prompts_of(lively), truths, IMAGE, strict=True)
        ]
        assert [told.answer for told in told_of(lively, jobs, stops)] == expected


def test_an_answer_tells_whether_it_has_an_end(lively: Llava) -> None:
    free = one_by_one(lively, stops=[])
    stops = {free[0][2]}
    jobs = [
        Job(question_of(lively, prompt), image, True) for prompt, image in zip(prompts_of(lively), IMAGE, strict=True)
    ]
    for told in told_of(lively, jobs, stops):
        assert told.ended == (len(told.answer or ()) < MAX_NEW_TOKENS)
    assert told_of(lively, jobs, stops)[0].ended


def test_numbers_that_are_none_are_told(lively: Llava) -> None:
    jobs = [Job(question_of(lively, prompts_of(lively)[0], (7, 0)), 0, True)]
    (well,) = told_of(lively, jobs, {0})
    with torch.no_grad():
        lively.model.model.multi_modal_projector.linear_2.bias.fill_(float("nan"))
    (ill,) = told_of(lively, jobs, {0})
    assert (well.finite, ill.finite) == (True, False)
    assert ill.loss == 100.0


def test_generating_leaves_the_model_as_it_was(lively: Llava) -> None:
    assert in_one_batch(lively, set()) == in_one_batch(lively, set())
    assert all(parameter.grad is None for parameter in lively.model.parameters())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_questions_keep_their_places_in_batches_of_any_size(lively: Llava, batch_size: int) -> None:
    advanced: list[int] = []
    features = tower_features(lively.model, pictures(lively))
    ends = stop_ids(lively)
    rows = rows_of(lively)
    limits = Limits(batch_size, MAX_NEW_TOKENS, ends)
    lines = ask_all(lively, rows, questions_of(rows, lively.processor), features, limits, True, advanced.append)
    expected = [ids[:-1] if ids[-1] in ends else ids for ids in one_by_one(lively, sorted(ends))]
    assert [line["answer"] for line in lines] == [lively.processor.decode(ids) for ids in expected]
    assert [line["id"] for line in lines] == rows.ids
    assert sum(advanced) == 3 * len(lines)


def test_an_answer_stops_at_the_end_of_text_and_of_a_turn(llava: Llava) -> None:
    own = llava.processor
    end = own.tokenizer.eos_token_id
    assert stop_ids(llava) == {end} == {llava.model.config.eos_token_id}
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    chatml = Processor(tokenizer, own.template, own.images, own.num_image_tokens)
    assert stop_ids(replace(llava, processor=chatml)) == {end, tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_caption_in_the_plain_template_ends_with_its_line(llava: Llava) -> None:
    own = llava.processor
    plain = replace(llava, processor=Processor(own.tokenizer, PLAIN, own.images, own.num_image_tokens))
    line_break = own.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    assert stop_ids(plain) == {own.tokenizer.eos_token_id, line_break}


def test_a_prompt_that_ends_with_its_picture_is_answered_as_by_generate(lively: Llava) -> None:
    own = lively.processor
    plain = replace(lively, processor=Processor(own.tokenizer, PLAIN, own.images, own.num_image_tokens))
    prompt = plain.processor.prompt("What is left out")
    assert prompt[-1] == own.image_token_id
    question = question_of(plain, prompt)
    assert question.suffix == ()
    jobs = [Job(question, picture, True) for picture in (*range(NUM_PICTURES), None)]
    found = [list(told.answer or ()) for told in told_of(plain, jobs, set())]
    with torch.no_grad():
        alike = [
            lively.model.generate(
                input_ids=torch.tensor([prompt]), pixel_values=picture[None], do_sample=False, eos_token_id=None,
                max_new_tokens=MAX_NEW_TOKENS,
            )[0, len(prompt) :].tolist()
            for picture in pictures(lively)
        ]  # fmt: skip
    assert found[:-1] == alike
    assert len(found[-1]) == MAX_NEW_TOKENS


# --------------------------------------------------------------------------------------------- losses


def plain_loss(llava: Llava, prompt: list[int], truth: tuple[int, ...], picture: torch.Tensor | None) -> float:
    """Nats of an answer by transformers' own forward, one question at a time."""
    ids = torch.tensor([prompt + list(truth)])
    with torch.no_grad():
        logits = llava.model(input_ids=ids, pixel_values=picture).logits[0]
    told = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return float(-told[range(len(truth)), truth].sum())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_losses_are_those_of_the_plain_forward_under_every_condition(lively: Llava, batch_size: int) -> None:
    rows = rows_of(lively)
    questions = questions_of(rows, lively.processor)
    pixels = pictures(lively)
    others = shuffled(rows.image, NUM_PICTURES)
    limits = Limits(batch_size, MAX_NEW_TOKENS, stop_ids(lively))
    features = tower_features(lively.model, pixels)
    lines = ask_all(lively, rows, questions, features, limits, True, lambda _: None)
    image_token = lively.processor.image_token_id
    for k, (question, line) in enumerate(zip(questions, lines, strict=True)):
        prompt = [*question.prefix, *question.suffix]
        bare = [token for token in prompt if token != image_token]
        count = len(question.truth)
        for name, expected in {
            "loss": plain_loss(lively, prompt, question.truth, pixels[IMAGE[k] : IMAGE[k] + 1]),
            "loss_shuffled": plain_loss(lively, prompt, question.truth, pixels[others[k] : others[k] + 1]),
            "loss_no_image": plain_loss(lively, bare, question.truth, None),
        }.items():
            assert line[name] == pytest.approx(expected / count, abs=1e-4), name
    assert len({round(line["loss"], 4) for line in lines}) == len(lines)


def test_yes_and_no_are_weighed_as_whole_answers(lively: Llava) -> None:
    rows = rows_of(lively)
    questions = questions_of(rows, lively.processor)
    pixels = pictures(lively)
    limits = Limits(2, MAX_NEW_TOKENS, stop_ids(lively))
    lines = ask_all(lively, rows, questions, tower_features(lively.model, pixels), limits, False, lambda _: None)
    asked = [k for k, line in enumerate(lines) if "nats_over_opposite" in line]
    assert [rows.answers[k][0] for k in asked] == ["yes"]
    for k in asked:
        question = questions[k]
        assert question.truth == answer_ids(lively.processor, "yes")
        assert question.opposite == answer_ids(lively.processor, "no")
        prompt = [*question.prefix, *question.suffix]
        picture = pixels[IMAGE[k] : IMAGE[k] + 1]
        yes, no = (plain_loss(lively, prompt, ids, picture) for ids in (question.truth, question.opposite))
        assert lines[k]["nats_over_opposite"] == pytest.approx(no - yes, abs=1e-3)


@pytest.mark.parametrize(
    ("answer", "other"), [("yes", "no"), ("No", "Yes"), ("Yes.", "No."), ("NO", "YES"), ("red", None), ("no way", None)]
)
def test_the_opposite_is_written_as_the_answer_is(answer: str, other: str | None) -> None:
    assert opposite_of(answer) == other


def test_the_first_round_is_asked_as_a_prompt_and_answered_with_its_end(llava: Llava) -> None:
    processor = llava.processor
    for texts, row in zip(CONVERSATIONS, encoded(processor), strict=True):
        prompt, truth = first_round(np.asarray(row.input_ids), np.asarray(row.labels))
        assert prompt == processor.prompt("\n" + texts[0])
        assert processor.decode(truth) == texts[1]
        assert truth[-1] == processor.tokenizer.eos_token_id
        assert [label for label in processor.encode(talk(*texts[:2])).labels if label != IGNORE_INDEX] == truth


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_features_are_those_of_each_picture(llava: Llava, batch_size: int) -> None:
    advanced: list[int] = []
    found = picture_features(llava, rows_of(llava), range(NUM_PICTURES), batch_size, advanced.append)
    processor = llava.processor
    for number in range(NUM_PICTURES):
        pixels = torch.from_numpy(processor.resize(picture_of(llava, number)).copy())
        expected = tower_features(llava.model, processor.normalise(pixels[None]))[0]
        torch.testing.assert_close(found[number], expected, rtol=1e-4, atol=1e-5)
    assert found.shape == (NUM_PICTURES, processor.num_image_tokens, llava.model.config.vision_config.hidden_size)
    assert sum(advanced) == NUM_PICTURES


def test_a_shuffled_picture_is_never_ones_own(llava: Llava) -> None:
    rows = replace(rows_of(llava), image=[0, 0, 1, 2, 2])
    other = shuffled(rows.image, NUM_PICTURES)
    assert all(theirs != own for theirs, own in zip(other, rows.image, strict=True))
    assert (other[0], other[3]) == (other[1], other[4])
