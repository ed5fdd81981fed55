"""The processes that train together: one, or as many as torchrun started. Each has the whole model and a part of every
step's samples; what they exchange is the projector's gradient, 23 MB for the seed's shapes, and a few numbers. Of a
language model that learns whole each has a part (``shard.py``)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True)
class World:
    """This process's number among ``size``, and where it computes."""

    rank: int
    size: int
    device: torch.device

    def part(self, indices: Sequence[int]) -> list[int]:
        """This process's share of a step's samples: neighbours, for they may share a picture."""
        begin, end = (len(indices) * rank // self.size for rank in (self.rank, self.rank + 1))
        return list(indices[begin:end])

    def add(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def most(self, count: int) -> int:
        """The largest of all processes' counts."""
        if self.size == 1:
            return count
        largest = torch.tensor(count, device=self.device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients over all processes, in one exchange; one that had no sample adds nothing."""
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def spread(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's."""
        for parameter in parameters if self.size > 1 else ():
            distributed.broadcast(parameter.detach(), 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()


def join(device: torch.device) -> World:
    """The world that torchrun's environment describes; a process started without it is alone."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def leave(world: World) -> None:
    """End the exchange."""
    if world.size > 1:
        distributed.destroy_process_group()
