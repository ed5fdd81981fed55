"""Stage 2: vision tower, fresh projector and language model, joined; all but the projector frozen."""

from __future__ import annotations

import logging

from llava_pipeline.contracts import AssembledModel, Backbones
from llava_pipeline.model.assemble import assemble, check_image_tokens, describe
from llava_pipeline.model.freeze import count_parameters
from llava_pipeline.spec import ModelSpec

log = logging.getLogger(__name__)


def assemble_and_freeze(backbones: Backbones, spec: ModelSpec) -> AssembledModel:
    """Join and freeze, check by one forward pass, and tell what is trainable."""
    llava = assemble(backbones, spec)
    check_image_tokens(llava)
    for part, (total, trainable) in count_parameters(llava.model).items():
        log.info("%-15s %13s parameters, %s", part, f"{total:,}", "trainable" if trainable else "frozen")
    for kind, count in llava.num_ignored_weights.items():
        log.info("left out of the checkpoints: %d tensors (%s)", count, kind)
    return describe(llava, backbones, spec)
