"""What it saves to compute a picture once for all questions about it that stand side by side.

    python benchmarks/share_picture.py --json      # 30 layers of SmolLM2-135M's shapes, random weights; three minutes

easy-VQA's own training questions, each a sample by itself, as `data.source.questions_per_image=1` gives them: those of
four pictures are a step. Both arms are in one process and take turns; loss and gradients are compared before anything
is timed. More tokens a picture come from larger pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine
from benchmarks.recompute import SHAPE, Ones
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones, Cursor
from llava_pipeline.data.sources.easy_vqa import EasyVqaReader
from llava_pipeline.model.assemble import Llava, assemble
from llava_pipeline.model.freeze import learned, let_learn
from llava_pipeline.model.tower import feature_width
from llava_pipeline.spec import EasyVqaSource, PartSpec, StepSpec, TrainingSpec, load_spec
from llava_pipeline.training.device import place
from llava_pipeline.training.pack import make_pack
from llava_pipeline.training.samples import Samples, collect
from llava_pipeline.training.step import PackedStep

SIDES, MODES, NUM_PICTURES, ROUNDS = (64, 112), ("frozen", "lora"), 4, 3
MAX_LOSS_ERROR, MAX_GRADIENT_ERROR = 1e-5, 1e-3


def questions(llava: Llava) -> Samples:
    """Every question about the first pictures, a sample each."""
    reader = EasyVqaReader(EasyVqaSource(questions_per_image=1), "train", 0)
    rows = itertools.chain.from_iterable(map(reader.rows, reader.pieces(Cursor())))
    names: list[str] = []
    encoded = []
    for row in rows:
        name = row["id"].rsplit("/", 1)[0]
        if name not in names:
            if len(names) == NUM_PICTURES:
                break
            names.append(name)
        encoded.append((llava.processor.encode(row["messages"]), names.index(name)))
    ids, labels = ([torch.tensor(getattr(one, key)) for one, _ in encoded] for key in ("input_ids", "labels"))
    return collect(ids, labels, [image for _, image in encoded])


def once(step: PackedStep, parameters: list[Tensor]) -> tuple[float, float, list[Tensor]]:
    """Seconds, loss and gradients of a step."""
    started = time.perf_counter()
    loss = step.loss(range(len(step.samples)))
    gradients = torch.autograd.grad(loss, parameters)
    return time.perf_counter() - started, loss.item(), list(gradients)


def arm(side: int, mode: str) -> dict[str, object]:
    """Both ways in turns."""
    tower = f"backbones.vision_tower={{kind: random, like: pocket/vision_tower, overrides: {{image_size: {side}}}}}"
    parts = load_spec("pocket", [SHAPE, tower])
    backbones = Backbones(
        vision_tower=fetch(parts.backbones.vision_tower, None, 0),
        language_model=fetch(parts.backbones.language_model, None, 0),
    )
    llava = assemble(backbones, parts.model)
    spec = TrainingSpec(max_steps=1, language_model=PartSpec(mode=mode))
    place(llava.model, torch.device("cpu"), torch.float32)
    let_learn(llava.model, spec)
    parameters = list(learned(llava.model, spec).values())
    with torch.no_grad():  # what begins at zero would have no gradient behind it
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    samples, places = questions(llava), int(llava.model.config.image_seq_length)
    features = Ones((places, feature_width(llava.model.config)))
    steps = [
        PackedStep(llava.model, samples, features, torch.float32, StepSpec(share_picture=share))
        for share in (True, False)
    ]
    tokens = [
        len(make_pack(samples, range(len(samples)), step.num_prefix, step.spec, step.shares).input_ids)
        for step in steps
    ]
    (_, ours, one), (_, apart, other) = (once(step, parameters) for step in steps)
    loss_error = abs(ours - apart) / apart
    gradient_error = max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))
    if loss_error > MAX_LOSS_ERROR or gradient_error > MAX_GRADIENT_ERROR:
        sys.exit(f"not the same step: the loss is off by {loss_error:.1e}, a gradient by {gradient_error:.1e}")
    seconds = [[once(step, parameters)[0] for step in steps] for _ in range(ROUNDS)]
    shared, alone = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "image_tokens": places, "learns": mode, "questions": len(samples), "tokens_shared": tokens[0],
        "tokens_apart": tokens[1], "seconds_shared": round(shared, 3), "seconds_apart": round(alone, 3),
        "ratio": round(statistics.median(b / a for a, b in seconds), 2),
        "lowest_round": round(min(b / a for a, b in seconds), 2),
        "loss_error": loss_error, "gradient_error": gradient_error,
    }  # fmt: skip


def main() -> None:
    """All sizes, projector alone and with a LoRA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/share-picture.json")
    asked = parser.parse_args()
    arms = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["LLAVA_PIPELINE_HOME"] = home
        for side, mode in itertools.product(SIDES, MODES):
            arms.append(arm(side, mode))
            print(arms[-1], flush=True)
    if asked.json:
        told = {"machine": machine(), "pictures": NUM_PICTURES, "rounds": ROUNDS, "arms": arms}
        (RESULTS / "share-picture.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
