"""The story: a frozen language model learns to see.

    fetch backbones -> assemble & freeze -> begin afresh or go on -> validate the stream -> train the projector
        -> evaluate by generating -> record the run -> weigh against the champion -> pass the gate, promote

Values flow from left to right; each is a small frozen model of ids, digests and counts. How a stage is retried and
reused stands in ``flows/stages.py``; what it does, in ``llava_pipeline/stages/``.
"""

from __future__ import annotations

import prefect

from flows.following import STORY
from flows.hooks import HOOKS
from flows.stages import (
    assemble_and_freeze,
    evaluate_generations,
    fetch_backbones,
    find_beginning,
    pass_gate_and_promote,
    record_run,
    train_projector,
    validate_stream,
    weigh_against_champion,
)
from llava_pipeline.contracts import Verdict
from llava_pipeline.spec import RunSpec


@prefect.flow(name=STORY, **HOOKS)
def train(spec: RunSpec) -> Verdict:
    """Teach a language model to see: the projector learns, and what else the spec names."""
    backbones = fetch_backbones(spec.backbones)
    model = assemble_and_freeze(backbones, spec.model)
    beginning = find_beginning(spec, model)
    data = validate_stream(model, spec.data, spec.evaluation.max_samples)
    projector = train_projector(model, data, spec.training, beginning)
    evaluation = evaluate_generations(projector, data.held_out, spec.evaluation)
    run = record_run(spec, evaluation)
    evidence = weigh_against_champion(run)
    return pass_gate_and_promote(run, evidence)
