"""Stage 4: the projector learns; everything else is digested before and after to prove it did not."""

from __future__ import annotations

import json
import logging
import resource
import time

import torch

from llava_pipeline.contracts import AssembledModel, Snapshot, TrainedProjector
from llava_pipeline.data.snapshot import Rows, open_rows
from llava_pipeline.errors import FrozenWeightsChanged
from llava_pipeline.evaluation.evaluate import picture_features
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava, load
from llava_pipeline.model.freeze import frozen_digest
from llava_pipeline.progress import bar
from llava_pipeline.spec import TrainingSpec
from llava_pipeline.store import writing
from llava_pipeline.training.loop import Samples, StepRecord, choose_device, choose_precision, place, train

log = logging.getLogger(__name__)
FEATURE_BATCH = 64


def train_projector(model: AssembledModel, data: Snapshot, spec: TrainingSpec) -> TrainedProjector:
    """Train from the assembled model's fresh projector, and keep projector and history.

    Raises:
        Diverged: the loss stopped being a number, or no step could be applied.
        FrozenWeightsChanged: a frozen part differs afterwards; nothing is kept.
    """
    llava = load(model)
    device = choose_device(spec.device)
    precision = choose_precision(spec.precision, device)
    place(llava.model, device, precision)
    before = frozen_digest(llava.model)
    started = time.monotonic()
    samples = prepare(llava, open_rows(data.rows))
    records = run(llava, samples, spec)
    seconds = time.monotonic() - started
    after = frozen_digest(llava.model)
    if after != before:
        raise FrozenWeightsChanged("a frozen part changed during training; this is a defect, please report it")
    with writing("history") as (folder, history):
        (folder / "history.jsonl").write_text("".join(json.dumps(r.as_json()) + "\n" for r in records))
    with writing("projector") as (folder, trained):
        facts = {
            "num_steps": len(records),
            "train_digest": data.rows.digest,
            "training": spec.model_dump(mode="json"),
        }
        projector.save(folder, projector.state_of(llava.model), model, facts)
    return TrainedProjector(
        model=model, data=data, projector=trained[0], history=history[0], num_steps=len(records),
        num_samples=sum(r.num_samples for r in records), num_skipped_steps=sum(r.skipped for r in records),
        final_loss=last_mean(records), seconds=seconds, device=device_name(device),
        precision=str(precision).removeprefix("torch."), peak_memory_bytes=peak_memory(device),
        frozen_digest_before=before, frozen_digest_after=after,
    )  # fmt: skip


def prepare(llava: Llava, rows: Rows) -> Samples:
    """Token ids as tensors, tower features of every picture once."""
    with bar("vision tower", len(rows.images)) as advance:
        features = picture_features(llava, rows, FEATURE_BATCH, advance)
    return Samples(
        [torch.from_numpy(ids).long() for ids in rows.input_ids],
        [torch.from_numpy(labels).long() for labels in rows.labels],
        rows.image, features, int(llava.model.config.pad_token_id),
    )  # fmt: skip


def run(llava: Llava, samples: Samples, spec: TrainingSpec) -> list[StepRecord]:
    """The loop with a progress bar."""
    records = []
    with bar("train projector", spec.max_steps) as advance:
        for record in train(llava.model, samples, spec):
            records.append(record)
            advance(1, loss=f"{last_mean(records):.3f}")
    return records


def last_mean(records: list[StepRecord], window: int = 20) -> float:
    """Mean loss of the last steps that were applied: one step alone says little."""
    losses = [record.loss for record in records if not record.skipped][-window:]
    return sum(losses) / len(losses) if losses else float("nan")


def device_name(device: torch.device) -> str:
    """For people: the card's name, or cpu with its threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu ({torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the card, or resident in this process so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
