"""Stage 5: the trained projector answers held-out questions with the right picture, another's and none; the untrained
one answers them too."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from llava_pipeline.contracts import AskedQuestion, Evaluation, Snapshot, TrainedProjector
from llava_pipeline.data.picture import load_picture
from llava_pipeline.data.snapshot import Rows, open_rows
from llava_pipeline.errors import PictureRefused
from llava_pipeline.evaluation import summary
from llava_pipeline.evaluation.ask import ask
from llava_pipeline.evaluation.lines import Line
from llava_pipeline.evaluation.pictures import Shown, save_grid, save_grounding, save_loss_curve
from llava_pipeline.evaluation.samples import save_golden, save_samples
from llava_pipeline.evaluation.score import BlindGuesser, by_kind, exact_match, mean
from llava_pipeline.model import projector
from llava_pipeline.spec import EvaluationSpec
from llava_pipeline.stages.examine import Examination, examined, lines_of
from llava_pipeline.store import open_artifact, writing

log = logging.getLogger(__name__)


def evaluate_generations(trained: TrainedProjector, held_out: Snapshot, spec: EvaluationSpec) -> Evaluation:
    """Ask everything, score it, and keep every answer beside its score."""
    started = time.monotonic()
    exam = Examination(trained.model, held_out, spec, trained.device, trained.precision)
    scored = exam.ask(
        "the projector", trained.projector.digest,
        lambda: projector.load(open_artifact(trained.projector), trained.model), controls=True,
    )  # fmt: skip
    before = exam.ask("the untrained projector", exam.untrained_digest, exam.untrained, controls=False)
    lines, untrained = lines_of(scored), lines_of(before)
    blind = blind_scores(exam.rows, open_rows(trained.data.rows))
    asked: tuple[AskedQuestion, ...] = ()
    with writing("answers") as (folder, done):
        together = [_together(line, other) for line, other in zip(lines, untrained, strict=True)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in together), encoding="utf-8")
        save_pictures(folder, exam.rows, together, trained, spec)
        save_samples(folder / "samples", exam.rows, together)
        save_golden(folder / "golden", exam.rows, together)
        asked = ask_own_picture(exam, trained, spec, folder / "asked.png")
    return Evaluation(
        **examined(held_out, scored), projector=trained, spec=spec, answers=done[0],
        untrained=summary.score(untrained), over_untrained=summary.gain(lines, untrained), blind_rate=blind[0],
        blind_by_kind=blind[1], short_share=summary.short_share(lines), asked=asked,
        seconds=time.monotonic() - started,
    )  # fmt: skip


def _together(line: Line, untrained: Line) -> dict[str, Any]:
    """A question with its truth and all that was answered."""
    correct = exact_match([line["answer"]], [line["truth"]])[0]
    return line | {
        "correct": correct, "likelihood": summary.likelihood(line["loss"]),
        "answer_untrained": untrained["answer"], "loss_untrained": untrained["loss"],
    }  # fmt: skip


def save_pictures(folder: Path, rows: Rows, lines: list[Line], trained: TrainedProjector, spec: EvaluationSpec) -> None:
    """What people look at: held-out pictures with their answers, both curves, and one picture to ask about."""
    hits, shuffled = (mean(summary.hits_of(lines, suffix)) for suffix in ("", "_shuffled"))
    title = f"held out: {hits:.1%} right, {shuffled:.1%} with other pictures"
    save_grid(shown(rows, lines, spec.num_pictures), title, folder / "grid.png")
    save_loss_curve(train_losses(trained), folder / "loss.png")
    bars = {
        "right picture": summary.likely(lines).likelihood_by_kind,
        "shuffled": summary.likely(lines, "_shuffled").likelihood_by_kind,
        "no picture": summary.likely(lines, "_no_image").likelihood_by_kind,
        "untrained": summary.likely(lines, "_untrained").likelihood_by_kind,
    }
    save_grounding(bars, folder / "grounding.png")
    rows.picture(rows.image[0]).save(folder / "example.png")


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
    exam: Examination, trained: TrainedProjector, spec: EvaluationSpec, kept: Path
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
    projector.put(exam.llava.model, projector.load(open_artifact(trained.projector), trained.model))
    return tuple(
        AskedQuestion(question=question, answer=ask(exam.llava, picture, question, spec.max_new_tokens))
        for question in spec.ask
    )


def shown(rows: Rows, lines: list[Line], count: int) -> list[Shown]:
    """Cells for the grid: the first questions of the held-out set, good or bad."""
    return [
        Shown(rows.picture(line["image"]), line["question"], line["answer"], line["truth"], line["correct"])
        for line in lines[:count]
    ]


def train_losses(trained: TrainedProjector) -> list[float]:
    """Loss of every step, from the history artifact."""
    lines = (open_artifact(trained.history) / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]) for line in lines]
