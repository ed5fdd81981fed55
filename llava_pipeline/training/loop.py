"""The loop: the next samples, forward, backward, step, and a record of each. Plain torch; it knows no tracker.

The order of samples is a pure function of (seed, epoch), so the position in the data is one integer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from transformers import LlavaForConditionalGeneration

from llava_pipeline.errors import Diverged, SpecError
from llava_pipeline.spec import TrainingSpec
from llava_pipeline.training.schedule import learning_rate
from llava_pipeline.training.step import Batch, collate, loss_sum

MAX_BAD_IN_A_ROW = 5
NO_PICTURE = -1


@dataclass(frozen=True, slots=True)
class Samples:
    """What is trained on: token ids and labels per sample, tower features (N, P, D_vision) per image.

    ``image`` is a sample's number in ``features``, or ``NO_PICTURE``.
    """

    input_ids: list[torch.Tensor]
    labels: list[torch.Tensor]
    image: list[int]
    features: torch.Tensor
    pad_token_id: int

    def batch(self, indices: list[int], device: torch.device) -> Batch:
        """A padded batch of these samples on a device."""
        features = self.features[[self.image[k] for k in indices if self.image[k] != NO_PICTURE]]
        input_ids, labels = [self.input_ids[k] for k in indices], [self.labels[k] for k in indices]
        return collate(input_ids, labels, features, self.pad_token_id).to(device)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. ``loss`` is nats per supervised token; a skipped step changed nothing."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int
    num_samples: int
    seconds: float
    skipped: bool

    def as_json(self) -> dict[str, float | int | bool]:
        """Plain values for a history file."""
        return asdict(self)


def order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> list[int]:
    """``count`` sample numbers from position ``start`` on, through as many epochs as it takes."""
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), num_samples)
        out += order(num_samples, seed, epoch)[offset : offset + count - len(out)]
    return out


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        SpecError: a GPU was asked for, and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SpecError(
            f"training.device=cuda, but torch {torch.__version__} finds no card on this machine; set "
            "training.device=auto, or install a driver and a CUDA build of torch"
        )
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Of the frozen parts; the projector and its optimizer stay in float32.

    ``auto`` takes bf16 only where the card computes in it: a T4 emulates it, slowly, and gets fp16.
    """
    if name == "auto" and device.type == "cpu":
        name = "fp32"
    elif name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def place(model: LlavaForConditionalGeneration, device: torch.device, precision: torch.dtype) -> None:
    """Frozen weights in their precision, the projector and all buffers in float32, everything on the device.

    Rounded rotary frequencies would turn later tokens by angles that are wrong in proportion to their position.
    """
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        for parameter in part.parameters():
            parameter.data = parameter.data.to(device, precision)
    model.to(device)


def train(model: LlavaForConditionalGeneration, samples: Samples, spec: TrainingSpec) -> Iterator[StepRecord]:
    """Train the projector of a placed model in place, one record per optimizer step.

    Raises:
        Diverged: five steps in a row had a loss or a gradient that is no number, or no step at all could be applied.
    """
    projector = list(model.model.multi_modal_projector.parameters())
    device = projector[0].device
    optimizer = torch.optim.AdamW(projector, lr=spec.learning_rate, betas=spec.betas, weight_decay=spec.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    per_step = spec.batch_size * spec.accumulation
    num_applied = bad_in_a_row = 0
    for step in range(spec.max_steps):
        started = time.monotonic()
        rate = learning_rate(step, spec.max_steps, spec.learning_rate, spec.min_learning_rate, spec.warmup_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = sample_indices(len(samples.input_ids), spec.seed, step * per_step, per_step)
        total, num_supervised, num_tokens = accumulate(model, samples, indices, spec.batch_size, scaler)
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(projector, spec.max_grad_norm))
        skip = not (math.isfinite(total) and math.isfinite(norm))
        # A loss scale that was too large is halved after the step: no fault of the training until none is left.
        bad = skip and (not math.isfinite(total) or scaler.get_scale() <= 1)
        bad_in_a_row = bad_in_a_row + 1 if bad else 0
        if not skip:
            scaler.step(optimizer)
            num_applied += 1
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        yield StepRecord(
            step + 1, total / num_supervised, rate, norm, num_tokens, num_supervised, per_step,
            time.monotonic() - started, skip,
        )  # fmt: skip
        if bad_in_a_row >= MAX_BAD_IN_A_ROW:
            raise Diverged(
                f"loss {total / num_supervised:.3g} and gradient norm {norm:.3g} at step {step + 1}, the "
                f"{MAX_BAD_IN_A_ROW}th in a row that is no number; lower training.learning_rate "
                f"({spec.learning_rate}) or set training.precision=fp32"
            )
    if num_applied == 0:
        raise Diverged(
            f"none of {spec.max_steps} steps had a loss and a gradient that are numbers, so nothing was learned; "
            "raise training.max_steps or set training.precision=fp32"
        )


def accumulate(
    model: LlavaForConditionalGeneration, samples: Samples, indices: list[int], size: int, scaler: torch.amp.GradScaler
) -> tuple[float, int, int]:
    """Gradients of one optimizer step, a true token mean over it: (loss sum, supervised tokens, tokens)."""
    device = model.model.multi_modal_projector.linear_1.weight.device
    by_length = sorted(indices, key=lambda k: len(samples.input_ids[k]))  # same sum, less padding
    batches = [samples.batch(by_length[k : k + size], device) for k in range(0, len(indices), size)]
    num_supervised = sum(batch.num_labels for batch in batches)
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch)
        scaler.scale(loss / num_supervised).backward()
        total += float(loss.detach())
    return total, num_supervised, sum(int(batch.attention_mask.sum()) for batch in batches)
