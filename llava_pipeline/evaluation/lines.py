"""A held-out set put to one projector: one line per question, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llava_pipeline.data.snapshot import Rows
from llava_pipeline.evaluation.questions import Advance, Question, shuffled
from llava_pipeline.evaluation.read import Job, Limits, Told, read
from llava_pipeline.evaluation.texts import chrf_and_rouge, is_short, repeats
from llava_pipeline.model.assemble import Llava

Line = dict[str, Any]
CONDITIONS_OF_CONTROLS = 3  # right, shuffled, and no picture


def num_jobs(questions: Sequence[Question], controls: bool) -> int:
    """How many times something is asked."""
    return len(questions) * (CONDITIONS_OF_CONTROLS if controls else 1)


def ask_all(
    llava: Llava, rows: Rows, questions: Sequence[Question], features: torch.Tensor, limits: Limits, controls: bool,
    advance: Advance,
) -> list[Line]:  # fmt: skip
    """One line per question: what the model says about the right picture and how likely the truth is to it.

    With ``controls``, about a shuffled picture too, and how likely the truth is without any.
    """
    jobs = [Job(question, question.image, True) for question in questions]
    if controls:
        others = shuffled([question.image for question in questions], len(rows.images))
        jobs += [Job(question, other, True) for question, other in zip(questions, others, strict=True)]
        jobs += [Job(question, None, False) for question in questions]
    told = read(llava, jobs, features, limits, advance)
    count = len(questions)
    lines = [_line(llava, rows, k, questions[k], told[k]) for k in range(count)]
    if controls:
        for k, line in enumerate(lines):
            other, none = told[count + k], told[2 * count + k]
            line |= {
                "answer_shuffled": llava.processor.decode(list(other.answer or ())), "loss_shuffled": other.loss,
                "loss_no_image": none.loss, "finite": line["finite"] and other.finite and none.finite,
            }  # fmt: skip
    _compare_long_answers(lines)
    return lines


def _line(llava: Llava, rows: Rows, k: int, question: Question, told: Told) -> Line:
    ids = list(told.answer or ())
    return {
        "id": rows.ids[k], "image": question.image, "kind": rows.kinds[k][0], "question": rows.questions[k][0],
        "truth": rows.answers[k][0], "num_truth_tokens": len(question.truth), "answer": llava.processor.decode(ids),
        "num_tokens": len(ids), "ended": told.ended, "repeats": repeats(ids), "finite": told.finite,
        "loss": told.loss,
    } | ({} if told.nats_over_opposite is None else {"nats_over_opposite": told.nats_over_opposite})  # fmt: skip


def _compare_long_answers(lines: list[Line]) -> None:
    long = [line for line in lines if not is_short(line["truth"])]
    both = chrf_and_rouge([line["answer"] for line in long], [line["truth"] for line in long])
    for line, (chrf, rouge) in zip(long, both, strict=True):
        line |= {"chrf": chrf, "rouge_l": rouge}
