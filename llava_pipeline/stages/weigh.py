"""Stage 7: what the gate needs besides the evaluation: the registered files seen from outside, and the champion."""

from __future__ import annotations

import logging
import subprocess
import sys

from llava_pipeline.contracts import ChampionScores, Evidence, Inspection, RecordedRun
from llava_pipeline.errors import DamagedArtifact, IncompatibleParts, NoSuchRun, WeightsMismatch
from llava_pipeline.evaluation import summary
from llava_pipeline.model import projector
from llava_pipeline.stages import inspection
from llava_pipeline.stages.examine import Examination, lines_of
from llava_pipeline.tracking import registry
from llava_pipeline.tracking.settings import Settings, load_settings

log = logging.getLogger(__name__)
NOT_TO_BE_USED = (WeightsMismatch, IncompatibleParts, DamagedArtifact, NoSuchRun)


def weigh_against_champion(run: RecordedRun) -> Evidence:
    """Read the registered files in a process of its own, and ask the champion of this moment the same questions.

    Raises:
        TrackingError: MLflow cannot be reached, or refuses.
    """
    settings = load_settings()
    champion = registry.champion(run.registered_model, settings)
    asked = None if champion is None else ask_champion(run, champion, settings)
    return Evidence(inspection=inspect_registered(run, settings), champion=asked)


def inspect_registered(run: RecordedRun, settings: Settings) -> Inspection:
    """What a fresh process says of the version's files."""
    try:
        folder = registry.download_projector(run.version, run.registered_model, settings)
    except (DamagedArtifact, NoSuchRun) as error:
        return Inspection(problem=str(error), projector_digest=None)
    order = inspection.Order(folder=str(folder), evaluation=run.evaluation)
    done = subprocess.run(
        [sys.executable, "-m", inspection.__name__], input=order.model_dump_json(), capture_output=True, text=True
    )
    try:
        return Inspection.model_validate_json(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        problem = f"a fresh process that loads it ended with code {done.returncode} and said: {last}"
        return Inspection(problem=problem, projector_digest=None)


def ask_champion(run: RecordedRun, champion: registry.Champion, settings: Settings) -> ChampionScores:
    """The champion's answers to the questions of this evaluation, against this projector's."""
    evaluation = run.evaluation
    model, own = evaluation.projector.model, evaluation.scored
    known = ChampionScores(
        version=champion.version, frozen_digest=champion.frozen_digest, projector_digest=champion.projector_digest
    )
    if champion.frozen_digest != model.frozen_digest:
        return known.model_copy(update={"problem": "the champion belongs to other frozen parts and was not asked"})
    trained = evaluation.projector
    exam = Examination(model, evaluation.held_out, evaluation.spec, trained.device, trained.precision)

    def weights() -> projector.State:
        # In this run's words: an instructed model is weighed against the aligned one that it began with, too.
        folder = registry.download_projector(champion.run_id, None, settings)
        return projector.load(folder, model, spoken_otherwise=True)

    try:
        scored = exam.ask(f"version {champion.version}, the champion", champion.projector_digest, weights, True)
    except NOT_TO_BE_USED as error:
        return known.model_copy(update={"problem": f"the champion could not be asked: {error}"})
    lines = lines_of(scored)
    score = summary.score(lines)
    return known.model_copy(update={
        "held_out_digest": scored.held_out_digest, "exact_match": score.exact_match, "likelihood": score.likelihood,
        **summary.against(lines_of(own), lines),
    })  # fmt: skip
