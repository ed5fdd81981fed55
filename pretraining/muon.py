"""Muon (Jordan et al. 2024) in float32, matrices of one shape at once.

``torch.optim.Muon`` orthogonalises in bfloat16, one matrix after the other. On a CPU without bfloat16 instructions
that took 2.7 s a step for 1.9 M parameters, six times forward and backward together (docs/decisions.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(N, R, C) to roughly orthogonal matrices of the same singular vectors, by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; the update has the root mean square of an AdamW step at the same rate."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalise(torch.stack([self._nesterov(p, group["momentum"]) for p in parameters]))
                scale = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _nesterov(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def new_optimizers(modules: Iterable[torch.nn.Module], rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, reading layers, norms and biases."""
    inside, outside = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            matrix = parameter.ndim == 2 and "layers." in name
            (inside if matrix else outside).append(parameter)
    return [
        Muon(inside, lr=rate, momentum=0.95, weight_decay=weight_decay),
        torch.optim.AdamW(outside, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
