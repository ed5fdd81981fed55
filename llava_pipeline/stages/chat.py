"""Ask a recorded projector about a picture: the backbones of its run, its weights, one answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from llava_pipeline.data.picture import load_picture
from llava_pipeline.evaluation.ask import ask
from llava_pipeline.stages.answering import Answering
from llava_pipeline.tracking.registry import download_projector, recorded_spec, resolve
from llava_pipeline.tracking.settings import Settings


def answer_about(
    image: Path, question: str, which: str, registered_model: str, max_new_tokens: int, settings: Settings
) -> dict[str, Any]:
    """The answer of a run, version or alias, with what answered it and how long the answer took.

    Raises:
        PictureRefused: the picture cannot be read or is not accepted.
        NoSuchRun: nothing was registered under that name, or it has no such version or alias.
        IncompatibleParts: the backbones at hand are not those that the projector was trained between.
    """
    picture = load_picture(str(image))
    run_id = resolve(which, registered_model, settings)
    spec = recorded_spec(run_id, None, settings)
    answering = Answering(download_projector(run_id, None, settings), spec)
    started = time.monotonic()
    told = ask(answering.llava, picture, question, max_new_tokens)
    return {
        "question": question,
        "answer": told,
        "run_id": run_id,
        "profile": spec.profile,
        "seconds": round(time.monotonic() - started, 3),
    }
