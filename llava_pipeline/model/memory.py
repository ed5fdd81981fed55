"""How much memory training takes, from configurations alone: what ``plan`` tells and a run is measured against.

Bytes by part, each named. Two moments can be the highest: while the checkpoints are read (in float32, in the process's
own memory), and in the middle of a step. Constants marked *measured* are of ``benchmarks/plan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llava_pipeline.spec import TrainingSpec

LEARNED_BYTES = 16  # of a parameter that learns, beside itself: gradient, two means, a copy on the way
PROCESS_BYTES = 500_000_000  # a process that has loaded torch, transformers and peft and has trained a step, measured
CPU_ACTIVATION_BYTES = 1_500_000_000  # that a pass on a CPU is sized for: larger ones are hardly faster
CPU_FRAGMENTS = 0.6  # of what a pass's tensors take, that a CPU's heap keeps between them besides, measured
CPU_FRAGMENTS_AGAIN = 2.3  # the same where activations are computed again: few stay, and many come and go
SHARE_OF_FREE_MEMORY = 0.6  # of a card, that activations may take
MOST_TOKENS, FEWEST_TOKENS = 1 << 15, 256
HALVED_FROM = 1_000_000_000  # bytes of float32 weights that a CPU keeps in 16 bits where nothing is lost
LAST_LAYER = 0.6  # of the last layer: the packed step runs what follows attention for supervised tokens alone
WEIGHTS_OF_ROW = 64  # of a head, that attention keeps where samples share: half of what it may (training/attention.py)
NF4_BYTES = 0.516  # of a weight in 4 bits, with its block's scale quantized again
CHUNK_ROWS = 256  # positions whose logits exist at once
TOWER_BATCH = 64  # pictures that a tower is given at once
PROJECTOR, ADAPTER, LANGUAGE, TOWER = (
    "projector and optimizer",
    "adapter and optimizer",
    "language model",
    "vision tower",
)
GRADIENTS, ACTIVATIONS, HEAD = "gradients and moments of the language model", "activations", "head and logits"
LIBRARIES, READING, MATRIX = "process and libraries", "more while weights are read", "weights at work"


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides how much memory its training takes.

    ``text`` and ``vision`` are configurations; ``counts`` parameters of ``vision tower``, ``projector`` and ``language
    model``; ``image_tokens`` what the tower computes of a picture, before any are joined.
    """

    text: Any
    vision: Any
    counts: dict[str, int]
    image_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Numbers:
    """In what a device holds numbers: bytes of one in products, of one of the frozen language model at rest."""

    itemsize: int
    stored_itemsize: int
    on_cpu: bool


def head_size(text: Any) -> int:
    """Width of an attention head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def matrices(text: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of the matrices of one layer."""
    wide, inner = text.hidden_size, text.intermediate_size
    queries = text.num_attention_heads * head_size(text)
    keys = (text.num_key_value_heads or text.num_attention_heads) * head_size(text)
    return {
        "q_proj": (wide, queries), "k_proj": (wide, keys), "v_proj": (wide, keys), "o_proj": (queries, wide),
        "gate_proj": (wide, inner), "up_proj": (wide, inner), "down_proj": (inner, wide),
    }  # fmt: skip


def adapter_parameters(text: Any, spec: TrainingSpec) -> int:
    """Parameters of the adapter that a spec asks for; 0 where it asks for none."""
    if spec.language_mode != "lora":
        return 0
    sizes = [both for name, both in matrices(text).items() if name in spec.lora.targets]
    return int(text.num_hidden_layers * spec.lora.rank * sum(map(sum, sizes)))


def per_layer_bytes(text: Any, itemsize: int, spec: TrainingSpec | None = None) -> int:
    """What one token leaves for the backward pass in one layer.

    Frozen: the residual stream twice in float32; rotated queries and keys, values, what attention gives, gate and up in
    the precision of products. An adapter keeps the inputs of its matrices besides, and transformers' own forward, which
    a language model that learns whole runs through, what every operation of it was given.
    """
    sizes = matrices(text)
    (wide, queries), keys, inner = sizes["q_proj"], sizes["k_proj"][1], sizes["gate_proj"][1]
    if spec is not None and spec.language_mode == "full":
        in_float32 = 8 * wide if itemsize < 4 else 0  # norms cast what they are given
        return itemsize * (6 * wide + 6 * queries + 4 * inner) + in_float32
    kept = 8 * wide + itemsize * (2 * queries + 2 * keys + 2 * inner)
    if spec is not None and spec.language_mode == "lora":
        inputs = {name: sizes[name][0] for name in spec.lora.targets if name in sizes}
        shared = [max((inputs.get(one, 0) for one in group), default=0) for group in (
            ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
        )]  # fmt: skip
        kept += itemsize * (sum(shared) + spec.lora.rank * len(inputs))
    if spec is not None and spec.rounds == "apart":  # attention keeps what it padded; on a CPU its weights, too
        kept += itemsize * (queries + 2 * keys)
        kept += 4 * WEIGHTS_OF_ROW * text.num_attention_heads if itemsize == 4 else 0
    return int(kept)


def bytes_per_token(text: Any, itemsize: int, spec: TrainingSpec | None = None) -> int:
    """What one token takes for the backward pass in all layers, and at work in the one that is computed."""
    layer, passing = per_layer_bytes(text, itemsize, spec), 6 * itemsize * text.intermediate_size
    layers = int(text.num_hidden_layers)
    if spec is not None and spec.step.recompute:
        return int(4 * layers * text.hidden_size + layer + passing)
    spared = 0.0 if spec is not None and spec.language_mode == "full" else LAST_LAYER
    return int((layers - spared) * layer + passing)


def tokens_per_pass(
    text: Any, itemsize: int, device: torch.device, spec: TrainingSpec | None = None, num_learned: int = 0
) -> int:
    """Tokens of one pass that a device has room for, by what is free on it now and what ``num_learned`` parameters will
    take for gradients and the optimizer's means."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return fitting_tokens(text, itemsize, free - LEARNED_BYTES * num_learned, device.type == "cpu", spec)


def fitting_tokens(text: Any, itemsize: int, free: float, on_cpu: bool, spec: TrainingSpec | None = None) -> int:
    """Tokens of one pass for which so many bytes of a card, or a CPU, have room."""
    room = float(CPU_ACTIVATION_BYTES) if on_cpu else SHARE_OF_FREE_MEMORY * free
    return int(min(MOST_TOKENS, max(FEWEST_TOKENS, room // bytes_per_token(text, itemsize, spec))))


def memory_by_part(
    shape: Shape, spec: TrainingSpec, numbers: Numbers, tokens: int, pictures: int = TOWER_BATCH, passes: int = 1,
    processes: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Bytes of each part at the highest moment of training, in one process; they add up to it.

    Args:
        shape: of the model.
        spec: what learns, and how.
        numbers: how the device holds them.
        tokens: of one pass.
        pictures: of one step in this process.
        passes: of one step; the gradients of an earlier one lie beside the activations of the next.
        processes: that train together; a language model that learns whole is split over them.
    """
    text, mode, size = shape.text, spec.language_mode, numbers.itemsize
    language, adapter = shape.counts["language model"], adapter_parameters(text, spec)
    one = TOWER_BATCH if pictures > TOWER_BATCH else pictures
    working = max(tokens * bytes_per_token(text, size, spec), one * tower_bytes(shape, size))
    learned = language / processes if mode == "full" else 0
    gradients = 4 * learned * (1 if numbers.on_cpu else 2)  # AdamW has one more copy under way on a card
    beside = gradients if passes == 1 else 0
    parts = {
        LIBRARIES: PROCESS_BYTES if numbers.on_cpu else 0,
        TOWER: shape.counts["vision tower"] * size,
        LANGUAGE: language_bytes(shape, spec, numbers, processes),
        PROJECTOR: shape.counts["projector"] * (4 + LEARNED_BYTES if spec.projector.learns else 4),
    }
    if adapter:
        parts[ADAPTER] = adapter * (4 + LEARNED_BYTES)
    if learned:
        parts[GRADIENTS] = 8 * learned + max(0, gradients - (working if beside else 0))
    fragments = CPU_FRAGMENTS_AGAIN if spec.step.recompute else CPU_FRAGMENTS
    parts[ACTIVATIONS] = int(working * (1 + fragments)) if numbers.on_cpu else working
    parts[HEAD] = head_bytes(shape, spec, numbers, tokens)
    if matrix := matrix_bytes(shape, spec, numbers, processes):
        parts[MATRIX] = matrix
    if numbers.on_cpu:
        reading = PROCESS_BYTES + reading_bytes(shape)
        parts[READING] = max(0, reading - sum(parts.values()))
    return {part: int(num) for part, num in parts.items()}


def language_bytes(shape: Shape, spec: TrainingSpec, numbers: Numbers, processes: int = 1) -> float:
    """The language model's own weights in one process. One that learns whole is in float32, with its copy for products,
    or its part of them where several processes share it."""
    count = shape.counts["language model"]
    if spec.language_mode == "full":
        copied = numbers.itemsize if numbers.itemsize < 4 and processes == 1 else 0
        return count * (4 + copied) / processes
    if spec.lora.quantize == "nf4" and not numbers.on_cpu:
        layers = layer_parameters(shape.text)
        return float(layers * NF4_BYTES + (count - layers) * numbers.itemsize)
    return count * numbers.stored_itemsize


def layer_parameters(text: Any) -> int:
    """Parameters of the matrices of all layers."""
    return int(text.num_hidden_layers * sum(a * b for a, b in matrices(text).values()))


def matrix_bytes(shape: Shape, spec: TrainingSpec, numbers: Numbers, processes: int = 1) -> float:
    """What is whole or cast only while it is at work: of weights that lie in fewer bits than they are multiplied in, a
    layer's largest product's; of weights that processes share, a layer's and the next one's, embeddings and head."""
    text = shape.text
    widest = 2.0 * text.hidden_size * text.intermediate_size * numbers.itemsize
    if spec.language_mode == "full":
        layers = layer_parameters(text)
        whole = shape.counts["language model"] - layers + 2 * layers / text.num_hidden_layers
        return whole * numbers.itemsize if processes > 1 else 0
    if spec.lora.quantize == "nf4" and not numbers.on_cpu:
        return float(widest)
    return 0.0 if numbers.itemsize == numbers.stored_itemsize else 1.5 * float(widest)


def head_bytes(shape: Shape, spec: TrainingSpec, numbers: Numbers, tokens: int) -> float:
    """Logits where they exist at once, and the head in the precision of products."""
    words = int(shape.text.vocab_size)
    if spec.language_mode == "full":
        return SUPERVISED_SHARE * tokens * words * (numbers.itemsize + 12)
    cast = 0 if numbers.itemsize == numbers.stored_itemsize else words * shape.text.hidden_size * 4
    copied = numbers.itemsize if numbers.itemsize < 4 else 0
    return CHUNK_ROWS * words * (4 + copied) + cast


SUPERVISED_SHARE = 0.4  # of a pass's tokens, where the step keeps all their logits


def tower_bytes(shape: Shape, itemsize: int) -> int:
    """What one picture takes on its way through the tower, which keeps nothing for a backward pass."""
    vision = shape.vision
    if vision is None:
        return 0
    inner = getattr(vision, "intermediate_size", None) or int(vision.hidden_size * getattr(vision, "mlp_ratio", 4))
    return int((shape.image_tokens + 1) * itemsize * (6 * vision.hidden_size + 2 * inner))


def reading_bytes(shape: Shape) -> int:
    """Both parts in float32, and the checkpoint of the language model beside its own weights (16 bits, as most are)."""
    return 4 * sum(shape.counts.values()) + 2 * shape.counts["language model"]


def training_bytes(
    text: Any, counts: dict[str, int], tokens: int, itemsize: int, stored_itemsize: int, on_cpu: bool,
    spec: TrainingSpec | None = None, vision: Any = None, image_tokens: int = 0, passes: int = 1, processes: int = 1,
) -> int:  # fmt: skip
    """Bytes at the peak of training, on a card without, on a CPU with the process itself.

    Args:
        text: configuration of the language model.
        counts: parameters of ``vision tower``, ``projector`` and ``language model`` (with its adapter or without).
        tokens: of one pass.
        itemsize: bytes of a number in matrix products.
        stored_itemsize: bytes of a number of the language model at rest.
        on_cpu: whether the process's own memory counts.
        spec: what learns; the projector alone unless told.
        vision: configuration of the vision tower.
        image_tokens: that it gives of a picture.
        passes: of one step.
        processes: that train together, of which this is one.
    """
    spec = spec or TrainingSpec(max_steps=1)
    shape = Shape(text, vision, counts, image_tokens)
    numbers = Numbers(itemsize, stored_itemsize, on_cpu)
    return sum(
        memory_by_part(shape, spec, numbers, tokens, -(-spec.samples_per_step // processes), passes, processes).values()
    )
