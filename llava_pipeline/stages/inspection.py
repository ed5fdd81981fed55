"""A projector's files as a process sees them that had no part in making them: ``python -m`` this module.

It reads an order from standard input and writes an ``Inspection`` to standard output, each one JSON document.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from llava_pipeline.contracts import Evaluation, Inspection
from llava_pipeline.errors import LlavaPipelineError
from llava_pipeline.spec import Frozen
from llava_pipeline.store import describe, digest_of

NUM_QUESTIONS = 3
TOLERANCE = {"float32": 0.02}  # of nats per token, and as a share of them: another batch is rounded otherwise
TOLERANCE_OF_HALF = 0.2


class Order(Frozen):
    """What is to be inspected."""

    folder: str
    evaluation: Evaluation


def inspect(order: Order) -> Inspection:
    """Load the projector as serving would, and ask it the first held-out questions again."""
    from llava_pipeline.evaluation.lines import ask_all
    from llava_pipeline.evaluation.read import Limits, stop_ids
    from llava_pipeline.model import projector
    from llava_pipeline.stages.examine import Examination, lines_of

    folder, evaluation = Path(order.folder), order.evaluation
    digest = digest_of(describe(folder))
    trained, spec = evaluation.projector, evaluation.spec
    try:
        state = projector.load(folder, trained.model)
        exam = Examination(trained.model, evaluation.held_out, spec, trained.device, trained.precision)
        projector.put(exam.llava.model, state)
        limits = Limits(spec.batch_size, spec.max_new_tokens, stop_ids(exam.llava))
        questions = exam.questions[:NUM_QUESTIONS]
        features = exam.features_of(range(1 + max(question.image for question in questions)))
        told = ask_all(exam.llava, exam.rows, questions, features, limits, False, lambda _: None)
    except LlavaPipelineError as error:
        return Inspection(problem=str(error), projector_digest=digest)
    allowed = TOLERANCE.get(trained.precision, TOLERANCE_OF_HALF)
    for now, before in zip(told, itertools.islice(lines_of(evaluation.scored), NUM_QUESTIONS), strict=False):
        if not abs(now["loss"] - before["loss"]) <= allowed * (1 + before["loss"]):
            told_ = f"{now['loss']:.4f} nats per token, {before['loss']:.4f} were recorded"
            return Inspection(problem=f"question {before['id']}: {told_}", projector_digest=digest)
    return Inspection(problem=None, projector_digest=digest)


if __name__ == "__main__":
    print(inspect(Order.model_validate_json(sys.stdin.read())).model_dump_json())
