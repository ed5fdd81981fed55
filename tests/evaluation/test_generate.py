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
from llava_pipeline.evaluation.evaluate import Asked, answers, first_round, losses, picture_features, shuffled, stop_ids
from llava_pipeline.evaluation.generate import answer
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IGNORE_INDEX, Processor
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


def in_one_batch(llava: Llava, stops: set[int], max_new_tokens: int = MAX_NEW_TOKENS) -> list[list[int]]:
    features = tower_features(llava.model, pictures(llava))[IMAGE]
    pad = int(llava.model.config.pad_token_id)
    return answer(llava.model, prompts_of(llava), features, max_new_tokens, stops, pad)


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
    prompt = prompts_of(lively)[0]
    features = tower_features(lively.model, pictures(lively))
    found = answer(lively.model, [prompt] * NUM_PICTURES, features, MAX_NEW_TOKENS, set(), 0)
    assert len({tuple(ids) for ids in found}) > 1


def test_generating_leaves_the_model_as_it_was(lively: Llava) -> None:
    assert in_one_batch(lively, set()) == in_one_batch(lively, set())
    assert all(parameter.grad is None for parameter in lively.model.parameters())


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_questions_keep_their_places_in_batches_of_any_size(lively: Llava, batch_size: int) -> None:
    features = tower_features(lively.model, pictures(lively))
    asked = [Asked(prompt, []) for prompt in prompts_of(lively)]
    advanced: list[int] = []
    found = answers(lively, asked, IMAGE, features, batch_size, MAX_NEW_TOKENS, advanced.append)
    ends = stop_ids(lively)
    expected = [ids[:-1] if ids[-1] in ends else ids for ids in one_by_one(lively, sorted(ends))]
    assert found == [lively.processor.decode(ids) for ids in expected]
    assert sum(advanced) == len(asked)


def test_an_answer_stops_at_the_end_of_text_and_of_a_turn(llava: Llava) -> None:
    own = llava.processor
    end = own.tokenizer.eos_token_id
    assert stop_ids(llava) == {end} == {llava.model.config.eos_token_id}
    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    chatml = Processor(tokenizer, own.template, own.images, own.num_image_tokens)
    assert stop_ids(replace(llava, processor=chatml)) == {end, tokenizer.convert_tokens_to_ids("<|im_end|>")}


# --------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_losses_are_those_of_the_plain_forward(lively: Llava, batch_size: int) -> None:
    asked = [first_round(row.input_ids, row.labels) for row in encoded(lively.processor)]
    pixels = pictures(lively)
    found = losses(lively, asked, IMAGE, tower_features(lively.model, pixels), batch_size)
    for k, one in enumerate(asked):
        with torch.no_grad():
            logits = lively.model(
                input_ids=torch.tensor([one.prompt + one.truth]), pixel_values=pixels[IMAGE[k] : IMAGE[k] + 1]
            ).logits[0]
        told = logits[len(one.prompt) - 1 : -1].log_softmax(-1)
        expected = -told[range(len(one.truth)), one.truth].mean().item()
        assert found[k] == pytest.approx(expected, abs=1e-4)
    assert len({round(loss, 4) for loss in found}) == len(found)


def test_the_first_round_is_asked_as_a_prompt_and_answered_with_its_end(llava: Llava) -> None:
    processor = llava.processor
    for texts, row in zip(CONVERSATIONS, encoded(processor), strict=True):
        asked = first_round(np.asarray(row.input_ids), np.asarray(row.labels))
        assert asked.prompt == processor.prompt("\n" + texts[0])
        assert processor.decode(asked.truth) == texts[1]
        assert asked.truth[-1] == processor.tokenizer.eos_token_id
        assert [label for label in processor.encode(talk(*texts[:2])).labels if label != IGNORE_INDEX] == asked.truth


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_features_are_those_of_each_picture(llava: Llava, batch_size: int) -> None:
    advanced: list[int] = []
    found = picture_features(llava, rows_of(llava), batch_size, advanced.append)
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
