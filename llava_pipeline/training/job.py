"""What one training is: the file that ``python -m llava_pipeline.training`` is started with, and what it trains on."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from llava_pipeline.contracts import ArtifactRef, AssembledModel
from llava_pipeline.errors import IncompatibleParts, SpecError
from llava_pipeline.spec import Frozen, TrainingSpec
from llava_pipeline.store import open_artifact
from llava_pipeline.training.samples import NO_PICTURE, Samples, refuse_unsupervised
from llava_pipeline.training.stored import Stored

TOKENS, PIXELS = "tokens.safetensors", "pixels.safetensors"
DECIDE_NOTHING = {"price_per_hour", "checkpoint_seconds", "features_gb", "num_processes"}
"""What of a spec may change while a training is under way: none of it changes a number that is learned."""


class TrainingJob(Frozen):
    """A model, samples of the store, and how to train."""

    model: AssembledModel
    train: ArtifactRef
    held_out: ArtifactRef | None
    spec: TrainingSpec
    begin: ArtifactRef | None = None  # what a training before this one left behind

    def identity(self) -> dict[str, Any]:
        """What a checkpoint depends on: only an equal one is gone on from, bit by bit."""
        libraries = ("torch", "transformers", *(("peft",) if self.spec.language_mode == "lora" else ()))
        return {
            "frozen_parts": self.model.frozen_digest,
            "model": self.model.spec.model_dump(mode="json"),
            "train": self.train.digest,
            "held_out": self.held_out.digest if self.held_out else None,
            "begin": self.begin.digest if self.begin else None,
            "spec": self.spec.model_dump(mode="json", exclude=DECIDE_NOTHING),
            "versions": {name: version(name) for name in libraries},
        }


def read_job(path: Path) -> TrainingJob:
    """The job in a JSON file.

    Raises:
        SpecError: it cannot be read, or is none.
    """
    try:
        return TrainingJob.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the job {path} ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is no training job: it is not UTF-8 text; write it anew") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SpecError(f"{path} is no training job: {where}: {first['msg']}; write it anew") from error


def read_samples(ref: ArtifactRef, image_token: int) -> tuple[Samples, Stored]:
    """Samples and the pictures (N, S, S, 3) uint8 they are about; both stay on disk until they are used.

    Raises:
        NothingToLearn: a sample has no supervised token.
        IncompatibleParts: a picture that does not exist is named, or one has no place in its sample's ids.
    """
    folder = open_artifact(ref)
    tokens, pixels = load_file(folder / TOKENS), Stored(folder / PIXELS, "pixels")
    samples = Samples(tokens["ids"], tokens["labels"], tokens["begins"], tokens["image"])
    if len(samples.image) and int(samples.image.max()) >= len(pixels):
        raise IncompatibleParts(f"samples name picture {int(samples.image.max())} of {len(pixels)}; make them anew")
    refuse_unsupervised(samples)
    if not torch.equal(samples.have_token(image_token), samples.image != NO_PICTURE):
        raise IncompatibleParts("a sample has image tokens and no picture, or a picture and no image tokens")
    return samples, pixels
