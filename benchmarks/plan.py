"""What `plan` says against what a training takes: peak memory, and seconds of a step.

    python -m benchmarks.plan --json               # every setting, about six minutes on 2 CPU cores
    python -m benchmarks.plan --only pocket wide    # some of them

Each setting is planned from its configurations alone, in a process that has read none of its weights. Then the real
training process runs a few steps of it, and its own peak and the median of its steps are compared with that. What
a layer takes, from which times are told, is measured right before every training and right after it, and the mean is
compared: a machine that others use as well changes its speed from minute to minute. For the same reason seconds are the
processor's own, of one thread; those of the clock on the wall stand beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine
from llava_pipeline.contracts import Cursor
from llava_pipeline.model import speed
from llava_pipeline.model.plan import plan
from llava_pipeline.spec import RunSpec, load_spec
from llava_pipeline.stages.assemble import assemble_and_freeze
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.stages.train import train_projector
from llava_pipeline.stages.validate import validate_stream

RESULT = RESULTS / "plan.json"
WITHIN = 0.15
TOWER = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
LORA, FULL, AGAIN = (
    "training.language_model={mode: lora}", "training.language_model={mode: full}", "training.step={recompute: true}"
)  # fmt: skip


def random(part: str, **sizes: int) -> str:
    """A part of `pocket` with random weights and other sizes."""
    told = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    return f"backbones.{part}={{kind: random, like: pocket/{part}, overrides: {{{told}}}}}"


def llama(width: int, inner: int, layers: int, heads: int, shared: int) -> str:
    """A Llama of these sizes."""
    return random(
        "language_model", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, head_dim=64,
    )  # fmt: skip


def few(steps: int, per: int) -> list[str]:
    """A short training."""
    return [
        f"data.max_samples={steps * per}", f"training.max_steps={steps}", f"training.samples_per_step={per}",
        "evaluation.max_samples=16", "training.held_out_samples=16",
    ]  # fmt: skip


def settings() -> dict[str, RunSpec]:
    """By name: changes to `pocket`, and the second stage of `smol` as it is but for its number of steps."""
    smol = llama(576, 1536, 30, 9, 3)  # the layers of SmolLM2-135M
    wide, deep = llama(512, 1536, 10, 8, 4), llama(1024, 2816, 8, 16, 4)  # 32 and 90 million parameters
    larger = random("vision_tower", **TOWER, image_size=224)
    of_pocket = {
        "pocket": few(10, 32),
        "wide": [wide, *few(4, 32)],
        "wide, a small pass": [wide, *few(4, 32), "training.tokens_per_pass=512"],
        "wide, larger pictures": [wide, larger, *few(4, 8), "data.max_tokens=512"],
        "deep": [deep, *few(4, 16)],
        "smol's layers": [smol, *few(4, 12)],
        "smol's layers, a small step": [smol, *few(8, 4)],
        "wide, lora": [wide, *few(4, 32), LORA],
        "smol's layers, lora": [smol, *few(4, 12), LORA],
        "wide, lora, activations computed again": [wide, *few(4, 16), LORA, AGAIN],
        "wide, whole": [wide, *few(4, 16), FULL],
        "wide, whole, activations computed again": [wide, *few(4, 16), FULL, AGAIN],
    }
    short = ["data.max_samples=40", "training.max_steps=8", "evaluation.max_samples=16", "training.held_out_samples=16"]
    return {name: load_spec("pocket", changes) for name, changes in of_pocket.items()} | {
        "smol instruct": load_spec("smol", short, stage="instruct")
    }


def bench(name: str, spec: RunSpec) -> dict[str, Any]:
    """One setting: what was planned, and what its training took."""
    told: list[dict[str, Any]] = []
    processor: list[float] = []

    def follow(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            told.append(event)
            (process,) = psutil.Process().children()
            times = process.cpu_times()
            processor.append(times.user + times.system)

    with tempfile.TemporaryDirectory() as home:
        os.environ["LLAVA_PIPELINE_HOME"] = home
        model = assemble_and_freeze(fetch_backbones(spec.backbones), spec.model)
        data = validate_stream(model, spec.data, spec.evaluation.max_samples, lambda *_: Cursor())
        made = plan(spec)
        trained = train_projector(model, data, spec.training, follow=follow)
        after = plan(spec).devices[0].step_seconds
    between = processor[-2] - processor[0]  # after the last step it looks at what is held out
    seconds = between / (len(processor) - 2)
    (here,) = made.devices
    rows = {
        "memory_bytes": (here.process_bytes, trained.peak_memory_bytes),
        "step_seconds": (round((here.step_seconds + after) / 2, 3), round(seconds, 3)),
    }
    return {
        "setting": name, "wall_seconds": [round(event["seconds"], 3) for event in told],
        "step_seconds_planned_before_and_after": (here.step_seconds, after),
        "parameters": made.num_total, "trained": made.num_trainable,
        "tokens_per_sample": (made.tokens_per_sample_estimate, round(data.train.num_tokens / data.train.num_kept, 1)),
        "told_by_the_run_bytes": trained.predicted_memory_bytes,
        "memory_by_part": here.memory_by_part,
        **{key: {"planned": p, "measured": m, "off_by": round(p / m - 1, 3)} for key, (p, m) in rows.items()},
    }  # fmt: skip


def main() -> None:
    """Run the settings, write the raw numbers, and say the few that matter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=sorted(settings()), help="some settings; nothing is written then")
    parser.add_argument("--json", action="store_true", help="print the raw numbers")
    asked = parser.parse_args()
    rows = []
    before = machine()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    speed.clock = time.process_time
    for name, spec in settings().items():
        if asked.only and name not in asked.only:
            continue
        rows.append(bench(name, spec))
        row = rows[-1]
        print(f"{name}: memory {row['memory_bytes']}, a step {row['step_seconds']}", file=sys.stderr, flush=True)
    found = {
        "command": "python -m benchmarks.plan --json",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"), "machine": before, "within": WITHIN,
        "rows": rows,
    }  # fmt: skip
    if not asked.only:
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
