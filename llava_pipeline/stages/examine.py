"""A held-out set put to projectors of one model. Equal digests give equal answers, so nobody is asked twice."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from llava_pipeline.code_digest import code_digest
from llava_pipeline.contracts import AssembledModel, Scored, Snapshot
from llava_pipeline.data.snapshot import Rows, open_rows
from llava_pipeline.errors import StoreError
from llava_pipeline.evaluation import summary
from llava_pipeline.evaluation.features import picture_features
from llava_pipeline.evaluation.lines import Line, ask_all, num_jobs
from llava_pipeline.evaluation.questions import Question, questions_of
from llava_pipeline.evaluation.read import Limits, stop_ids
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava, load
from llava_pipeline.progress import bar
from llava_pipeline.spec import EvaluationSpec
from llava_pipeline.store import home, open_artifact, write_text, writing
from llava_pipeline.training.device import choose_device, peak_memory, place

log = logging.getLogger(__name__)
LINES = "lines.jsonl"


class Examination:
    """One held-out set, one model, one way to ask. The model is loaded when the first projector has to be asked.

    Args:
        model: whose frozen parts all projectors share.
        held_out: what is asked.
        spec: how many at once, how long an answer may be.
        device: ``cpu``, or anything else for a card where there is one.
        precision: of the frozen parts, as torch names it.
    """

    def __init__(
        self, model: AssembledModel, held_out: Snapshot, spec: EvaluationSpec, device: str, precision: str
    ) -> None:
        self.model, self.held_out, self.spec = model, held_out, spec
        self.device = choose_device("cpu" if device.startswith("cpu") else "auto")
        self.precision = precision

    @cached_property
    def rows(self) -> Rows:
        """The held-out rows."""
        return open_rows(self.held_out.rows)

    @cached_property
    def llava(self) -> Llava:
        """The live model; its projector is whichever was asked last."""
        llava = load(self.model)
        self._first = projector.state_of(llava.model)
        place(llava.model, self.device, getattr(torch, self.precision))
        return llava

    def untrained(self) -> projector.State:
        """The projector before training."""
        _ = self.llava
        return self._first

    @cached_property
    def untrained_digest(self) -> str:
        """Names it without making it: it is a function of the seed and of the shapes."""
        told = f"untrained {self.model.spec.projector_seed} {self.model.frozen_digest}"
        return hashlib.sha256(told.encode()).hexdigest()

    @cached_property
    def questions(self) -> list[Question]:
        """The held-out questions as token ids."""
        return questions_of(self.rows, self.llava.processor)

    @cached_property
    def features(self) -> torch.Tensor:
        """Of every held-out picture, (N, P, D_vision)."""
        return self.features_of(range(len(self.rows.images)))

    def features_of(self, pictures: range) -> torch.Tensor:
        """Of some of the held-out pictures."""
        with bar("look at the held-out pictures", len(pictures)) as advance:
            return picture_features(self.llava, self.rows, pictures, self.spec.batch_size, advance)

    def ask(
        self, who: str, digest: str, state: Callable[[], projector.State], controls: bool, *, afresh: bool = False
    ) -> Scored:  # fmt: skip
        """What a projector says, asked now or remembered; ``controls`` are shuffled pictures and none.

        Args:
            who: for the progress bar.
            digest: of the projector.
            state: its weights, read only if it has to be asked.
            controls: whether it is asked about shuffled pictures and without any, too.
            afresh: whether it is asked now though it was before; what is remembered then stays as it is.

        Raises:
            WeightsMismatch, IncompatibleParts: ``state`` refuses to load.
        """
        remembered = home() / "cache" / "scores" / f"{self._key(digest, controls)}.json"
        if not afresh and (known := _remembered(remembered)) is not None:
            log.info("%s: the same projector was asked the same questions before; its answers are reused", who)
            return known
        projector.put(self.llava.model, state())
        limits = Limits(self.spec.batch_size, self.spec.max_new_tokens, stop_ids(self.llava))
        features, count = self.features, num_jobs(self.questions, controls)
        started = time.monotonic()
        with bar(f"ask {who}", count) as advance:
            lines = ask_all(self.llava, self.rows, self.questions, features, limits, controls, advance)
        seconds = time.monotonic() - started
        with writing("scores") as (folder, done):
            (folder / LINES).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        scored = Scored(
            projector_digest=digest, held_out_digest=self.held_out.rows.digest, lines=done[0], seconds=seconds,
            seconds_per_answer=seconds / count, peak_memory_bytes=peak_memory(self.device),
        )  # fmt: skip
        if not afresh:
            write_text(remembered, scored.model_dump_json())
        return scored

    def _key(self, digest: str, controls: bool) -> str:
        """Of everything that decides the answers: projector, model, questions, how they are asked, and the code."""
        decides: dict[str, Any] = {
            "projector": digest, "model": projector.identity(self.model), "held_out": self.held_out.rows.digest,
            "batch_size": self.spec.batch_size, "max_new_tokens": self.spec.max_new_tokens, "controls": controls,
            "device": self.device.type, "precision": self.precision, "code": code_digest(__name__),
        }  # fmt: skip
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def examined(held_out: Snapshot, scored: Scored) -> dict[str, Any]:
    """What a projector said to a set, in numbers: the fields of ``Examined``."""
    lines = lines_of(scored)
    return {
        "held_out": held_out, "scored": scored, "num_questions": len(lines), "right_image": summary.score(lines),
        "shuffled_image": summary.score(lines, "_shuffled"), "no_image": summary.likely(lines, "_no_image"),
        "grounding": summary.grounding(lines), "yes_no": summary.yes_no(lines), "health": summary.health(lines),
    }  # fmt: skip


def lines_of(scored: Scored) -> list[Line]:
    """The lines of a projector's answers."""
    text = (open_artifact(scored.lines) / LINES).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _remembered(path: Path) -> Scored | None:
    """What was said before, if it is still there and whole."""
    try:
        scored = Scored.model_validate_json(path.read_text(encoding="utf-8"))
        open_artifact(scored.lines)
    except (OSError, ValidationError, StoreError):
        return None
    return scored
