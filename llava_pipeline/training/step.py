"""The training step: loss of some samples, and its gradient to the projector.

Two of them. ``PackedStep`` is for a Llama and does nothing twice and nothing in vain: one packed pass without padding,
the prompt's constant beginning computed once a run and a picture once for the samples about it, the head where there
is a label. ``PlainStep`` runs any other language model as transformers does, padded. ``tests/training/test_step.py``
holds both to the plain ``LlavaForConditionalGeneration`` forward: same loss, same projector gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.model.quantize import is_quantized
from llava_pipeline.spec import StepSpec
from llava_pipeline.training.attention import attention, lay_out
from llava_pipeline.training.llama import FrozenLlama, can_run, learns_whole
from llava_pipeline.training.pack import Pack, make_pack, passes
from llava_pipeline.training.plain import collate, loss_sum
from llava_pipeline.training.samples import Samples, shared_prefix
from llava_pipeline.training.shard import Sharded

FEWEST_PREFIX_TOKENS = 4  # below, what is saved is less than what its queries of zeros cost
Features = Callable[[list[int]], Tensor]
"""Tower features (I, P, D_vision) of some pictures, on the device."""


class Step(Protocol):
    """Loss of samples by number; ``split`` says which of them go through the model together."""

    samples: Samples
    device: torch.device

    def split(self, indices: Sequence[int], most: int) -> list[list[int]]:
        """Passes of at most ``most`` tokens."""

    def loss(self, indices: Sequence[int], scale: float = 1.0) -> Tensor:
        """Sum of the losses of one pass, in nats, (); ``scale`` is what it is multiplied by before ``backward``. A pass
        of no sample, where other processes have one: 0, and gradients of 0."""


class PackedStep:
    """One packed pass through a frozen Llama.

    Args:
        model: placed where and in what precision it is to run.
        samples: of one data set.
        features: tower features of its pictures.
        dtype: of the language model's matrix products.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, samples: Samples, features: Features, dtype: torch.dtype,
        spec: StepSpec, llama: FrozenLlama | None = None,
    ) -> None:  # fmt: skip
        self.samples, self.features, self.spec = samples, features, spec
        self.projector = model.model.multi_modal_projector
        self.image_token = int(model.config.image_token_index)
        self.llama = llama or FrozenLlama(model.model.language_model, model.lm_head.weight, dtype, spec)
        self.device = self.projector.linear_1.weight.device
        prefix = shared_prefix(samples, self.image_token)
        # Once a run: a language model that learns reads it otherwise after every step.
        worth = spec.share_prefix and len(prefix) >= FEWEST_PREFIX_TOKENS and not self.llama.learns
        self.prefix = self.llama.prefix(prefix.to(self.device)) if worth else None
        self.num_prefix = len(self.prefix) if self.prefix else 0
        self.shares = self.image_token if spec.share_picture else None

    def split(self, indices: Sequence[int], most: int) -> list[list[int]]:
        """Passes of at most ``most`` tokens."""
        return passes(self.samples, indices, self.num_prefix, most, self.spec, self.shares)

    def loss(self, indices: Sequence[int], scale: float = 1.0) -> Tensor:
        """Sum of the losses of one pass."""
        pack = make_pack(self.samples, indices, self.num_prefix, self.spec, self.shares).to(self.device)
        attend = attention(lay_out(pack.lengths, self.num_prefix, self.device, pack.shared), self.llama.dtype)
        x = self.embed(pack)
        hidden = self.llama.hidden(x, pack.positions, attend, self.prefix, pack.rows)
        total = self.llama.losses(hidden, pack.targets, scale).sum()
        if self.prefix is not None:  # a constant: labels in the prefix, if any, count as the plain forward counts them
            total = total - self.prefix.log_probs[pack.prefix_rows, pack.prefix_targets].sum()
        return total

    def embed(self, pack: Pack) -> Tensor:
        """(T, D) embeddings with projected features, in reading order, at the image tokens."""
        x = self.llama.embed(pack.input_ids)
        if not pack.images:
            return x
        features = self.features(pack.images)
        projected = self.projector(features.to(self.projector.linear_1.weight.dtype)).flatten(0, 1)
        return x.index_copy(0, (pack.input_ids == self.image_token).nonzero()[:, 0], projected.float())


class PlainStep:
    """Padded passes through transformers' own forward; where its weights learn, they are float32 and its products are
    in ``dtype``."""

    def __init__(
        self, model: LlavaForConditionalGeneration, samples: Samples, features: Features,
        dtype: torch.dtype = torch.float32, spec: StepSpec | None = None, sharded: Sharded | None = None,
    ) -> None:  # fmt: skip
        self.model, self.samples, self.features, self.sharded = model, samples, features, sharded
        self.dtype = dtype if learns_whole(model) else torch.float32
        if spec is not None and spec.recompute:
            model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            model.model.language_model.train()  # which alone makes transformers do it; nothing there drops out
        self.device = model.model.multi_modal_projector.linear_1.weight.device

    def split(self, indices: Sequence[int], most: int) -> list[list[int]]:
        """Passes of at most ``most`` tokens, padding included."""
        return passes(self.samples, indices, 0, most, StepSpec(pack=False, select=False))

    def loss(self, indices: Sequence[int], scale: float = 1.0) -> Tensor:
        """Sum of the losses of one pass."""
        pad = int(self.model.config.pad_token_id)
        rows = [self.samples.of(k) for k in indices] or [(torch.full((2,), pad), torch.full((2,), IGNORE_INDEX))]
        images = self.samples.images_of(indices)
        batch = collate([ids for ids, _ in rows], [labels for _, labels in rows], self.features(images), pad).to(
            self.device
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.sharded(batch) if self.sharded is not None else loss_sum(self.model, batch)


def make_step(
    model: LlavaForConditionalGeneration, samples: Samples, features: Features, dtype: torch.dtype, spec: StepSpec,
    like: Step | None = None, sharded: Sharded | None = None,
) -> Step:  # fmt: skip
    """The step for a model, or for one whose language model is ``sharded``; with ``like``, one of the same model for
    other samples, which shares its weights."""
    language_model = model.model.language_model
    if can_run(model.config.text_config) and not learns_whole(model) and not is_quantized(language_model):
        llama = like.llama if isinstance(like, PackedStep) else None
        return PackedStep(model, samples, features, dtype, spec, llama)
    return PlainStep(model, samples, features, dtype, spec, sharded)
