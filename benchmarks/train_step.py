"""The training step against the seed's recipe: correctness first, then time, then what each shortcut brings.

    python benchmarks/train_step.py --quick --json    # four layers of TinyLlama's shapes, and the pocket model
    python benchmarks/train_step.py --json            # all 22 layers too: about 40 minutes on 2 CPU cores
    python benchmarks/train_step.py --race --json     # how soon the seed's own held-out loss is reached

Arms run in processes of their own, one after the other, the same ones at the beginning and at the end: literal, ours,
tuned, ours, literal. They start from the same projector and take the same steps of eight samples, in the same order,
with the seed's labels, learning rates and pixels. Nothing is timed before the gates have passed.

Seconds of a step are those of the second step on, data included. Ours prepares pictures beforehand; what that took is
added to its steps. Ratios are of medians within one run on one machine. ``benchmarks/results/`` has what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.__main__ import RESULTS, machine
from benchmarks.seed_recipe import STEP, PeakMemory, collator, held_out_loss, train_seed
from benchmarks.seed_recipe import Pictures as SeedPictures
from benchmarks.workload import Labels, Shapes, Work, conversations, seed_pixels, tokens, workload
from llava_pipeline.model.memory import tokens_per_pass
from llava_pipeline.model.speed import measured_flops
from llava_pipeline.spec import StepSpec, TrainingSpec
from llava_pipeline.training.device import choose_device, choose_precision, device_name, place
from llava_pipeline.training.features import Computed
from llava_pipeline.training.llama import halve
from llava_pipeline.training.loop import Learner, Place, Task, accumulate, apply, load, make_learner
from llava_pipeline.training.samples import Samples, collect
from llava_pipeline.training.step import make_step
from llava_pipeline.training.work import useful_flops
from llava_pipeline.training.world import World

SEED, PEAK, FLOOR, WARMUP = 1, 2e-4, 2e-5, 0.05
SWITCHES = ("pack", "share_prefix", "select", "fold", "lean")
MAX_LOSS_ERROR, MAX_GRADIENT_ERROR, MIN_COSINE = 1e-5, 1e-4, 0.999
RACE_STEPS, RACE_HELD_OUT = 350, 200


def seed_rate(step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) under transformers' ``cosine_with_min_lr``."""
    warmup = math.ceil(steps * WARMUP)
    if step < warmup:
        return PEAK * step / max(1, warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return FLOOR + (PEAK - FLOOR) * cosine


# --------------------------------------------------------------------------------------------- our arm


class Ours:
    """Our step on a workload, with the seed's pixels."""

    def __init__(self, work: Work, labels: Labels, precision: str = "auto", step: StepSpec | None = None) -> None:
        self.work, self.device = work, choose_device("auto")
        self.world = World(0, 1, self.device)
        self.dtype = choose_precision(precision, self.device)
        model = work.llava.model
        place(model, self.device, self.dtype)
        spec = step or StepSpec()
        if self.dtype == torch.float32 and spec.halve:
            halve(model.model.language_model, model.lm_head)
        started = time.perf_counter()
        self.pixels = torch.stack([seed_pixels(work, sample) for sample in work.samples])
        self.prepare_seconds = (time.perf_counter() - started) / len(work.samples)
        self.features = Computed(model, self.pixels, lambda pixels: pixels, self.device)
        self.samples = samples_of(work, labels)
        self.task = self.make(spec)

    def make(self, spec: StepSpec) -> Task:
        """The same with other switches."""
        return Task(make_step(self.work.llava.model, self.samples, self.features, self.dtype, spec), self.features)

    def place(self) -> Place:
        """At the beginning, with passes as large as memory has room for."""
        text = self.work.llava.model.config.text_config
        return Place(tokens_per_pass=tokens_per_pass(text, self.dtype.itemsize, self.device))

    def learner(self, spec: TrainingSpec) -> Learner:
        """AdamW on the projector as it is."""
        projector = self.work.llava.model.model.multi_modal_projector
        return make_learner(dict(projector.named_parameters()), spec, self.dtype)

    def step(self, task: Task, learner: Learner, place: Place, indices: list[int], rate: float) -> tuple[float, float]:
        """One step of the optimizer: its loss and its seconds."""
        started = time.perf_counter()
        for group in learner.optimizer.param_groups:
            group["lr"] = rate
        load(task, self.world, indices, [])
        count = task.step.samples.num_supervised(indices)
        total = accumulate(task.step, learner, indices, count, place)
        apply(learner, total, TrainingSpec(max_steps=1), place)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return total / count, time.perf_counter() - started


def samples_of(work: Work, labels: Labels) -> Samples:
    """The workload as our training reads it."""
    rows = [tokens(work, sample, labels) for sample in work.samples]
    ids, learned = ([torch.tensor(getattr(row, name)) for row in rows] for name in ("input_ids", "labels"))
    return collect(ids, learned, list(range(len(rows))))


def train_ours(work: Work, steps: int, labels: Labels, precision: str = "auto") -> dict[str, Any]:
    """The same steps as the seed's, in our way."""
    ours = Ours(work, labels, precision)
    learner, at = ours.learner(TrainingSpec(max_steps=steps)), ours.place()
    memory = PeakMemory()
    losses, seconds = [], []
    for number in range(steps):
        indices = list(range(number * STEP, (number + 1) * STEP))
        loss, took = ours.step(ours.task, learner, at, indices, seed_rate(number, steps))
        losses.append(loss)
        seconds.append(took + STEP * ours.prepare_seconds)
    useful = useful_flops(work.llava.model, ours.samples, range(steps * STEP)) / steps
    peak = measured_flops(ours.device, ours.dtype, seconds=1.0)
    return {
        "device": device_name(ours.device), "precision": str(ours.dtype), "losses": losses, "step_seconds": seconds,
        "peak_bytes": memory.peak(), "start_bytes": memory.start, "tokens_per_pass": at.tokens_per_pass,
        "prepare_seconds_per_picture": ours.prepare_seconds, "useful_flops_per_step": useful, "matmul_flops": peak,
        "useful_mfu": useful / statistics.median(seconds[1:] or seconds) / peak,
    }  # fmt: skip


def ablations(work: Work, labels: Labels, rounds: int) -> dict[str, Any]:
    """Seconds of one step with everything, and with each switch off; interleaved, the best of ``rounds``."""
    ours = Ours(work, labels)
    specs = {"everything": StepSpec()} | {name: StepSpec(**{name: False}) for name in SWITCHES}
    specs |= {"nothing": StepSpec(**dict.fromkeys(SWITCHES, False)), "compile": StepSpec(compile=True)}
    tasks = {name: ours.make(spec) for name, spec in specs.items()}
    learner, indices = ours.learner(TrainingSpec(max_steps=1)), list(range(STEP))
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            # The first round compiles, and warms up: on two samples.
            seconds = ours.step(task, learner, ours.place(), indices if number else indices[:2], 0.0)[1]
            if number:
                took[name].append(seconds)
    best = {name: min(seconds) for name, seconds in took.items()}
    images = ours.samples.images_of(indices)
    started = time.perf_counter()
    ours.features.load(images, [])
    tower = time.perf_counter() - started
    return {
        "seconds": took,
        "slower_without": {name: round(best[name] / best["everything"], 3) for name in (*SWITCHES, "nothing")},
        "slower_with_compile": round(best["compile"] / best["everything"], 3),
        "tower_share_of_step": round(tower / best["everything"], 4),
    }


# --------------------------------------------------------------------------------------------- correctness


def gates(work: Work) -> dict[str, Any]:
    """Loss and projector gradient of our step beside those of the plain forward, in fp32 and in the run's precision.

    Raises:
        AssertionError: they differ by more than rounding.
    """
    found: dict[str, Any] = {}
    indices = list(range(STEP))
    for labels in get_args(Labels):
        expected, gradient = plain(work, labels)
        precisions = ["fp32"] + (["auto"] if choose_precision("auto", choose_device("auto")) != torch.float32 else [])
        for precision in precisions:
            ours = Ours(work, labels, precision)
            load(ours.task, ours.world, indices, [])
            count = ours.samples.num_supervised(indices)
            learner = ours.learner(TrainingSpec(max_steps=1))
            scale = learner.scaler.get_scale()
            loss = accumulate(ours.task.step, learner, indices, count, ours.place()) / count
            own = taken(work) / scale
            error = float((own - gradient).norm() / gradient.norm())
            cosine = float(cosine_similarity(own.double(), gradient.double(), 0))
            name = f"{labels} labels, {str(ours.dtype).removeprefix('torch.')}"
            found[name] = {"loss_error": abs(loss - expected), "gradient_error": error, "gradient_cosine": cosine}
            if precision == "fp32":
                assert abs(loss - expected) <= MAX_LOSS_ERROR, f"{name}: loss {loss}, plain {expected}"
                assert error <= MAX_GRADIENT_ERROR, f"{name}: the gradient differs by {error}"
            assert cosine >= MIN_COSINE, f"{name}: the gradient's cosine is {cosine}"
        place(work.llava.model, choose_device("auto"), torch.float32)
    return found


def plain(work: Work, labels: Labels) -> tuple[float, Tensor]:
    """Loss and gradient of eight samples by transformers' forward from pixels, two at a time, a token mean."""
    model, rows, collate = work.llava.model, SeedPictures(work.samples), collator(work, labels)
    model.to(choose_device("auto"))
    batches = [collate([rows[k], rows[k + 1]]).to(model.device) for k in range(0, STEP, 2)]
    counts = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**batch).loss * count / sum(counts)
        loss.backward()
        total += float(loss.detach())
    return total, taken(work)


def taken(work: Work) -> Tensor:
    """The projector's gradient as one vector, taken off the model."""
    parameters = list(work.llava.model.model.multi_modal_projector.parameters())
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone()
    work.llava.model.zero_grad(set_to_none=True)
    return gradient


# --------------------------------------------------------------------------------------------- the race


def race(work: Work, goal: dict[str, float]) -> dict[str, Any]:
    """Seconds of training until the held-out loss is the seed's: with our learning rate, on the answers' tokens."""
    ours = Ours(work, "answers")
    spec = TrainingSpec(max_steps=RACE_STEPS, learning_rate=3e-3, betas=(0.9, 0.98))
    learner, at, held_out = ours.learner(spec), ours.place(), held_out_samples(work)
    seconds, reached = 0.0, math.nan
    for number in range(RACE_STEPS):
        rate = spec.learning_rate * min(1.0, (number + 1) / 10)
        indices = [k % len(work.samples) for k in range(number * STEP, (number + 1) * STEP)]
        seconds += ours.step(ours.task, learner, at, indices, rate)[1] + STEP * ours.prepare_seconds
        if number % 5 == 4:
            reached = held_out_loss(work, held_out, "answers")
            if reached <= goal["answers"]:
                return {"seconds": seconds, "steps": number + 1, "held_out_loss": reached}
    return {"seconds": None, "steps": RACE_STEPS, "held_out_loss": reached}


def held_out_samples(work: Work) -> Any:
    """Conversations that nobody trains on."""
    return conversations(work.shapes, RACE_HELD_OUT, SEED + 1, "test")


# --------------------------------------------------------------------------------------------- arms and the whole


def run_arm(arm: str, shapes: Shapes, steps: int, goal: float) -> dict[str, Any]:
    """One arm, in this process."""
    work = workload(shapes, max(STEP, steps * STEP), SEED)
    if arm in ("gates", "ablations"):
        return gates(work) if arm == "gates" else ablations(work, "seed", steps)
    if arm == "race":
        return race(work, {"answers": goal})
    if arm == "ours":
        return train_ours(work, steps, "seed")
    result = train_seed(work, list(range(steps * STEP)), steps, arm, "seed")  # type: ignore[arg-type]
    found = {
        "device": result.device, "losses": result.losses, "step_seconds": result.step_seconds,
        "seconds": result.seconds, "waiting_share": result.waiting_share, "real_tokens": result.real_tokens,
        "padded_tokens": result.padded_tokens, "peak_bytes": result.peak_bytes, "start_bytes": result.start_bytes,
    }  # fmt: skip
    if goal == 0.0:
        held_out = held_out_samples(work)
        found["held_out_loss"] = {name: held_out_loss(work, held_out, name) for name in get_args(Labels)}
    return found


def in_process(arm: str, shapes: str, steps: int, goal: float = -1.0) -> dict[str, Any]:
    """One arm, in a process of its own."""
    print(f"{shapes}: {arm} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--arm", arm, "--shapes", shapes, "--steps", str(steps), "--goal", str(goal)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(shapes: str, steps: int, rounds: int) -> dict[str, Any]:
    """Gates, then the arms interleaved, then the ablations."""
    passed = in_process("gates", shapes, 1)
    order = ["literal", "ours", "tuned", "ours", "literal"]
    runs = [(arm, in_process(arm, shapes, steps)) for arm in order]
    seconds = {arm: median_step([run for name, run in runs if name == arm]) for arm in dict.fromkeys(order)}
    literal, ours = (next(run for arm, run in runs if arm == name) for name in ("literal", "ours"))
    apart = [abs(a - b) for a, b in zip(literal["losses"], ours["losses"], strict=True)]
    peaks = {arm: max(run["peak_bytes"] or 0 for name, run in runs if name == arm) for arm in seconds}
    return {
        "gates": passed,
        "samples_per_second": {arm: round(STEP / value, 3) for arm, value in seconds.items()},
        "ratio_to_literal": round(seconds["literal"] / seconds["ours"], 2),
        "ratio_to_tuned": round(seconds["tuned"] / seconds["ours"], 2),
        "memory_share_of_literal": round(peaks["ours"] / peaks["literal"], 2) if peaks["literal"] else None,
        "peak_gb": {arm: round(value / 1e9, 2) for arm, value in peaks.items()},
        "padded_to_real_tokens": round(literal["padded_tokens"] / literal["real_tokens"], 3),
        "useful_mfu": round(max(run["useful_mfu"] for arm, run in runs if arm == "ours"), 3),
        "largest_loss_difference": max(apart),
        "ablations": in_process("ablations", shapes, rounds),
        "runs": runs,
    }


def median_step(runs: list[dict[str, Any]]) -> float:
    """Seconds of a step, the first of a process left out."""
    return statistics.median(second for run in runs for second in run["step_seconds"][1:] or run["step_seconds"])


def the_race() -> dict[str, Any]:
    """The seed's 350 steps, its held-out loss, and how long ours takes to get there."""
    seed = in_process("literal", "pocket", RACE_STEPS, 0.0)
    ours = in_process("race", "pocket", RACE_STEPS, seed["held_out_loss"]["answers"])
    share = ours["seconds"] / seed["seconds"] if ours["seconds"] else None
    return {"seed": {k: v for k, v in seed.items() if k != "losses"}, "ours": ours, "share_of_seed_time": share}


def plans(quick: bool) -> Iterator[tuple[str, int, int]]:
    """Shapes, steps and rounds of ablations."""
    yield "pocket", 20, 3
    yield "quick", 2, 1
    if not quick:
        yield "budget", 2, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the whole of TinyLlama")
    parser.add_argument("--race", action="store_true", help="only the time to the seed's held-out loss")
    parser.add_argument("--shapes", choices=get_args(Shapes), help="only these")
    parser.add_argument("--arm", help="one arm in this process, for --shapes")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--goal", type=float, default=-1.0, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON document")
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(run_arm(asked.arm, asked.shapes, asked.steps, asked.goal)))
        return
    report = {
        "command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "machine": machine() | {"threads": torch.get_num_threads()},
    }
    measured = {}
    if asked.race:
        measured["race"] = write("race", the_race(), report)
    else:
        for name, *plan in plans(asked.quick):
            if asked.shapes in (None, name):
                measured[name] = write(name, compare(name, *plan), report)
    print(json.dumps(report | measured, indent=None if asked.json else 1))


def write(name: str, found: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Put one part of the measurements into its file, as soon as it is there."""
    path = RESULTS / f"train-step-{name}.json"
    dated = report | {"measured": datetime.now(UTC).isoformat(timespec="seconds"), name: found}
    path.write_text(json.dumps(dated, indent=1) + "\n", encoding="utf-8")
    print(path, file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
