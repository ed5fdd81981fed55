"""Stage 4: the projector learns, in a process of its own; everything else is digested before and after to prove it
did not."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from llava_pipeline.contracts import ArtifactRef, AssembledModel, Beginning, Snapshot, TrainedProjector, ValidatedData
from llava_pipeline.data.record import turn
from llava_pipeline.data.snapshot import Rows, open_rows
from llava_pipeline.errors import TrainerDied
from llava_pipeline.model import projector
from llava_pipeline.model.devices import here, num_processes
from llava_pipeline.model.processor import Processor
from llava_pipeline.model.read_processor import processor_of
from llava_pipeline.progress import bar
from llava_pipeline.spec import Rounds, TrainingSpec
from llava_pipeline.store import home, write_text, writing
from llava_pipeline.training import checkpoint
from llava_pipeline.training.job import PIXELS, TOKENS, TrainingJob
from llava_pipeline.training.launch import Event, launch
from llava_pipeline.training.samples import NO_PICTURE

log = logging.getLogger(__name__)
PICTURES_AT_ONCE = 256
Follow = Callable[[Event], None]
Tokens = np.ndarray[Any, np.dtype[np.int32]]


def train_projector(
    model: AssembledModel, data: ValidatedData, spec: TrainingSpec, beginning: Beginning | None = None,
    follow: Follow = lambda event: None,
) -> TrainedProjector:  # fmt: skip
    """Train from the assembled model's fresh projector, or from a recorded one, and keep what was learned and how.

    A training that was stopped or killed is gone on with: its folder is named after everything it depends on.
    ``follow`` is given every event of the training process.

    Raises:
        Diverged: the loss stopped being a number, or no step could be applied.
        FrozenWeightsChanged: a frozen part differs afterwards; nothing is kept.
        Interrupted: it was asked to stop from outside, and has saved where it was.
        OutOfMemory: one sample alone takes more memory than there is.
        TrainerDied: the process was killed.
    """
    job = make_job(model, data, spec, beginning)
    training = hashlib.sha256(json.dumps(job.identity(), sort_keys=True).encode()).hexdigest()[:32]
    out = home() / "training" / training
    follow({"event": "training", "id": training})
    write_text(out / "job.json", job.model_dump_json(indent=1) + "\n")
    steps = Steps(out)
    with bar("train projector", 100) as advance:
        launch(out / "job.json", out, num_processes(spec, here(spec.device)), watcher(advance, [steps, follow]))
    trained = keep(job, data.train, out, steps.merged()).model_copy(update={"began_with": beginning})
    shutil.rmtree(out, ignore_errors=True)
    return trained


class Steps:
    """What steps told, on disk as well, so that the pace of earlier attempts is not lost."""

    def __init__(self, out: Path) -> None:
        self.path = out / "told.jsonl"
        self.history = out / "history.jsonl"

    def __call__(self, event: Event) -> None:
        """Keep a step."""
        if event["event"] == "step":
            with self.path.open("a", encoding="utf-8") as file:
                print(json.dumps(event), file=file)

    def merged(self) -> list[dict[str, Any]]:
        """Every step of the history with its pace; a step that was trained twice has its last one."""
        pace = {row["step"]: row for row in read_lines(self.path)}
        return [pace.get(row["step"], {}) | row for row in read_lines(self.history)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """JSON lines; a half-written last one is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def watcher(advance: Callable[..., None], followers: list[Follow]) -> Follow:
    """Events to a progress bar of the budget's share, to the log, and to everybody else who follows."""
    shown = 0.0
    losses: list[float] = []

    def watch(event: Event) -> None:
        nonlocal shown
        if event["event"] == "note":
            log.log(logging.WARNING if event["level"] == "warning" else logging.INFO, "%s", event["text"])
        if event["event"] == "step":
            if not event["skipped"]:
                losses.append(event["loss"])
            mean = sum(losses[-20:]) / len(losses[-20:]) if losses else math.nan
            advance(100 * event["share"] - shown, step=event["step"], loss=f"{mean:.3f}")
            shown = 100 * event["share"]
        for follow in followers:
            follow(event)

    return watch


def make_job(
    model: AssembledModel, data: ValidatedData, spec: TrainingSpec, beginning: Beginning | None = None
) -> TrainingJob:
    """What the training process reads: token ids and pictures as the tower wants them, both of the store."""
    processor = processor_of(model)
    train = prepare(processor, open_rows(data.train.rows), None, spec.rounds)
    held_out = None
    if spec.held_out_samples:
        held_out = prepare(processor, open_rows(data.held_out.rows), spec.held_out_samples, spec.rounds)
    begin = beginning.projector if beginning is not None else None
    return TrainingJob(model=model, train=train, held_out=held_out, spec=spec, begin=begin)


def prepare(processor: Processor, rows: Rows, first: int | None, rounds: Rounds) -> ArtifactRef:
    """Samples of the first rows as the training process reads them: no decoding and no template is left to do there."""
    count = len(rows) if first is None else min(first, len(rows))
    used = sorted({image for image in rows.image[:count] if image >= 0})
    number = {image: k for k, image in enumerate(used)}
    ids, labels, image = zip(*samples_of(processor, rows, count, rounds), strict=True)
    tokens = {
        "ids": torch.from_numpy(np.concatenate(ids)),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "begins": torch.tensor([0, *map(len, ids)]).cumsum(0),
        "image": torch.tensor([number.get(one, one) for one in image]),
    }
    with writing("samples") as (folder, done), bar("pictures", len(used)) as advance:
        save_file(tokens, folder / TOKENS)
        write_pixels(folder / PIXELS, processor, rows, used, advance)
    return done[0]


def samples_of(processor: Processor, rows: Rows, count: int, rounds: Rounds) -> Iterator[tuple[Tokens, Tokens, int]]:
    """(T,) ids and labels, and the picture, of every sample of the first rows: of a row, or of each round of it."""
    whole = zip(rows.input_ids[:count], rows.labels[:count], rows.image[:count], strict=True)
    if rounds == "together":
        yield from whole
        return
    with bar("rounds of conversations", count) as advance:
        for row, questions, answers in zip(whole, rows.questions[:count], rows.answers[:count], strict=True):
            if len(questions) == 1:
                yield row
            else:
                image = row[2]
                for question, answer in zip(questions, answers, strict=True):
                    encoded = processor.encode([turn("user", question, image != NO_PICTURE), turn("assistant", answer)])
                    yield np.asarray(encoded.input_ids, np.int32), np.asarray(encoded.labels, np.int32), image
            advance(1)


def write_pixels(path: Path, processor: Processor, rows: Rows, used: list[int], advance: Callable[[int], None]) -> None:
    """(N, S, S, 3) uint8 ``pixels`` in safetensors' format, some at a time: all may be more than memory holds."""
    side = processor.images.side
    shape = [len(used), side, side, 3]
    span = {"dtype": "U8", "shape": shape, "data_offsets": [0, math.prod(shape)]}
    header = json.dumps({"pixels": span}).encode()
    header += b" " * (-len(header) % 8)

    def resized(image: int) -> bytes:
        return processor.resize(rows.picture(image)).tobytes()

    with path.open("wb") as file, ThreadPoolExecutor() as pool:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, len(used), PICTURES_AT_ONCE):
            for pixels in pool.map(resized, used[start : start + PICTURES_AT_ONCE]):
                file.write(pixels)
                advance(1)


def keep(job: TrainingJob, data: Snapshot, out: Path, rows: list[dict[str, Any]]) -> TrainedProjector:
    """The result of a training as artifacts of the store."""
    if (found := checkpoint.newest(out / "result")) is None:
        raise TrainerDied(f"the training in {out} ended without a result; start it again")
    state, told = found
    with writing("history") as (folder, history):
        (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with writing("projector") as (folder, trained):
        facts = {
            "num_steps": told["num_steps"],
            "train_digest": data.rows.digest,
            "training": job.spec.model_dump(mode="json"),
        }
        projector.save(folder, state, job.model, facts)
    held_out, mode = [row["held_out_loss"] for row in rows if row["held_out_loss"] is not None], job.spec.language_mode
    return TrainedProjector(
        model=job.model, data=data, projector=trained[0], history=history[0], num_steps=told["num_steps"],
        num_samples=told["num_samples"], num_skipped_steps=told["num_skipped_steps"], final_loss=last_mean(rows),
        held_out_loss=held_out[-1] if held_out else None, seconds=told["seconds"], cost=told["cost"],
        device=told["device"], num_processes=told["num_processes"], precision=told["precision"],
        peak_memory_bytes=told["peak_memory_bytes"], predicted_memory_bytes=told["predicted_memory_bytes"],
        num_learned=told["num_learned"], learned="projector" if mode == "frozen" else mode,
        frozen_digest_before=told["frozen_digest"], frozen_digest_after=told["frozen_digest"],
    )  # fmt: skip


def last_mean(rows: list[dict[str, Any]], window: int = 20) -> float:
    """Mean loss of the last steps that were applied: one step alone says little."""
    losses = [row["loss"] for row in rows if not row["skipped"]][-window:]
    return sum(losses) / len(losses) if losses else math.nan
