"""Where and in which precision a model runs."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from llava_pipeline.errors import SpecError
from llava_pipeline.model.devices import cpu_computes_bf16


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

    ``auto`` takes bf16 only where the device computes in it: a T4 emulates it, slowly, and gets fp16; a CPU without
    AVX512-BF16 gets fp32 (bf16 products take six times as long on one; docs/decisions.md).
    """
    if name == "auto" and device.type == "cpu":
        name = "bf16" if cpu_computes_bf16() else "fp32"
    elif name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def place(
    model: LlavaForConditionalGeneration, device: torch.device, precision: torch.dtype, *, learns_whole: bool = False,
    sharded: bool = False,
) -> None:  # fmt: skip
    """Frozen weights in their precision, what learns and all buffers in float32, everything on the device. A language
    model that is to be ``sharded`` stays where it is: whole, it may be larger than the device.

    Rounded rotary frequencies would turn later tokens by angles that are wrong in proportion to their position; and
    what a step adds to a weight in 16 bits is mostly rounded away.
    """
    frozen = [model.model.vision_tower]
    if not learns_whole:
        frozen += [model.model.language_model, model.lm_head]
    for part in frozen:
        for parameter in part.parameters():
            if not parameter.dtype.is_floating_point:  # in 4 bits
                continue
            parameter.data = parameter.data.to(device, precision)
    for part in (model.model.vision_tower, model.model.multi_modal_projector) if sharded else (model,):
        part.to(device)


def device_name(device: torch.device) -> str:
    """For people: the card's name, or cpu with its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the card, or resident in this process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:  # not ru_maxrss: a process begins with the peak of the one that started it
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
