"""``training.rounds=apart``: every question of a conversation is a sample of its own, about the same picture."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from llava_pipeline.contracts import AssembledModel, Backbones, Cursor, ValidatedData
from llava_pipeline.data import scenes
from llava_pipeline.data.record import turn
from llava_pipeline.data.snapshot import Rows, open_rows
from llava_pipeline.errors import SpecError
from llava_pipeline.model.assemble import Llava, describe
from llava_pipeline.model.plan import plan
from llava_pipeline.model.processor import Message, Processor
from llava_pipeline.model.sizes import mean_per_picture, sizes_of
from llava_pipeline.spec import DataSpec, ScenesSource, TrainingSpec, load_spec
from llava_pipeline.stages import train as train_stage
from llava_pipeline.stages.validate import validate_stream
from llava_pipeline.store import open_artifact
from llava_pipeline.training.job import TOKENS
from llava_pipeline.training.pack import make_pack
from llava_pipeline.training.samples import Samples, collect
from tests.tiny import SPEC, talk

NUM_ROWS = 6
APART = TrainingSpec(max_steps=2, samples_per_step=5, device="cpu", rounds="apart", held_out_samples=4)


@pytest.fixture(scope="module")
def data(backbones: Backbones, shared: Llava) -> ValidatedData:
    model = describe(shared, backbones, SPEC.model)
    return validate_stream(model, DataSpec(source=ScenesSource(), max_samples=NUM_ROWS), 4, lambda *_: Cursor())


@pytest.fixture(scope="module")
def rows(data: ValidatedData) -> Rows:
    return open_rows(data.train.rows)


def samples_of(processor: Processor, rows: Rows, count: int = NUM_ROWS) -> Samples:
    ids, labels, image = zip(*train_stage.samples_of(processor, rows, count, "apart"), strict=True)
    return collect([torch.tensor(one) for one in ids], [torch.tensor(one) for one in labels], image)


def test_a_round_apart_is_written_as_a_held_out_question_is(processor: Processor, rows: Rows) -> None:
    _, questions = scenes.questions_at(0, "train", 0)
    samples = samples_of(processor, rows, 1)
    assert len(samples) == len(questions) > 1
    for k, question in enumerate(questions):
        alone = [turn("user", question.text, with_image=True), turn("assistant", question.answer)]
        encoded = processor.encode(alone)
        ids, labels = samples.of(k)
        assert (ids.tolist(), labels.tolist()) == (encoded.input_ids, encoded.labels)


def test_every_round_is_a_sample_about_its_conversation_s_picture(processor: Processor, rows: Rows) -> None:
    samples = samples_of(processor, rows)
    assert Counter(samples.image.tolist()) == {rows.image[k]: len(rows.questions[k]) for k in range(NUM_ROWS)}
    assert len(samples.runs) - 1 == NUM_ROWS  # they follow each other, so a step computes the picture once


def test_a_pack_of_rounds_apart_is_smaller_than_that_of_their_conversations(processor: Processor, rows: Rows) -> None:
    apart, token = samples_of(processor, rows), processor.image_token_id
    together = collect(
        [torch.tensor(one) for one in rows.input_ids], [torch.tensor(one) for one in rows.labels], rows.image
    )
    step = APART.step
    packed, whole = (make_pack(some, range(len(some)), 0, step, token) for some in (apart, together))
    assert packed.images == whole.images == rows.image
    assert len(packed.targets) == len(whole.targets)
    assert len(packed.input_ids) < len(whole.input_ids)


def test_a_conversation_of_one_round_is_left_as_it_is(processor: Processor, rows: Rows) -> None:
    one = dataclasses.replace(rows, questions=[row[:1] for row in rows.questions])
    found = list(train_stage.samples_of(processor, one, NUM_ROWS, "apart"))
    assert [ids.tolist() for ids, _, _ in found] == [ids.tolist() for ids in rows.input_ids]


def without_picture(messages: list[Message]) -> list[Message]:
    _, words = messages[0]["content"]
    return [messages[0] | {"content": [words | {"text": words["text"].strip()}]}, *messages[1:]]


def test_rounds_without_a_picture_are_asked_without_one(processor: Processor, rows: Rows) -> None:
    blind = dataclasses.replace(rows, image=[-1] * NUM_ROWS)
    found = list(train_stage.samples_of(processor, blind, NUM_ROWS, "apart"))
    asked = [(q, a) for some in zip(rows.questions, rows.answers, strict=True) for q, a in zip(*some, strict=True)]
    expected = [processor.encode(without_picture(talk(*both))).input_ids for both in asked]
    assert [ids.tolist() for ids, _, _ in found] == expected
    assert {image for _, _, image in found} == {-1}


def test_words_of_a_question_never_become_special_tokens(processor: Processor, rows: Rows) -> None:
    special = processor.tokenizer.convert_tokens_to_ids(list(processor.special_tokens))
    written = "".join(processor.special_tokens)

    def counts(question: str, answer: str) -> list[Counter[int]]:
        row = dataclasses.replace(rows, questions=[[question] * 2], answers=[[answer] * 2])
        found = train_stage.samples_of(processor, row, 1, "apart")
        return [Counter(token for token in ids.tolist() if token in special) for ids, _, _ in found]

    assert counts(f"a{written}", f"b{written}") == counts("a", "b")
    assert counts("a", "b")[1][processor.image_token_id] == processor.num_image_tokens


def test_held_out_rounds_are_apart_too(assembled: AssembledModel, data: ValidatedData, rows: Rows) -> None:
    both = data.model_copy(update={"held_out": data.train})
    job = train_stage.make_job(assembled, both, APART.model_copy(update={"held_out_samples": NUM_ROWS}))
    assert job.held_out is not None
    assert len(load_file(open_artifact(job.held_out) / TOKENS)["image"]) == sum(map(len, rows.questions))


def test_a_training_apart_counts_rounds_as_samples(assembled: AssembledModel, data: ValidatedData, rows: Rows) -> None:
    job = train_stage.make_job(assembled, data, APART)
    assert len(load_file(open_artifact(job.train) / TOKENS)["image"]) == sum(map(len, rows.questions))
    trained = train_stage.train_projector(assembled, data, APART)
    history = train_stage.read_lines(open_artifact(trained.history) / "history.jsonl")
    assert (trained.num_steps, trained.num_samples) == (2, 10)
    assert [row["num_samples"] for row in history] == [5, 5]
    assert trained.held_out_loss is not None


def planned(*overrides: str) -> tuple[int, float]:
    made = plan(load_spec("smol", ["data.source.yes_no_pairs=false", *overrides], stage="instruct"))
    return made.tokens_per_sample_estimate, made.flops_per_sample


def test_the_plan_lets_rounds_share_a_picture_where_a_step_does() -> None:
    together, apart = (planned(f"training.rounds={rounds}") for rounds in ("together", "apart"))
    assert apart[0] < together[0] / 3
    assert apart[1] < together[1] / 3
    num_image_tokens = plan(load_spec("smol")).num_image_tokens
    for override in ("samples_per_step=1", "language_model.mode=full", "lora.quantize=nf4", "step.share_picture=false"):
        tokens, _ = planned("training.rounds=apart", f"training.{override}")
        assert num_image_tokens < tokens < together[0]


@pytest.mark.parametrize(("rounds", "in_step"), [(1, 4), (5, 1), (5, 4), (5, 20), (3, 7)])
def test_the_plan_knows_that_a_step_ends_amid_a_picture(rounds: int, in_step: int) -> None:
    # A picture has more or fewer rounds than the next one, so a step begins anywhere in one.
    steps = [range(start, start + in_step) for start in range(rounds)]
    pictures = [len({sample // rounds for sample in step}) for step in steps]
    assert mean_per_picture(rounds, in_step) == pytest.approx(in_step * rounds / sum(pictures))


@pytest.mark.parametrize(("rounds", "pairs"), [("together", False), ("apart", False), ("apart", True)])
def test_the_plan_counts_the_words_of_a_pack_of_scenes(processor: Processor, rounds: str, *, pairs: bool) -> None:
    encoded, images, mix = [], [], scenes.Mix(yes_no_pairs=pairs)
    for number in range(100):
        said = [(question.text, question.answer) for question in scenes.questions_at(0, "train", number, mix)[1]]
        talks = [talk(*sum(said, ()))] if rounds == "together" else [talk(*one) for one in said]
        encoded += [processor.encode(messages) for messages in talks]
        images += [number] * len(talks)
    samples = collect([torch.tensor(e.input_ids) for e in encoded], [torch.tensor(e.labels) for e in encoded], images)
    packed = make_pack(samples, range(len(samples)), 0, APART.step, processor.image_token_id)
    words = int((packed.input_ids != processor.image_token_id).sum()) / len(samples)
    sizes = sizes_of(load_spec("pocket", [f"training.rounds={rounds}", f"data.source.yes_no_pairs={pairs}"]))
    assert sizes.tokens - sizes.image_tokens / sizes.samples_per_picture == pytest.approx(words, rel=0.1)


def test_a_template_without_questions_has_no_rounds() -> None:
    with pytest.raises(SpecError, match=r"plain writes no questions.*leave training\.rounds at together"):
        load_spec("smol", ["training.rounds=apart", "model.chat_template=plain"])


def test_pairs_of_questions_are_asked_apart_for_the_first_answer_tells_the_second() -> None:
    pairs = "data.source={kind: scenes, yes_no_pairs: true}"
    with pytest.raises(SpecError, match=r"answer before tells the next.*set training\.rounds=apart"):
        load_spec("smol", [pairs])
    assert load_spec("smol", [pairs, "training.rounds=apart"]).training.rounds == "apart"
