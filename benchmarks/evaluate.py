"""Seconds and memory of an evaluation: 500 held-out questions under every condition, and the untrained projector.

    python benchmarks/evaluate.py            # pocket and smol, a line each
    python benchmarks/evaluate.py --json     # the raw numbers, which also go to benchmarks/results/evaluate.json

Each profile is trained for 40 steps and evaluated in a process and a home of its own; then once more, where all answers
are remembered. How well it answers changes little of the time: wrong answers are generated, right ones are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine

PROFILES = ("pocket", "smol")
QUESTIONS, STEPS, SAMPLES = 500, 40, 1280


def evaluate(profile: str) -> dict[str, Any]:
    """Train a little, then evaluate twice; runs in a process of its own."""
    from llava_pipeline.contracts import Cursor
    from llava_pipeline.spec import load_spec
    from llava_pipeline.stages.assemble import assemble_and_freeze
    from llava_pipeline.stages.evaluate import evaluate_generations
    from llava_pipeline.stages.fetch import fetch_backbones
    from llava_pipeline.stages.train import train_projector
    from llava_pipeline.stages.validate import validate_stream

    changes = {"training.max_steps": STEPS, "data.max_samples": SAMPLES, "evaluation.max_samples": QUESTIONS}
    spec = load_spec(profile, [f"{key}={value}" for key, value in changes.items()])
    model = assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)
    data = validate_stream(model, spec.data, spec.evaluation.max_samples, lambda *_: Cursor())
    trained = train_projector(model, data, spec.training)
    first = evaluate_generations(trained, data.held_out, spec.evaluation)
    again = evaluate_generations(trained, data.held_out, spec.evaluation)
    return {
        "questions": first.num_questions, "seconds": round(first.seconds, 2), "seconds_again": round(again.seconds, 2),
        "seconds_asking": round(first.scored.seconds, 2),
        "peak_memory_gb": round(first.scored.peak_memory_bytes / 1e9, 2),
        "exact_match": first.right_image.exact_match, "same_answers_again": first.answers == again.answers,
    }  # fmt: skip


def in_process(profile: str) -> dict[str, Any]:
    """The same in a fresh process with an empty home."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, __file__, "--one", profile], env=os.environ | {"LLAVA_PIPELINE_HOME": home},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(evaluate(arguments.one)))
        return
    result = {"machine": machine(), "command": "python benchmarks/evaluate.py --json"}
    result |= {"profiles": {profile: in_process(profile) for profile in PROFILES}}
    (RESULTS / "evaluate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(result))
    for profile, told in {} if arguments.json else result["profiles"].items():
        print(f"{profile}: {told['seconds']} s, again {told['seconds_again']} s, {told['peak_memory_gb']} GB")


if __name__ == "__main__":
    main()
