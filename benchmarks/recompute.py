"""What activations that are computed again save, and what they cost: memory and seconds of two steps.

    python benchmarks/recompute.py --json      # 30 layers of SmolLM2-135M's shapes, random weights; about eight minutes

The last two arms are of a language model that learns whole on two processes, which is then split.

Every arm is a process of its own, or two. Memory is what the two steps take at their peak beyond the model in its
place, from /proc/self/status, of the first process; of the full mode the gradient and AdamW's means are in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.model.assemble import assemble
from llava_pipeline.model.freeze import learned, let_learn
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.model.tower import feature_width
from llava_pipeline.spec import PartSpec, StepSpec, TrainingSpec, load_spec
from llava_pipeline.training.device import choose_device, peak_memory, place
from llava_pipeline.training.loop import Place, Task, make_learner, train
from llava_pipeline.training.samples import collect
from llava_pipeline.training.shard import shard
from llava_pipeline.training.step import make_step
from llava_pipeline.training.world import join

SHAPE = (
    "backbones.language_model={kind: random, like: pocket/language_model, overrides: {hidden_size: 576, "
    "intermediate_size: 1536, num_hidden_layers: 30, num_attention_heads: 9, num_key_value_heads: 3, head_dim: 64}}"
)
ARMS = (("frozen", 1), ("lora", 1), ("full", 1), ("full", 2))
LENGTH, NUM_ANSWER, NUM_SAMPLES, STEPS = 256, 16, 4, 2


class Ones:
    """Features that no tower computes."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def load(self, images: object, following: object) -> None:
        """Nothing to make ready."""

    def __call__(self, images: list[int]) -> torch.Tensor:
        """The same of every picture."""
        return torch.ones(len(images), *self.shape)


def status(key: str) -> int:
    """Bytes of this process by /proc's name."""
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{key}:")[1].split()[0]) * 1024


def arm(mode: str, recompute: bool) -> dict[str, object]:
    """Two steps of four samples of 256 tokens in one pass, in float32."""
    parts = load_spec("pocket", [SHAPE])
    backbones = Backbones(
        vision_tower=fetch(parts.backbones.vision_tower, None, 0),
        language_model=fetch(parts.backbones.language_model, None, 0),
    )
    llava = assemble(backbones, parts.model)
    spec = TrainingSpec(
        max_steps=STEPS, samples_per_step=NUM_SAMPLES, language_model=PartSpec(mode=mode),
        step=StepSpec(recompute=recompute, halve=False, share_prefix=False), precision="fp32",
    )  # fmt: skip
    device = choose_device("cpu")
    world = join(device)
    split = world.size > 1
    place(llava.model, device, torch.float32, learns_whole=mode == "full", sharded=split)
    let_learn(llava.model, spec)
    sharded = shard(llava.model, torch.float32, world) if split else None
    places = int(llava.model.config.image_seq_length)
    ids = torch.randint(50, 300, (LENGTH,), generator=torch.Generator().manual_seed(0))
    ids[4 : 4 + places] = llava.model.config.image_token_index
    labels = torch.full((LENGTH,), IGNORE_INDEX)
    labels[-NUM_ANSWER:] = ids[-NUM_ANSWER:]
    samples = collect([ids] * NUM_SAMPLES, [labels] * NUM_SAMPLES, list(range(NUM_SAMPLES)))
    features = Ones((places, feature_width(llava.model.config)))
    step = make_step(llava.model, samples, features, torch.float32, spec.step, sharded=sharded)
    learner = make_learner(learned(llava.model, spec), spec, torch.float32)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before, started = status("VmRSS"), time.perf_counter()
    paces = []
    for record, pace in train(Task(step, features), learner, spec, world, Place(tokens_per_pass=4096)):
        paces.append((record, pace.seconds))
    record = paces[-1][0]
    taken = peak_memory(device) - before
    if world.rank:
        sys.exit()
    return {
        "mode": mode, "recompute": recompute, "processes": world.size, "model_mb": round(before / 1e6),
        "step": type(step).__name__, "mb": round(taken / 1e6),
        "seconds": [round(value, 2) for _, value in paces], "loss": record.loss, "grad_norm": record.grad_norm,
        "total_seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def main() -> None:
    """All arms, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", nargs=2, metavar=("MODE", "RECOMPUTE"))
    parser.add_argument("--json", action="store_true", help="write benchmarks/results/recompute.json")
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(arm(asked.arm[0], asked.arm[1] == "True")))
        return
    arms = []
    with tempfile.TemporaryDirectory() as home:
        for (mode, processes), recompute in itertools.product(ARMS, (False, True)):
            several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            started = several if processes > 1 else []
            command = [sys.executable, *started, __file__, "--arm", mode, str(recompute)]
            env = os.environ | {"LLAVA_PIPELINE_HOME": home}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            arms.append(json.loads(done.stdout.splitlines()[-1]))
            print(arms[-1], flush=True)
    if asked.json:
        told = {"machine": machine(), "tokens_per_pass": NUM_SAMPLES * LENGTH, "arms": arms}
        (RESULTS / "recompute.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
