"""A projector that answers about pictures: loaded once, asked many times."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from llava_pipeline.data.images import ImageRefused, decode
from llava_pipeline.errors import PictureRefused, SpecError
from llava_pipeline.evaluation.ask import ask
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import assemble, describe
from llava_pipeline.spec import RunSpec
from llava_pipeline.stages.fetch import fetch_backbones
from llava_pipeline.training.device import choose_device, choose_precision, place


class Answering:
    """The backbones of a run's spec with a projector between them.

    Args:
        folder: with the projector's two files.
        spec: the run's.

    Raises:
        IncompatibleParts: the backbones at hand are not those that the projector was trained between.
        WeightsMismatch: the projector is damaged.
    """

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        backbones = fetch_backbones(spec.backbones)
        self.llava = assemble(backbones, spec.model)
        state = projector.load(folder, describe(self.llava, backbones, spec.model))
        training = spec.training
        device = choose_device("cpu" if training.device == "cpu" else "auto")  # trained on a card, asked without
        place(self.llava.model, device, choose_precision(training.precision, device))
        projector.put(self.llava.model, state)  # in its place, so that an adapter stays in float32 as when it was asked

    @classmethod
    def stored(cls, folder: Path, spec: Path) -> Answering:
        """As it was recorded, with the spec as YAML.

        Raises:
            SpecError: the spec cannot be read by this version.
        """
        try:
            return cls(folder, RunSpec.model_validate(yaml.safe_load(spec.read_text(encoding="utf-8"))))
        except (OSError, ValidationError, yaml.YAMLError) as error:
            raise SpecError(f"{spec.name} cannot be read by this version; train the projector again") from error

    def answers(self, pictures: list[bytes], questions: list[str], max_new_tokens: int) -> list[str]:
        """One greedy answer for each picture, as bytes of a file, and its question.

        Raises:
            PictureRefused: a picture cannot be read or is not accepted; the message says which.
        """
        said = []
        for number, (data, question) in enumerate(zip(pictures, questions, strict=True)):
            try:
                picture = decode(data)
            except ImageRefused as error:
                raise PictureRefused(f"row {number}: the picture is not accepted ({error})") from error
            said.append(ask(self.llava, picture, question, max_new_tokens))
        return said
