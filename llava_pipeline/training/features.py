"""Tower features of the pictures of a step: kept from one computation, or computed for every step.

Nothing that the tower computes depends on the projector, so features can be kept. That pays only where a picture is
seen again: one pass over the data takes the tower as often with a cache as without one, and the cache takes disk
besides (SiQ-VL and mlx-vlm measured none of the gain that was expected, or a loss; docs/decisions.md).

Features are kept in files of ``FILE_PICTURES`` pictures below ``<folder>/<key>/``, each with its digest in its name.
Pictures that are computed together are always the same ones, so what is kept is the same however often a run is killed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_pipeline.errors import DamagedArtifact
from llava_pipeline.model.tower import feature_width, tower_features
from llava_pipeline.spec import TrainingSpec
from llava_pipeline.store import sha256_of, tell_disk_full
from llava_pipeline.training.stored import Stored
from llava_pipeline.training.world import World

log = logging.getLogger(__name__)
FILE_PICTURES, BATCH_PICTURES = 512, 64
MAX_SHARE_OF_TIME = 0.1  # of a budget in minutes that may go into features that are kept
Normalise = Callable[[Tensor], Tensor]
Pixels = Tensor | Stored  # (N, S, S, 3) uint8


class StepFeatures(Protocol):
    """Features by picture number, of the pictures of one step."""

    def load(self, images: Sequence[int], following: Sequence[int]) -> None:
        """Make the features of a step's pictures ready; those of the step after it may be begun to read."""

    def __call__(self, images: list[int]) -> Tensor:
        """(I, P, D_vision) features of some of them, on the device."""


class Picked:
    """What is ready for the step that runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ready: Tensor | None = None
        self.place: dict[int, int] = {}

    def put(self, images: Sequence[int], features: Tensor) -> None:
        """Features of these pictures, in this order."""
        self.ready, self.place = features, {image: k for k, image in enumerate(images)}

    def __call__(self, images: list[int]) -> Tensor:
        """Features of some of them."""
        if self.ready is None:
            raise RuntimeError("features were asked for before they were loaded")
        return self.ready[[self.place[image] for image in images]]


class Computed(Picked):
    """The tower runs for every step, in one batch. Where a card computes, the next step's pictures are read meanwhile.

    On a CPU they are not: a second thread that uses torch gets OpenMP threads of its own, and with more threads than
    cores OpenMP lets them all sleep between two operations, which made a step a quarter slower (docs/decisions.md).
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, pixels: Pixels, normalise: Normalise, device: torch.device
    ) -> None:
        super().__init__(device)
        self.model, self.pixels, self.normalise = model, pixels, normalise
        self.reader: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            self.reader = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self.coming: tuple[tuple[int, ...], Future[Tensor]] | None = None

    def load(self, images: Sequence[int], following: Sequence[int]) -> None:
        """Run the tower on a step's pictures."""
        wanted = tuple(dict.fromkeys(images))
        if self.coming is not None and self.coming[0] == wanted:
            pixels = self.coming[1].result()
        else:
            pixels = self.read(wanted)
        if self.reader is not None:
            coming = tuple(dict.fromkeys(following))
            self.coming = (coming, self.reader.submit(self.read, coming))
        self.put(wanted, compute(self.model, pixels, self.normalise, self.device))

    def read(self, images: Sequence[int]) -> Tensor:
        """(I, S, S, 3) uint8 of some pictures, where a copy to the device can overlap with work."""
        pixels = self.pixels[list(images)]
        return pixels.pin_memory() if self.device.type == "cuda" else pixels


class Kept(Picked):
    """Features from files that lie in memory as far as they are used."""

    def __init__(self, files: list[Tensor], device: torch.device) -> None:
        super().__init__(device)
        self.files = files

    def load(self, images: Sequence[int], following: Sequence[int]) -> None:
        """Gather a step's features."""
        wanted = list(dict.fromkeys(images))
        if wanted:
            rows = [self.files[image // FILE_PICTURES][image % FILE_PICTURES] for image in wanted]
            self.put(wanted, torch.stack(rows).to(self.device, non_blocking=True))
        else:
            self.put([], self.files[0][:0].to(self.device))


def compute(model: LlavaForConditionalGeneration, pixels: Tensor, normalise: Normalise, device: torch.device) -> Tensor:
    """Features of (I, S, S, 3) uint8 pictures, in batches of one size."""
    if len(pixels) == 0:
        shape = (0, int(model.config.image_seq_length), feature_width(model.config))
        return torch.empty(shape, dtype=model.model.vision_tower.dtype, device=device)
    batches = [batch.to(device, non_blocking=True) for batch in pixels.split(BATCH_PICTURES)]
    return torch.cat([tower_features(model, normalise(batch)) for batch in batches])


def bytes_per_picture(model: LlavaForConditionalGeneration) -> int:
    """Of kept features."""
    config, tower = model.config, model.model.vision_tower
    return int(config.image_seq_length * feature_width(config) * tower.dtype.itemsize)


def worth_keeping(
    model: LlavaForConditionalGeneration, pixels: Pixels, normalise: Normalise, spec: TrainingSpec, num_samples: int,
    device: torch.device,
) -> bool:  # fmt: skip
    """Whether features are kept: the disk may be used, and a picture is seen more than once within the budget."""
    num, size = len(pixels), bytes_per_picture(model)
    if not spec.step.keep_features or num == 0 or num * size > spec.features_gb * 1e9:
        return False
    counted = [spec.max_steps * spec.samples_per_step if spec.max_steps else None, spec.max_samples]
    counts = [count for count in counted if count is not None]
    uses = min(counts) / num_samples if counts else None
    started = time.monotonic()
    compute(model, pixels[: min(8, num)], normalise, device).sum().item()
    seconds = (time.monotonic() - started) / min(8, num) * num
    if uses is None:
        minutes = min(filter(None, (spec.max_minutes, _minutes_of_cost(spec))))
        keep = seconds < MAX_SHARE_OF_TIME * 60 * minutes
        why = f"it takes about {seconds:.0f} s of {minutes:g} min"
    else:
        keep = uses > 1
        why = f"each is used {uses:.2g} times, and it pays from more than one on"
    told = f"kept ({num * size / 1e6:.0f} MB)" if keep else "computed for every step"
    log.info("tower features of %d pictures are %s: %s", num, told, why)
    return keep


def _minutes_of_cost(spec: TrainingSpec) -> float | None:
    return 60 * spec.max_cost / spec.price_per_hour if spec.max_cost else None


def keep(
    model: LlavaForConditionalGeneration, pixels: Pixels, normalise: Normalise, folder: Path, allowed_bytes: float,
    world: World,
) -> Kept:  # fmt: skip
    """Features of all pictures from ``folder``, which is this data set's and this tower's; what is not there is made.

    Every process makes its own part of the files.

    Raises:
        DiskFull: no space left for them.
    """
    if world.rank == 0:
        make_room(folder, allowed_bytes - len(pixels) * bytes_per_picture(model))
    world.wait()
    starts = range(0, len(pixels), FILE_PICTURES)
    for number in range(world.rank, len(starts), world.size):
        if _whole(folder, number) is None:
            part = pixels[starts[number] : starts[number] + FILE_PICTURES]
            _write(folder, number, compute(model, part, normalise, world.device).cpu())
    world.wait()
    return Kept([_read(folder, number) for number in range(len(starts))], world.device)


def make_room(folder: Path, allowed_bytes: float) -> None:
    """Remove the features of other data sets, the longest unused first, until the rest is within what is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for half_written in folder.glob(".writing-*"):
        if not is_running(int(half_written.name.split("-")[-1])):
            half_written.unlink(missing_ok=True)
    others = sorted((path for path in folder.parent.iterdir() if path != folder), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(file.stat().st_size for file in path.glob("*")) for path in others}
    for path in others:
        if sum(sizes.values()) <= allowed_bytes:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _whole(folder: Path, number: int) -> Path | None:
    """The file of this number if it is there and as it was written; a damaged one is removed."""
    for path in folder.glob(f"{number:05d}-*.safetensors"):
        if path.stem.split("-")[1] == sha256_of(path):
            return path
        log.warning("kept features %s are damaged; they are computed again", path.name)
        path.unlink()
    return None


def _read(folder: Path, number: int) -> Tensor:
    """The features in the file of this number, which has just been made.

    Raises:
        DamagedArtifact: it is no longer there.
    """
    if (path := _whole(folder, number)) is None:
        raise DamagedArtifact(f"kept features {number} in {folder} are gone; start the training again")
    return load_file(path)["features"]


def _write(folder: Path, number: int, features: Tensor) -> None:
    content = save({"features": features.contiguous()})
    temporary = folder / f".writing-{number:05d}-{os.getpid()}"
    try:
        temporary.write_bytes(content)
        temporary.replace(folder / f"{number:05d}-{hashlib.sha256(content).hexdigest()}.safetensors")
    except OSError as error:
        tell_disk_full(error, folder)
        raise
    finally:
        temporary.unlink(missing_ok=True)
