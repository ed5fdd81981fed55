"""Devices that a run can be planned for: memory, speed and price, each with where it comes from.

Nothing here was measured on a card, none was at hand; what is an estimate says so. A training step reaches
``efficiency`` of the ``flops`` that large matrix products sustain: public runs of the same kind reach 28 to 50 % of a
data-centre card's (LLaVA-1.5 on A100: 28 to 35 %, torchtitan's Llama 8B on H100: 33 to 39 % of the peak, SiQ-VL:
40 %), and more of a card whose power limits its products (T4, L4). Prices are public list prices per hour; they change,
so plan with your own (``training.price_per_hour``) where you know it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llava_pipeline.errors import SpecError
from llava_pipeline.spec import TrainingSpec

Precision = Literal["fp32", "bf16", "fp16"]
ITEMSIZE: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
GIB = 1 << 30
HERE = "here"
RESERVE_SHARE = 0.05  # of a card: blocks that the allocator cannot use, and what others have there
CONTEXT_BYTES = 600_000_000  # CUDA's context and its libraries' workspaces (estimate)
RUNPOD = "RunPod community cloud, 2026-11"


@dataclass(frozen=True)
class Device:
    """One device.

    ``flops`` are operations per second that large matrix products sustain, by precision that it computes in; bytes
    per second of ``bandwidth`` are of its memory.
    """

    name: str
    title: str
    memory_bytes: int
    flops: dict[Precision, float]
    efficiency: float
    bandwidth: float
    speed_from: str
    price_per_hour: float | None = None
    price_from: str = ""
    on_cpu: bool = False
    reserve_bytes: int = 0
    kind: str = field(default="cuda")

    def title_of(self, number: int) -> str:
        """Of so many of them."""
        return self.title if number == 1 or self.on_cpu else f"{number} x {self.title}"

    def precision(self, asked: str) -> tuple[Precision, str]:
        """What a run computes in that asks for ``auto``, fp32, bf16 or fp16; and a sentence where that is not what it
        asked for."""
        best: Precision = "bf16" if "bf16" in self.flops else "fp16" if "fp16" in self.flops else "fp32"
        if asked == "auto":
            return best, ""
        for one in self.flops:
            if one == asked:
                return one, ""
        return best, f"it does not compute in {asked}, so {best} is planned; set training.precision=auto"


def num_processes(training: TrainingSpec, device: Device) -> int:
    """Processes that a run has on a device: as many as it is told, else one for each card of this machine."""
    if training.num_processes is not None:
        return training.num_processes
    return max(1, torch.cuda.device_count()) if device.name == HERE and not device.on_cpu else 1


def num_cards(training: TrainingSpec, device: Device) -> int:
    """Devices that a run takes: each process has a card, and all have the one CPU."""
    return 1 if device.on_cpu else num_processes(training, device)


def _card(
    name: str, title: str, gib: int, half: float, single: float, efficiency: float, gb_per_second: float,
    speed_from: str, price: float, price_from: str, bf16: bool = True,
) -> Device:  # fmt: skip
    flops: dict[Precision, float] = {"fp16": half * 1e12, "fp32": single * 1e12}
    if bf16:
        flops["bf16"] = half * 1e12
    return Device(
        name, title, gib * GIB, flops, efficiency, gb_per_second * 1e9, speed_from, price, price_from,
        reserve_bytes=int(RESERVE_SHARE * gib * GIB),
    )  # fmt: skip


_TABLE = (
    _card("t4", "NVIDIA T4", 15, 24, 5, 0.8, 320,
          "24 TFLOP/s measured by a user and explained by NVIDIA (70 W); the rest estimated",
          0.54, "Google Cloud n1-standard-4 with one T4, 2026", bf16=False),
    _card("l4", "NVIDIA L4", 22, 60, 15, 0.7, 300, "half of the 121 TFLOP/s peak, 72 W (estimate)",
          0.44, RUNPOD),
    _card("3090", "RTX 3090", 24, 64, 25, 0.55, 936, "0.9 of the 71 TFLOP/s peak (estimate)", 0.22, RUNPOD),
    _card("4090", "RTX 4090", 24, 150, 60, 0.5, 1008, "0.9 of the 165 TFLOP/s peak (estimate)", 0.34, RUNPOD),
    _card("a100-40", "A100 40 GB", 40, 250, 17, 0.5, 1555, "0.8 of the 312 TFLOP/s peak (estimate)",
          1.99, "Lambda, one of eight, 2026-09"),
    _card("a100-80", "A100 80 GB", 80, 250, 17, 0.5, 1935, "0.8 of the 312 TFLOP/s peak (estimate)", 1.19, RUNPOD),
    _card("h100", "H100 80 GB", 80, 700, 50, 0.45, 3350, "0.7 of the 989 TFLOP/s peak (estimate)", 2.69, RUNPOD),
    _card("h200", "H200", 140, 790, 50, 0.45, 4800, "790 of 989 TFLOP/s (a published measurement); the rest estimated",
          3.59, RUNPOD),
)  # fmt: skip
DEVICES = {device.name: device for device in _TABLE}


def device_named(name: str) -> Device:
    """A device of the table, or this machine.

    Raises:
        SpecError: there is none of this name.
    """
    if name == HERE:
        return here()
    if name not in DEVICES:
        raise SpecError(f"no device {name!r}; there are {', '.join((HERE, *DEVICES))}")
    return DEVICES[name]


def here(asked: str = "auto") -> Device:
    """This machine, not yet measured: its card, if ``asked`` (as in ``training.device``) allows one, else its CPU."""
    if asked != "cpu" and torch.cuda.is_available():
        title, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        words = title.upper().replace("-", " ").split()  # as NVIDIA H100 80GB HBM3, NVIDIA A100-SXM4-40GB
        alike = [one for one in _TABLE if one.name.split("-")[0].upper() in words]
        known = min(alike, key=lambda one: abs(one.memory_bytes - memory), default=None)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(
            HERE, title, int(memory), dict.fromkeys(("fp16", "fp32", *(("bf16",) if bf16 else ())), 0.0),
            known.efficiency if known else 0.5, known.bandwidth if known else 500e9, "measured before a plan",
            reserve_bytes=int(RESERVE_SHARE * memory),
        )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flops: dict[Precision, float] = {"fp32": 0.0, "bf16": 0.0} if cpu_computes_bf16() else {"fp32": 0.0}
    title = f"cpu ({torch.get_num_threads()} threads)"
    return Device(HERE, title, memory, flops, 1.0, 10e9, "measured before a plan", on_cpu=True, kind="cpu")


def cpu_computes_bf16() -> bool:
    """Whether this processor multiplies bfloat16 numbers by itself (AVX512-BF16 or AMX; Linux only)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags
