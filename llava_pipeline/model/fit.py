"""Whether a run fits a device, and what would have to change where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from llava_pipeline.errors import IncompatibleParts, SpecError
from llava_pipeline.model.devices import CONTEXT_BYTES, DEVICES, ITEMSIZE, Device, Precision, here, num_processes
from llava_pipeline.model.memory import (
    ACTIVATIONS,
    HALVED_FROM,
    LANGUAGE,
    LEARNED_BYTES,
    READING,
    Numbers,
    adapter_parameters,
    fitting_tokens,
    language_bytes,
    memory_by_part,
)
from llava_pipeline.model.sizes import Sizes, sizes_of
from llava_pipeline.spec import Frozen, RunSpec, TrainingSpec

LIBRARIES_BYTES = 700_000_000  # torch, transformers, mlflow and prefect in one process, measured
LEAST_TEXT_TOKENS = 64
WAITING, CONTEXT = "the process that waits for it", "context of the card"
MOST_CARDS = 64


class Remedy(Frozen):
    """A change that saves memory, with all changes before it: what it would bring the device to."""

    change: str
    memory_bytes: int
    fits: bool


def memory(training: TrainingSpec, sizes: Sizes, device: Device, precision: Precision) -> tuple[dict[str, int], int]:
    """Bytes by part on a device, and the tokens of a pass there: as many as a run would choose. Of several processes
    each has a card of its own, or all have the one CPU's memory."""
    size, text, number = ITEMSIZE[precision], sizes.text, num_processes(training, device)
    counts = sizes.shape.counts
    halved = training.step.halve and training.language_mode != "full" and 4 * counts["language model"] >= HALVED_FROM
    numbers = Numbers(size, 2 if device.on_cpu and size == 4 and halved else size, device.on_cpu)
    waits = {WAITING: LIBRARIES_BYTES} if device.on_cpu else {CONTEXT: CONTEXT_BYTES}
    weights = language_bytes(sizes.shape, training, numbers, number) + counts["vision tower"] * size
    learned = sum(count / (number if part == "language model" else 1) for part, count in sizes.trainable.items())
    beside = 4 * (counts["projector"] + sizes.trainable.get("adapter", 0)) + LEARNED_BYTES * learned
    free = device.memory_bytes - CONTEXT_BYTES - weights - beside
    fitting = training.tokens_per_pass or fitting_tokens(text, size, free, device.on_cpu, training)
    own = math.ceil(training.samples_per_step / number)
    in_step = own * sizes.tokens
    tokens = max(min(fitting, in_step), sizes.longest if sizes.longest <= in_step else sizes.tokens)
    passes = math.ceil(in_step / tokens)
    parts = memory_by_part(sizes.shape, training, numbers, tokens, own, passes, number)
    if device.on_cpu:
        parts = {part: number * count for part, count in parts.items()}
    return {part: count for part, count in (waits | parts).items() if count}, tokens


def remedies(spec: RunSpec, sizes: Sizes, device: Device) -> Iterator[Remedy]:
    """What would have to change for a run to fit, the least painful first, each on top of those before it; those that
    save nothing are left out. The last ones change the model or the card."""
    training, room, as_it_is = spec.training, device.memory_bytes - device.reserve_bytes, sizes
    last = sum(memory(training, sizes, device, device.precision(training.precision)[0])[0].values())
    for change, changed, other in lighter(training, sizes, device):
        needed = sum(memory(changed, other, device, device.precision(changed.precision)[0])[0].values())
        if needed < last:
            yield Remedy(change=change, memory_bytes=needed, fits=needed <= room)
            last, training, sizes = needed, changed, other
            if needed <= room:
                break
    else:
        precision = device.precision(training.precision)[0]
        parts, _ = memory(training, sizes, device, precision)
        share = max(0.0, (room - last + parts[LANGUAGE] + parts[ACTIVATIONS]) / (parts[LANGUAGE] + parts[ACTIVATIONS]))
        count = int(share * sizes.shape.counts["language model"] / 1e8) / 10
        if count:
            yield Remedy(
                change=f"a language model of at most about {count:.1f} billion parameters", memory_bytes=room, fits=True
            )
    yield from larger(spec, as_it_is, device)


def lighter(training: TrainingSpec, sizes: Sizes, device: Device) -> Iterator[tuple[str, TrainingSpec, Sizes]]:
    """Changes in order of pain, each with those before it."""
    smallest = max(sizes.tokens, sizes.longest)
    training = training.model_copy(update={"tokens_per_pass": smallest})
    yield f"training.tokens_per_pass={smallest}", training, sizes
    training = training.model_copy(update={"step": training.step.model_copy(update={"recompute": True})})
    yield "training.step.recompute=true", training, sizes
    shorter = max(sizes.image_tokens + LEAST_TEXT_TOKENS, smallest // 2)
    if shorter < smallest:
        training = training.model_copy(update={"tokens_per_pass": shorter})
        sizes = replace(sizes, tokens=min(sizes.tokens, shorter), longest=shorter)
        yield f"data.max_tokens={shorter}", training, sizes
    if training.language_mode == "full":
        part = training.language_model.model_copy(update={"mode": "lora"})
        training = training.model_copy(update={"language_model": part})
        sizes = replace(sizes, trainable={
            "projector": sizes.trainable["projector"], "adapter": adapter_parameters(sizes.text, training)
        })  # fmt: skip
        yield "training.language_model.mode=lora", training, sizes
    if training.language_mode == "lora" and not device.on_cpu:
        training = training.model_copy(update={"lora": training.lora.model_copy(update={"quantize": "nf4"})})
        yield "training.lora.quantize=nf4", training, sizes
    if ITEMSIZE[device.precision(training.precision)[0]] == 4 and len(device.flops) > 1:
        yield "training.precision=auto", training.model_copy(update={"precision": "auto"}), sizes


def larger(spec: RunSpec, sizes: Sizes, device: Device) -> Iterator[Remedy]:
    """The cheapest card that it fits on as it is; where there is none, how many cards hold a part each of a language
    model that learns whole."""
    for card in sorted(DEVICES.values(), key=lambda one: one.price_per_hour or 0.0):
        parts, _ = memory(spec.training, sizes, card, card.precision(spec.training.precision)[0])
        if card.name != device.name and (needed := sum(parts.values())) <= card.memory_bytes - card.reserve_bytes:
            title = card.title_of(num_processes(spec.training, card))
            yield Remedy(change=f"a card with more memory: {title}", memory_bytes=needed, fits=True)
            return
    if spec.training.language_mode != "full":
        return
    card = max(DEVICES.values(), key=lambda one: one.memory_bytes)
    for number in range(2, MOST_CARDS + 1):
        shared = spec.training.model_copy(update={"num_processes": number})
        parts, _ = memory(shared, sizes, card, card.precision(shared.precision)[0])
        if (needed := sum(parts.values())) <= card.memory_bytes - card.reserve_bytes:
            yield Remedy(change=f"{number} cards that share the weights: {card.title}", memory_bytes=needed, fits=True)
            return


def refuse_too_small(spec: RunSpec) -> None:
    """Refuse a run that this machine certainly has no room for, before anything is fetched.

    Generous: all of the device's memory counts, and one sample is a pass.

    Raises:
        SpecError: even that does not fit.
    """
    device = here(spec.training.device)
    try:
        sizes = sizes_of(spec)
    except (
        IncompatibleParts
    ):  # a part that does not state its sizes may fit; what else is wrong is told when it is read
        return
    training = spec.training.model_copy(update={"tokens_per_pass": sizes.tokens})
    parts, _ = memory(training, replace(sizes, longest=sizes.tokens), device, device.precision(training.precision)[0])
    needed = sum(count for part, count in parts.items() if part not in (WAITING, CONTEXT, READING))
    if needed <= device.memory_bytes:
        return
    remedy = next(iter(remedies(spec, sizes, device)), None)
    told = f"; begin with {remedy.change}" if remedy else ""
    raise SpecError(
        f"this machine's {device.title} has {device.memory_bytes / 1e9:.0f} GB of memory, and training {spec.profile} "
        f"takes {needed / 1e9:.0f} GB in the smallest pass; `llava-pipeline plan --profile {spec.profile} --stage "
        f"{spec.stage}` says what would have to change{told}"
    )
