"""One training from its job to its result, in a folder of its own, whatever happens on the way.

    <out>/history.jsonl    a line per step, the same bytes however often the process was killed
    <out>/checkpoints/     the newest two
    <out>/result/          laid out as a checkpoint: the projector and what is to be told of it, once it is done

It tells what happens as JSON lines on standard output: ``step``, ``note``, ``error``, ``done``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from llava_pipeline.errors import FrozenWeightsChanged, Interrupted, NothingToLearn, OtherTraining, SpecError
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava, load
from llava_pipeline.model.freeze import count_parameters, frozen_digest, learned, let_learn
from llava_pipeline.model.memory import adapter_parameters, tokens_per_pass, training_bytes
from llava_pipeline.model.quantize import to_nf4
from llava_pipeline.model.speed import measured_flops
from llava_pipeline.store import home, open_artifact, tell_disk_full
from llava_pipeline.training import checkpoint, features
from llava_pipeline.training.budget import Used, share
from llava_pipeline.training.device import (
    choose_device,
    choose_precision,
    device_name,
    peak_memory,
    place,
)
from llava_pipeline.training.job import TrainingJob, read_samples
from llava_pipeline.training.llama import can_run, halve
from llava_pipeline.training.loop import MAX_BAD_IN_A_ROW, Pace, Place, StepRecord, Task, make_learner, train
from llava_pipeline.training.shard import gathered, local, shard, split_as
from llava_pipeline.training.step import PackedStep, make_step
from llava_pipeline.training.stored import in_order
from llava_pipeline.training.words import start_with_words
from llava_pipeline.training.work import useful_flops
from llava_pipeline.training.world import World, join, leave

log = logging.getLogger(__name__)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


class StopAsked:
    """Whether somebody asked this process to stop: by a signal, or by no longer reading what it tells."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT end the training after the step that runs."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.asked.set())

    def __call__(self) -> bool:
        return self.asked.is_set()


class Teller:
    """Tells the one who started this process what happens, a JSON object a line."""

    def __init__(self, stream: TextIO, stop: StopAsked) -> None:
        self.stream, self.stop = stream, stop

    def __call__(self, event: str, **fields: Any) -> None:
        """Tell; when nobody reads any more, nobody waits for the result, and the training saves itself and ends."""
        try:
            print(json.dumps({"event": event, **fields}), file=self.stream, flush=True)
        except BrokenPipeError:
            self.stop.asked.set()
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def run(job: TrainingJob, out: Path, tell: Teller, stop: StopAsked, allow_change: bool = False) -> None:
    """Train, or go on with a training, until its budget is used up.

    Raises:
        OtherTraining: the folder holds another training, or one that is running.
        Interrupted: it was asked to stop, and has saved where it was.
        Diverged: the loss stopped being a number.
        OutOfMemory: one sample takes more memory than there is.
        FrozenWeightsChanged: a frozen part differs afterwards.
    """
    began = time.monotonic()
    world = join(choose_device(job.spec.device))
    try:
        with locked(out, world):
            checkpoint.sweep(out / "result")
            if (finished := checkpoint.newest(out / "result")) is not None:
                refuse_another(finished[1]["identity"], job.identity(), allow_change, out)
            else:
                Training(job, out, world, began).run(tell, stop, allow_change)
        if world.rank == 0:
            tell("done")
    finally:
        leave(world)


@contextmanager
def locked(out: Path, world: World) -> Iterator[None]:
    """The folder for this training alone.

    Raises:
        OtherTraining: another process trains there.
        SpecError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"cannot make the folder {out} ({error.strerror}); name another one") from error
    with (out / "lock").open("w") as file:
        if world.rank == 0:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OtherTraining(
                    f"another process trains in {out}; wait for it, stop it, or name another folder"
                ) from error
        world.wait()
        yield


class Training:
    """A training while it runs: the live model and what is on disk of it."""

    def __init__(self, job: TrainingJob, out: Path, world: World, began: float) -> None:
        self.job, self.out, self.world, self.spec, self.began = job, out, world, job.spec, began
        torch.use_deterministic_algorithms(True, warn_only=True)
        # torch would fill every new buffer, lest one is read before it is written; none is.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.manual_seed(self.spec.seed)  # nothing draws a number today; who does so tomorrow goes on with the same
        self.dtype = choose_precision(self.spec.precision, world.device)
        whole = job.spec.language_mode == "full"
        split = whole and world.size > 1
        self.llava = load_frozen(job, world.device, self.dtype, sharded=split)
        self.sharded = shard(self.llava.model, self.dtype, world) if split else None
        self.learned = learned(self.llava.model, job.spec)
        self.before = frozen_digest(self.llava.model)
        self.task = self.make_task()
        self.learner = make_learner(self.learned, self.spec, self.dtype)
        count = sum(local(parameter).numel() for parameter in self.learned.values())
        text = self.llava.model.config.text_config
        fitting = tokens_per_pass(text, self.dtype.itemsize, world.device, self.spec, count)
        self.place = Place(tokens_per_pass=self.spec.tokens_per_pass or fitting)
        self.peak_flops = 0.0

    def make_task(self) -> Task:
        """Samples, their features and the steps."""
        model, image_token = self.llava.model, int(self.llava.model.config.image_token_index)
        samples, pixels = read_samples(self.job.train, image_token)
        if len(pixels) == 0:
            raise NothingToLearn(f"none of the {len(samples)} samples has a picture; check the data")
        normalise, device = self.llava.processor.normalise, self.world.device
        arguments = (model, pixels, normalise)
        ready: features.StepFeatures
        # One process decides: it may go by the clock.
        pays = self.world.rank == 0 and features.worth_keeping(*arguments, self.spec, len(samples), device)
        if self.world.add([float(pays)])[0]:
            folder = home() / "features" / self.features_key()
            ready = features.keep(*arguments, folder, self.spec.features_gb * 1e9, self.world)
        else:
            ready = features.Computed(*arguments, device)
        step = make_step(model, samples, ready, self.dtype, self.spec.step, sharded=self.sharded)
        if self.job.held_out is None or self.spec.held_out_samples == 0:
            return Task(step, ready)
        samples, pixels = read_samples(self.job.held_out, image_token)
        samples = samples.first(self.spec.held_out_samples)
        seen = features.Computed(model, pixels, normalise, device)
        seen.load(samples.images_of(range(len(samples))), [])
        held_out = make_step(model, samples, seen, self.dtype, self.spec.step, like=step, sharded=self.sharded)
        return Task(step, ready, held_out)

    def features_key(self) -> str:
        """Of kept features: everything that they depend on."""
        model = self.job.model
        tower = sorted(model.backbones.vision_tower.sha256.items())
        spec = model.spec
        layer = (spec.vision_feature_layer, spec.vision_feature_select_strategy, model.image_size, spec.pixel_shuffle)
        parts = (
            self.job.train.digest,
            tower,
            layer,
            str(self.dtype),
            device_name(self.world.device),
            torch.__version__,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def run(self, tell: Teller, stop: StopAsked, allow_change: bool) -> None:
        """From the newest checkpoint on to the result.

        Raises:
            Interrupted: it was asked to stop.
        """
        history_bytes = self.restore(allow_change)
        if self.wants_words():
            self.begin_with_words()
        self.peak_flops = measured_flops(self.world.device, self.dtype)
        # One clock counts for all processes, or their learning rates would differ.
        (own,) = self.world.add([time.monotonic() - self.began if self.world.rank == 0 else 0.0])
        self.place.used = replace(self.place.used, seconds=self.place.used.seconds + own)
        saved = time.monotonic()
        with open_history(self.out if self.world.rank == 0 else None, history_bytes) as history:
            for record, pace in train(self.task, self.learner, self.spec, self.world, self.place, stopped=stop):
                self.tell_step(record, pace, history, tell)
                diverged = self.place.bad_in_a_row >= MAX_BAD_IN_A_ROW  # never saved: going on would hide it
                # Who gathers weights needs all processes, so one clock decides here too.
                due = self.world.rank == 0 and time.monotonic() - saved >= self.spec.checkpoint_seconds
                if self.world.add([float(due)])[0] and not diverged:
                    self.save(history)
                    saved = time.monotonic()
            if share(self.spec, self.place.used) < 1:
                self.save(history)
                raise Interrupted(f"stopped after step {self.place.used.steps}; start it again to go on from there")
        self.finish()

    def wants_words(self) -> bool:
        """Whether nothing else has brought the projector its weights: a version, or a checkpoint of one that learns."""
        restored = self.place.used.steps > 0 and self.spec.projector.learns
        return self.spec.projector_start == "words" and self.job.begin is None and not restored

    def begin_with_words(self) -> None:
        """First weights for the projector, the same in every process."""
        processor = self.llava.processor
        special = set(processor.tokenizer.convert_tokens_to_ids(list(processor.special_tokens)))
        start_with_words(self.llava.model, self.task.step.samples, self.task.features, special)
        self.world.spread(self.llava.model.model.multi_modal_projector.parameters())

    def tell_step(self, record: StepRecord, pace: Pace, history: FileIO, tell: Teller) -> None:
        """A step into the history, and to whoever listens, with what this run alone knows of it."""
        if self.world.rank:
            return
        append(history, json.dumps(record.as_json()), self.out)
        flops = useful_flops(self.llava.model, self.task.step.samples, record.samples) / pace.seconds
        tell(
            "step", **record.as_json(), **asdict(pace), time=time.time(), num_processes=self.world.size,
            total_seconds=self.place.used.seconds, peak_memory_bytes=peak_memory(self.world.device),
            share=min(1.0, share(self.spec, self.place.used)), useful_flops_per_second=flops,
            mfu=flops / (self.peak_flops * self.world.size),
            cost=self.place.used.seconds / 3600 * self.spec.price_per_hour,
        )  # fmt: skip

    def restore(self, allow_change: bool) -> int:
        """Go on from the newest whole checkpoint; how many bytes of the history belong to it.

        Raises:
            OtherTraining: it is of another spec, seed, data or library version.
        """
        folder = self.out / "checkpoints"
        checkpoint.sweep(folder)
        written = (self.out / "history.jsonl").stat().st_size if (self.out / "history.jsonl").exists() else 0
        if (found := checkpoint.newest(folder, lambda state: state["history_bytes"] <= written)) is None:
            return 0
        tensors, state = found
        refuse_another(state["identity"], self.job.identity(), allow_change, self.out)
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(split_as(tensors[name], parameter))
        moments = {
            number: {
                key: tensors[f"{name}.{key}"] if key == "step" else split_as(tensors[f"{name}.{key}"], parameter)
                for key in MOMENTS
                if f"{name}.{key}" in tensors
            }
            for number, (name, parameter) in enumerate(self.learned.items())
        }
        empty = self.learner.optimizer.state_dict()
        self.learner.optimizer.load_state_dict({**empty, "state": {n: m for n, m in moments.items() if m}})
        if state["scaler"]:
            self.learner.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(tensors["generator"])
        used = Used(**state["place"].pop("used"))
        self.place = Place(used=used, **state["place"])
        log.info("going on after step %d", used.steps)
        return int(state["history_bytes"])

    def save(self, history: FileIO) -> None:
        """Write a checkpoint; the history is on the disk before it."""
        tensors = {"generator": torch.get_rng_state(), **dict(self.learned_and_moments())}
        if self.world.rank:
            self.help_to_gather(tensors)
            return
        os.fsync(history.fileno())
        state = {
            "identity": self.job.identity(), "place": asdict(self.place), "scaler": self.learner.scaler.state_dict(),
            "history_bytes": history.tell(),
        }  # fmt: skip
        checkpoint.write(self.out / "checkpoints", self.place.used.steps, tensors, state, on_host)

    def learned_and_moments(self) -> Iterator[tuple[str, Tensor]]:
        """What is learned, and what AdamW remembers of it, by name."""
        for name, parameter in self.learned.items():
            yield name, parameter
            moments = self.learner.optimizer.state.get(parameter, {})
            yield from ((f"{name}.{key}", moments[key]) for key in MOMENTS if key in moments)

    def help_to_gather(self, tensors: dict[str, Tensor]) -> None:
        """What the process that writes asks of the others: their parts of each tensor, when it is its turn."""
        if self.sharded is not None:
            for tensor in in_order(tensors).values():
                gathered(tensor)

    def finish(self) -> None:
        """Prove that what was frozen is unchanged, and put the result in place.

        Raises:
            FrozenWeightsChanged: it is not; there is no result then.
        """
        after = frozen_digest(self.llava.model)
        if after != self.before:
            raise FrozenWeightsChanged("a frozen part changed during training; this is a defect, please report it")
        weights = projector.state_of(self.llava.model) | self.learned
        if self.spec.language_mode == "lora":
            weights[adapter.SCALE] = adapter.scale(self.llava.model.model.language_model)
        if self.world.rank:
            self.help_to_gather(weights)
            return
        measured, predicted = peak_memory(self.world.device), self.predicted_memory()
        log.info("peak memory %.2f GB, %.2f GB were predicted", measured / 1e9, predicted / 1e9)
        state = {
            "identity": self.job.identity(), "num_steps": self.place.used.steps, "num_samples": self.place.used.samples,
            "num_skipped_steps": self.place.num_skipped, "seconds": self.place.used.seconds,
            "device": device_name(self.world.device), "num_processes": self.world.size,
            "precision": str(self.dtype).removeprefix("torch."), "peak_memory_bytes": measured,
            "predicted_memory_bytes": predicted, "peak_flops": self.peak_flops, "frozen_digest": self.before,
            "cost": self.place.used.seconds / 3600 * self.spec.price_per_hour,
            "num_learned": sum(parameter.numel() for parameter in self.learned.values()),
        }  # fmt: skip
        checkpoint.write(self.out / "result", self.place.used.steps, weights, state, on_host)

    def predicted_memory(self) -> int:
        """What ``plan`` would have said of this training, in one of its processes."""
        model = self.llava.model
        counts = {part: total for part, (total, _) in count_parameters(model).items()}
        stored = model.lm_head.weight.dtype.itemsize
        samples = self.task.step.samples
        config, num_again = model.config, 0  # samples whose picture the one before has shown
        if isinstance(self.task.step, PackedStep) and self.task.step.shares is not None:
            num_again = len(samples) - len(samples.runs) + 1
        once = len(samples.ids) - num_again * int(config.image_seq_length)
        in_step = -(-self.spec.samples_per_step // self.world.size) * once // len(samples)
        tokens = min(self.place.tokens_per_pass, in_step)
        counts["language model"] -= adapter_parameters(config.text_config, self.spec)
        return training_bytes(
            config.text_config, counts, tokens, self.dtype.itemsize, stored, self.world.device.type == "cpu",
            self.spec, config.vision_config, int(config.image_seq_length), -(-in_step // tokens), self.world.size,
        )  # fmt: skip


def on_host(tensor: Tensor) -> Tensor:
    """All of a tensor, where files are written from; with the parts that other processes have."""
    return gathered(tensor.detach()).cpu()


def load_frozen(job: TrainingJob, device: torch.device, dtype: torch.dtype, sharded: bool = False) -> Llava:
    """The model where it is to run, its weights in the precision of products or, without loss, in the half of it; what
    learns has a gradient, and what was learned before is in its place. A language model that is to be ``sharded`` stays
    on the host until then."""
    llava = load(job.model)
    whole = job.spec.language_mode == "full"
    language_model = llava.model.model.language_model
    in_four_bits = job.spec.lora.quantize is not None and job.spec.language_mode == "lora"
    if in_four_bits:
        to_nf4(language_model, dtype)
    place(llava.model, device, dtype, learns_whole=whole, sharded=sharded)
    lossless = job.spec.step.halve and not whole and not in_four_bits and can_run(llava.model.config.text_config)
    if dtype == torch.float32 and lossless:
        halve(language_model, llava.model.lm_head)
    if job.begin is not None:
        begin = projector.load(open_artifact(job.begin), job.model, spoken_otherwise=True)
        projector.begin_with(llava.model, begin, job.spec)
    let_learn(llava.model, job.spec)
    return llava


@contextmanager
def open_history(out: Path | None, num_bytes: int) -> Iterator[FileIO]:
    """The history file behind its first ``num_bytes``; what steps wrote after the last checkpoint is written again."""
    path = Path(os.devnull) if out is None else out / "history.jsonl"
    with path.open("ab", buffering=0) as file:  # a buffer would be written once more while an error is on its way
        if out is not None:
            file.truncate(num_bytes)
            file.seek(num_bytes)
        yield file


def append(history: FileIO, line: str, out: Path) -> None:
    """A line at the end of the history.

    Raises:
        DiskFull: no space left for it.
    """
    left = memoryview(f"{line}\n".encode())
    try:
        while left:
            left = left[history.write(left) :]
    except OSError as error:
        tell_disk_full(error, out)
        raise


def refuse_another(theirs: dict[str, Any], ours: dict[str, Any], allow_change: bool, out: Path) -> None:
    """Refuse to go on with a training that is not this one, unless told to.

    Raises:
        OtherTraining: a spec, a seed, the data or a library's version differs.
    """
    different = list(differences(theirs, ours))
    if not different:
        return
    if not allow_change:
        raise OtherTraining(
            f"{out} holds a training with {'; '.join(different[:3])}; use another folder, or --allow-change to go on "
            "with it all the same"
        )
    log.warning("going on with a training that had %s", "; ".join(different))


def differences(theirs: Any, ours: Any, where: str = "") -> Iterator[str]:
    """What is not equal, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            yield from differences(theirs.get(key), ours.get(key), f"{where}.{key}" if where else key)
    elif theirs != ours:
        yield f"{where}={_short(theirs)} (now {_short(ours)})"


def _short(value: Any) -> str:
    return str(value)[:12]
