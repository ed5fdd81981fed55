"""Stage 5: the trained model answers held-out questions, with the right picture, another's, and untrained."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from llava_pipeline.contracts import AskedQuestion, Evaluation, Score, Snapshot, TrainedProjector
from llava_pipeline.data.picture import load_picture
from llava_pipeline.data.snapshot import Rows, open_rows
from llava_pipeline.errors import PictureRefused
from llava_pipeline.evaluation.ask import ask
from llava_pipeline.evaluation.evaluate import answers, first_round, losses, picture_features, shuffled
from llava_pipeline.evaluation.pictures import Shown, save_grid, save_loss_curve
from llava_pipeline.evaluation.score import BlindGuesser, by_kind, exact_match, mean
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava, load
from llava_pipeline.progress import bar
from llava_pipeline.spec import EvaluationSpec
from llava_pipeline.store import open_artifact, writing
from llava_pipeline.training.device import choose_device, place

log = logging.getLogger(__name__)


def evaluate_generations(trained: TrainedProjector, held_out: Snapshot, spec: EvaluationSpec) -> Evaluation:
    """Ask everything three times, score it, and keep every answer beside its score."""
    started = time.monotonic()
    llava = load(trained.model)
    untrained = projector.state_of(llava.model)
    device = choose_device("auto" if not trained.device.startswith("cpu") else "cpu")
    place(llava.model, device, getattr(torch, trained.precision))
    rows = open_rows(held_out.rows)
    conditions = ask_all(llava, rows, trained, untrained, spec)
    scores = {name: score(rows, given) for name, given in conditions.items()}
    blind = blind_scores(rows, open_rows(trained.data.rows))
    with writing("answers") as (folder, done):
        lines = answer_lines(rows, conditions)
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        right, shuffled_ = scores["right"].exact_match, scores["shuffled"].exact_match
        title = f"held out: {right:.1%} right, {shuffled_:.1%} with other pictures"
        save_grid(shown(rows, conditions["right"]["answers"], spec.num_pictures), title, folder / "grid.png")
        save_loss_curve(train_losses(trained), folder / "loss.png")
        rows.picture(rows.image[0]).save(folder / "example.png")
        asked = ask_own_picture(llava, trained, spec, folder / "asked.png")
    return Evaluation(
        projector=trained, answers=done[0], num_questions=len(rows), held_out=held_out,
        right_image=scores["right"], shuffled_image=scores["shuffled"], untrained=scores["untrained"],
        blind_rate=blind[0], blind_by_kind=blind[1], asked=asked, seconds=time.monotonic() - started,
    )  # fmt: skip


def ask_all(
    llava: Llava, rows: Rows, trained: TrainedProjector, untrained: projector.State, spec: EvaluationSpec
) -> dict[str, dict[str, Any]]:
    """Answers (and losses) of each condition."""
    asked = [first_round(ids, labels) for ids, labels in zip(rows.input_ids, rows.labels, strict=True)]
    state = projector.load(open_artifact(trained.projector), trained.model)
    others = shuffled(rows.image, len(rows.images))
    with bar("evaluate", len(rows.images) + 3 * len(rows)) as advance:
        features = picture_features(llava, rows, spec.batch_size, advance)

        def ask(weights: projector.State, image: list[int], with_loss: bool) -> dict[str, Any]:
            projector.put(llava.model, weights)
            told = answers(llava, asked, image, features, spec.batch_size, spec.max_new_tokens, advance)
            loss = losses(llava, asked, image, features, spec.batch_size) if with_loss else None
            return {"answers": told, "losses": loss, "asked": asked}

        return {
            "right": ask(state, rows.image, True),
            "shuffled": ask(state, others, True),
            "untrained": ask(untrained, rows.image, False),
        }


def score(rows: Rows, given: dict[str, Any]) -> Score:
    """One condition's scores; the loss is a mean over answer tokens, as in training."""
    hits = exact_match(given["answers"], [answer[0] for answer in rows.answers])
    loss = None
    if given["losses"] is not None:
        tokens = [len(one.truth) for one in given["asked"]]
        loss = sum(x * n for x, n in zip(given["losses"], tokens, strict=True)) / sum(tokens)
    return Score(exact_match=mean(hits), by_kind=by_kind(hits, [kinds[0] for kinds in rows.kinds]), loss=loss)


def blind_scores(held_out: Rows, train: Rows) -> tuple[float, dict[str, float]]:
    """What the best guess per question text, learned on the training rows, reaches without looking."""
    rounds = [
        one
        for k, q, a in zip(train.kinds, train.questions, train.answers, strict=True)
        for one in zip(k, q, a, strict=True)
    ]
    guesser = BlindGuesser(rounds)
    kinds = [kinds[0] for kinds in held_out.kinds]
    guesses = [guesser.answer(kind, questions[0]) for kind, questions in zip(kinds, held_out.questions, strict=True)]
    hits = exact_match(guesses, [answers[0] for answers in held_out.answers])
    return mean(hits), by_kind(hits, kinds)


def ask_own_picture(
    llava: Llava, trained: TrainedProjector, spec: EvaluationSpec, kept: Path
) -> tuple[AskedQuestion, ...]:
    """The spec's questions about the spec's picture, as the seed asks its Mona Lisa; the picture is kept.

    A picture that cannot be had is told and costs nothing else: a training run is worth more.
    """
    if spec.picture is None or not spec.ask:
        return ()
    try:
        picture = load_picture(spec.picture)
    except PictureRefused as refused:
        log.warning("evaluation.ask is left out: %s", refused)
        return ()
    picture.save(kept)
    projector.put(llava.model, projector.load(open_artifact(trained.projector), trained.model))
    return tuple(
        AskedQuestion(question=question, answer=ask(llava, picture, question, spec.max_new_tokens))
        for question in spec.ask
    )


def answer_lines(rows: Rows, conditions: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every question with its truth and all that was answered."""
    return [
        {
            "id": rows.ids[k], "kind": rows.kinds[k][0], "question": rows.questions[k][0], "truth": rows.answers[k][0],
            "answer": conditions["right"]["answers"][k], "answer_shuffled": conditions["shuffled"]["answers"][k],
            "answer_untrained": conditions["untrained"]["answers"][k], "loss": conditions["right"]["losses"][k],
            "loss_shuffled": conditions["shuffled"]["losses"][k],
        }
        for k in range(len(rows))
    ]  # fmt: skip


def shown(rows: Rows, told: list[str], count: int) -> list[Shown]:
    """Cells for the grid: the first questions of the held-out set, good or bad."""
    hits = exact_match(told, [answer[0] for answer in rows.answers])
    return [
        Shown(rows.picture(rows.image[k]), rows.questions[k][0], told[k], rows.answers[k][0], hits[k])
        for k in range(min(count, len(rows)))
    ]


def train_losses(trained: TrainedProjector) -> list[float]:
    """Loss of every step, from the history artifact."""
    lines = (open_artifact(trained.history) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]) for line in lines]
