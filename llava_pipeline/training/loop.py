"""The loop: the next samples, forward, backward, step, and a record of each. Plain torch; it knows no tracker and no
files."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from llava_pipeline.errors import Diverged, OutOfMemory, SpecError
from llava_pipeline.model.freeze import is_of_language_model
from llava_pipeline.spec import TrainingSpec
from llava_pipeline.training.budget import Used, end_of_next, learning_rate, next_samples, share
from llava_pipeline.training.features import StepFeatures
from llava_pipeline.training.samples import sample_indices
from llava_pipeline.training.shard import clip_gradients, is_sharded
from llava_pipeline.training.step import Step
from llava_pipeline.training.world import World

log = logging.getLogger(__name__)
MAX_BAD_IN_A_ROW = 5
HOST_OUT_OF_MEMORY = (  # what torch's allocator and oneDNN say where they find none
    "can't allocate memory",
    "could not create a memory object",
    "could not create a primitive",
)
PACE_MEMORY = 0.8  # how much the mean duration of a step remembers


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step: the same in every run of the same spec, however often it was killed.

    ``loss`` is nats per supervised token; a skipped step changed nothing.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int
    num_samples: int
    skipped: bool
    samples: list[int]
    held_out_loss: float | None = None

    def as_json(self) -> dict[str, object]:
        """Plain values for a history file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step took, of which waiting for its pictures; of this run alone."""

    seconds: float
    data_seconds: float
    tokens_per_pass: int
    held_out_seconds: float = 0.0


@dataclass
class Place:
    """Where a training stands: with the projector, the optimizer and the scaler, all that it takes to go on."""

    used: Used = field(default_factory=Used)
    num_applied: int = 0
    num_skipped: int = 0
    bad_in_a_row: int = 0
    tokens_per_pass: int = 1 << 14
    step_seconds: float = 0.0


@dataclass(frozen=True)
class Learner:
    """What changes while it learns: the parameters that do, their optimizer, the scale of the loss."""

    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def of_each(self) -> list[Tensor]:
        """Those that every process has whole."""
        return [parameter for parameter in self.parameters if not is_sharded(parameter)]

    @property
    def is_sharded(self) -> bool:
        """Whether every pass takes all processes, because each has a part of the weights only."""
        return len(self.of_each) < len(self.parameters)


def make_learner(learned: Mapping[str, Tensor], spec: TrainingSpec, dtype: torch.dtype) -> Learner:
    """AdamW on what is learned, by its name, each part at its own rate; the loss is scaled where frozen parts run in
    float16."""
    parameters = list(learned.values())
    device = parameters[0].device
    of_language = [is_of_language_model(name) for name in learned]
    groups = []
    for part, which in ((spec.projector, False), (spec.language_model, True)):
        mine = [value for value, other in zip(parameters, of_language, strict=True) if other == which]
        if mine:
            groups.append({"params": mine, "share": spec.learning_rate_of(part) / spec.learning_rate})
    optimizer = torch.optim.AdamW(
        groups, lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay,
        fused=True if device.type == "cpu" else None,  # there torch would make a dozen calls for each thin matrix
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # it makes its scale when it is first used, and we only ask for it
    return Learner(parameters, optimizer, scaler)


@dataclass(frozen=True)
class Task:
    """What is learned: steps over samples, the features of their pictures, and a step over held-out ones."""

    step: Step
    features: StepFeatures
    held_out: Step | None = None


def train(
    task: Task, learner: Learner, spec: TrainingSpec, world: World, place: Place,
    clock: Callable[[], float] = time.monotonic, stopped: Callable[[], bool] = bool,
) -> Iterator[tuple[StepRecord, Pace]]:  # fmt: skip
    """Train until the budget is used up or ``stopped`` says so, from ``place`` on, which is kept current.

    Raises:
        Diverged: five steps in a row had a loss or a gradient that is no number, or no step at all could be applied.
        OutOfMemory: one sample alone takes more memory than there is.
        SpecError: the budget in minutes or money was used up before the first step.
    """
    began = clock() - place.used.seconds
    together = world if learner.is_sharded else None
    while share(spec, place.used) < 1:
        started = clock()
        rate = learning_rate(spec, end_of_next(spec, place.used, place.step_seconds))
        for group in learner.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        indices = upcoming(task, spec, place.used.samples)
        load(task, world, indices, upcoming(task, spec, place.used.samples + len(indices)))
        loaded = clock()
        num_supervised = task.step.samples.num_supervised(indices)
        total = accumulate(task.step, learner, world.part(indices), num_supervised, place, together)
        world.add_gradients(learner.of_each)
        # Every process must come to the same ends, so one clock counts and any process's wish to stop.
        own = [total, clock() - began if world.rank == 0 else 0.0, float(stopped())]
        total, seconds, stop = world.add(own)
        norm, skipped = apply(learner, total, spec, place)
        place.step_seconds = smooth(place.step_seconds, seconds - place.used.seconds)
        place.used = Used(place.used.steps + 1, place.used.samples + len(indices), seconds)
        stepped = clock()
        looks = place.used.steps % spec.held_out_every == 0 or share(spec, place.used) >= 1
        held_out = held_out_loss(task.held_out, world, place, together) if task.held_out and looks else None
        record = StepRecord(
            place.used.steps, total / num_supervised, rate, norm, task.step.samples.num_tokens(indices),
            num_supervised, len(indices), skipped, indices, held_out,
        )  # fmt: skip
        yield record, Pace(stepped - started, loaded - started, place.tokens_per_pass, clock() - stepped)
        if place.bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise Diverged(
                f"loss {record.loss:.3g} and gradient norm {norm:.3g} at step {record.step}, the "
                f"{MAX_BAD_IN_A_ROW}th in a row that is no number; lower training.learning_rate "
                f"({spec.learning_rate}) or set training.precision=fp32"
            )
        if stop:
            return
    if place.used.steps == 0:
        raise SpecError(
            f"the budget was used up before the first step, after {place.used.seconds:.0f} s; raise "
            "training.max_minutes or training.max_cost"
        )
    if place.num_applied == 0:
        raise Diverged(
            f"none of {place.used.steps} steps had a loss and a gradient that are numbers, so nothing was learned; "
            "raise training.max_steps or set training.precision=fp32"
        )


def upcoming(task: Task, spec: TrainingSpec, position: int) -> list[int]:
    """Sample numbers of the step that begins at a position of the order."""
    count = next_samples(spec, Used(samples=position))
    return sample_indices(task.step.samples.runs, spec.seed, position, count)


def load(task: Task, world: World, indices: Sequence[int], following: Sequence[int]) -> None:
    """Make ready the features of this process's part of a step."""
    images_of = task.step.samples.images_of
    task.features.load(images_of(world.part(indices)), images_of(world.part(following)))


def smooth(mean: float, seconds: float) -> float:
    """How long a step takes lately."""
    return seconds if mean == 0 else PACE_MEMORY * mean + (1 - PACE_MEMORY) * seconds


def accumulate(
    step: Step, learner: Learner, indices: list[int], num_supervised: int, place: Place, together: World | None = None
) -> float:
    """Gradients of one optimizer step, whose loss is a true mean over its tokens; the sum of its losses.

    When memory runs out, the passes are halved and the step begins anew: it stays the same step. Not where every pass
    takes the processes of ``together``, which wait in the middle of it.

    Raises:
        OutOfMemory: a pass of a single sample is too large, or one of several processes.
    """
    while True:
        split = as_many(step.split(indices, place.tokens_per_pass), together)
        total = _passes(step, learner, split, num_supervised)
        if total is not None:
            return total
        learner.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        largest = max(step.samples.num_tokens(part) for part in split)
        if together is not None:
            raise OutOfMemory(
                f"a forward and backward pass of {largest} tokens takes more memory than process {together.rank} of "
                f"{together.size} has; set training.tokens_per_pass (now {place.tokens_per_pass}) to less or "
                "training.step.recompute=true, lower data.max_tokens, or take more processes"
            )
        if max(map(len, split)) == 1:
            raise OutOfMemory(
                f"a forward and backward pass of one sample ({largest} tokens) takes more memory than there is; "
                "lower data.max_tokens, or take a smaller language model or a larger machine"
            )
        place.tokens_per_pass = min(place.tokens_per_pass, largest) // 2
        log.warning(
            "memory ran out in a pass of %d tokens; from now on a pass has at most %d, a step is as large as before",
            largest, place.tokens_per_pass,
        )  # fmt: skip


def as_many(split: list[list[int]], together: World | None) -> list[list[int]]:
    """With empty passes at the end: as many as the process has that has the most."""
    return split if together is None else split + [[]] * (together.most(len(split)) - len(split))


def _passes(step: Step, learner: Learner, split: list[list[int]], num_supervised: int) -> float | None:
    """The sum of the losses, with all gradients in place; None where memory ran out."""
    try:
        scale = learner.scaler.get_scale() / num_supervised
        total = torch.zeros((), dtype=torch.float64, device=step.device)
        for part in split:
            loss = step.loss(part, scale)
            if loss.requires_grad:  # it does not where no sample of the pass has a picture
                (loss * scale).backward()
            total += loss.detach()
        return float(total)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None  # outside the handler, whose traceback holds on to what ran out of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a card or on the host: torch's allocator for the CPU raises a bare RuntimeError."""
    host = any(text in str(error) for text in HOST_OUT_OF_MEMORY)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or host


def apply(learner: Learner, total: float, spec: TrainingSpec, place: Place) -> tuple[float, bool]:
    """One step of the optimizer, if loss and gradient are numbers: the gradient's norm, and whether it was skipped."""
    learner.scaler.unscale_(learner.optimizer)
    norm = clip_gradients(learner.parameters, spec.max_grad_norm)
    skipped = not (math.isfinite(total) and math.isfinite(norm))
    # A loss scale that was too large is halved after the step: no fault of the training until none is left.
    bad = skipped and (not math.isfinite(total) or learner.scaler.get_scale() <= 1)
    place.bad_in_a_row = place.bad_in_a_row + 1 if bad else 0
    if skipped:
        place.num_skipped += 1
    else:
        learner.scaler.step(learner.optimizer)
        place.num_applied += 1
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return norm, skipped


@torch.no_grad()
def held_out_loss(step: Step, world: World, place: Place, together: World | None) -> float:
    """Nats per supervised token of samples that are not trained on."""
    indices = range(len(step.samples))
    parts = as_many(step.split(world.part(indices), place.tokens_per_pass), together)
    total = sum(float(step.loss(part)) for part in parts)
    return world.add([total])[0] / step.samples.num_supervised(indices)
