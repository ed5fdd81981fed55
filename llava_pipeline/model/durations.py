"""How many operations a run takes, and how long they take on a device. docs/architecture.md derives the counts."""

from __future__ import annotations

import math

import torch

from llava_pipeline.model.devices import HERE, ITEMSIZE, Device, Precision, num_cards
from llava_pipeline.model.memory import LAST_LAYER, head_size, matrices
from llava_pipeline.model.sizes import Sizes
from llava_pipeline.model.speed import layer_flops, layer_operations, measured_flops
from llava_pipeline.spec import RunSpec, TrainingSpec

LAUNCH_SECONDS = 1.8e-3  # of a layer's kernels, forward and back, one after the other (estimate)
DECODE_SECONDS = 1.1e-3  # of a layer, for one more token of a whole batch (transformers, published)
QUESTION_TOKENS, CONDITIONS, LOSSES = 20, 3, 2  # of an evaluation: answers under three conditions, losses under two
NF4_SLOWER = 1.5  # weights are unpacked in every product (estimate)
PADDED_SLOWER = 1.25  # a language model that learns whole: transformers' own forward, padded (measured on a CPU)
ADAMW_BYTES = 28  # that an optimizer step moves for a parameter


def operations(spec: RunSpec, sizes: Sizes) -> dict[str, float]:
    """Floating-point operations of one sample's training by part, as docs/architecture.md derives them.

    Forward and the gradient to the input: 4 per weight and token, for the picture's tokens are learned at the bottom of
    the stack; 6 where the weights learn. What is computed again counts: it takes time.
    """
    text, training, counts = sizes.text, spec.training, sizes.shape.counts
    layers, again = text.num_hidden_layers, 1.0 if training.step.recompute else 0.0
    each = layer_operations(text, training, sizes.tokens)
    # torch computes again up to the last tensor that is needed, so not a layer's last product.
    forward = 2 * sizes.tokens * sum(a * b for name, (a, b) in matrices(text).items() if name != "down_proj")
    attention = 2 * text.num_attention_heads * head_size(text) * sizes.tokens * sizes.attended
    pictures = sizes.shape.image_tokens + 1
    tower = 2 * counts["vision tower"] * pictures + 4 * sizes.shape.vision.hidden_size * pictures**2 * (
        sizes.shape.vision.num_hidden_layers
    )
    head = text.hidden_size * text.vocab_size * sizes.supervised
    projected = sizes.image_tokens / sizes.samples_per_picture
    return {
        "language model": layers * (each + again * forward),
        "attention": layers * attention * (3 + again),
        "head": head * (6 if training.language_mode == "full" else 4),
        "projector": counts["projector"] * projected * (6 if training.projector.learns else 2),
        "vision tower": tower * tower_share(spec, sizes.samples_per_picture),
    }


def tower_share(spec: RunSpec, samples_per_picture: float) -> float:
    """How many times the tower sees a sample's picture: once for those that share it, or once in all where its features
    are kept."""
    counted = [
        spec.training.max_steps and spec.training.max_steps * spec.training.samples_per_step,
        spec.training.max_samples,
    ]
    counts = [count for count in counted if count]
    if not spec.training.step.keep_features or not counts:
        return 1 / samples_per_picture
    return min(1 / samples_per_picture, spec.data.max_samples / min(counts))


def asking(spec: RunSpec, sizes: Sizes) -> float:
    """Operations of the evaluation, answers of the longest length."""
    language, counts = sizes.shape.counts["language model"], sizes.shape.counts
    read = (CONDITIONS + LOSSES) * (sizes.image_tokens + QUESTION_TOKENS) + CONDITIONS * spec.evaluation.max_new_tokens
    picture = 2 * counts["vision tower"] * (sizes.shape.image_tokens + 1)
    return spec.evaluation.max_samples * (2 * language * read + picture)


def planned_samples(spec: TrainingSpec, sample_seconds: float) -> int:
    """Samples that the budget allows, if each takes so long."""
    hours = [
        spec.max_minutes / 60 if spec.max_minutes else math.inf,
        spec.max_cost / spec.price_per_hour if spec.max_cost else math.inf,
    ]
    counts = [
        spec.max_steps * spec.samples_per_step if spec.max_steps else math.inf,
        spec.max_samples or math.inf,
        max(1, min(hours) * 3600 / sample_seconds),
    ]
    return int(min(counts))


def step_seconds(spec: RunSpec, sizes: Sizes, device: Device, precision: Precision, tokens: int) -> float:
    """Seconds of one optimizer step. Cards share it, and what they tell each other is not counted; processes on a CPU
    have the cores of one."""
    training = spec.training
    number = num_cards(training, device)
    in_step, counted = math.ceil(training.samples_per_step / number), operations(spec, sizes)
    total = sum(counted.values())
    if training.language_mode != "full":  # the packed step spares most of the last layer
        total -= counted["language model"] * LAST_LAYER / sizes.text.num_hidden_layers
    speed = sustained(device, precision, sizes, training, tokens)
    passes = math.ceil(in_step * sizes.tokens / tokens)
    seconds = in_step * total / speed * (NF4_SLOWER if training.lora.quantize and not device.on_cpu else 1)
    if training.language_mode == "full":
        seconds *= PADDED_SLOWER
    if not device.on_cpu:  # kernels are launched one by one: that takes longer than a small pass
        seconds = max(seconds, passes * sizes.text.num_hidden_layers * LAUNCH_SECONDS)
    split = number if training.language_mode == "full" else 1
    return seconds + sum(sizes.trainable.values()) / split * ADAMW_BYTES / device.bandwidth


def sustained(device: Device, precision: Precision, sizes: Sizes, training: TrainingSpec, tokens: int) -> float:
    """Useful operations per second of a training step: of the table, or measured on this machine."""
    if device.name != HERE:
        return device.efficiency * device.flops[precision]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.on_cpu:
        return layer_flops(sizes.text, training, tokens, sizes.tokens, max(sizes.attended, sizes.tokens), dtype)
    return device.efficiency * measured_flops(torch.device("cuda"), dtype)


def evaluation_seconds(spec: RunSpec, sizes: Sizes, device: Device, precision: Precision, step: float) -> float:
    """Seconds of the evaluation, if every answer is as long as it may be. A card reads all weights for every token."""
    speed = spec.training.samples_per_step * sum(operations(spec, sizes).values()) / step
    if device.name != HERE or not device.on_cpu:
        speed = device.efficiency * (device.flops[precision] or 1e13)
    seconds = asking(spec, sizes) / speed
    if device.on_cpu:
        return seconds
    weights = sizes.shape.counts["language model"] * ITEMSIZE[precision]
    token: float = max(weights / device.bandwidth, sizes.text.num_hidden_layers * DECODE_SECONDS)
    batches = math.ceil(spec.evaluation.max_samples / spec.evaluation.batch_size)
    return seconds + CONDITIONS * batches * spec.evaluation.max_new_tokens * token
