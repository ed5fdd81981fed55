"""A language model that learns whole, split over the processes: each keeps a part of every weight, of its gradient and
of AdamW's means, and has a layer whole only while it runs (FSDP2, ``torch.distributed.fsdp.fully_shard``).

The projector is not split: it is small, and every process has it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import LlavaForConditionalGeneration

from llava_pipeline.errors import SpecError
from llava_pipeline.spec import NO_LOSS_SCALE
from llava_pipeline.training.plain import Batch, loss_sum
from llava_pipeline.training.world import World

log = logging.getLogger(__name__)
NO_DIVISION = 1.0


class Sharded(nn.Module):
    """The language model and its head as one module: what lies outside its layers is gathered before the embeddings
    are looked up, and given back behind the head."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.around = (model,)  # in a tuple, for tower and projector are no part of this module

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch, in nats, ()."""
        return loss_sum(self.around[0], batch)


def shard(model: LlavaForConditionalGeneration, dtype: torch.dtype, world: World) -> Sharded:
    """Split a language model whose weights learn, in place; it moves to the device layer by layer.

    Args:
        model: its language model in float32, where it was loaded.
        dtype: of matrix products; in 16 bits the weights travel in it, while gradients are summed in float32.
        world: more than one process.

    Raises:
        SpecError: the products are in float16, whose loss scale every process would change on its own.
    """
    if dtype == torch.float16:
        raise SpecError(NO_LOSS_SCALE)  # where precision auto came to it
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype.itemsize == 2 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    whole = Sharded(model)
    layers = next(part for part in model.model.language_model.children() if isinstance(part, nn.ModuleList))
    for module in (*layers, whole):
        made: Any = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # Losses are divided by the tokens of the whole step, so gradients are sums over processes.
        made.set_gradient_divide_factor(NO_DIVISION)
        made.set_force_sum_reduction_for_comms(True)
    # Between layers everything is float32, as it is in one process.
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.float())
    parameters = list(whole.parameters())
    held, total = sum(local(value).nbytes for value in parameters), sum(value.nbytes for value in parameters)
    log.info("this process holds %.3g of the language model's %.3g MB", held / 1e6, total / 1e6)
    return whole


def is_sharded(tensor: Tensor) -> bool:
    """Whether every process has a part of it only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of it, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of it, on the device; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` is split, each process from its own copy."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[Tensor], most: float) -> float:
    """Scale all gradients so that their norm, over all processes and parts, is at most ``most``; what it was."""
    parameters = list(parameters)
    if not any(map(is_sharded, parameters)):
        return float(clip_grad_norm_(parameters, most))
    gradients = [value.grad for value in parameters if value.grad is not None]
    split = [local(gradient) for gradient in gradients if is_sharded(gradient)]
    common = [gradient for gradient in gradients if not is_sharded(gradient)]
    square = get_total_norm(split).double().square()
    distributed.all_reduce(square)
    norm = (square + get_total_norm(common).to(square.device).double().square()).sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0).float()
    for gradient in split + common:
        gradient.mul_(factor)
    return float(norm)
