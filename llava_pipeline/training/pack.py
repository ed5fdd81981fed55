"""Several samples as one row of tokens, without what need not be computed: padding, the prefix that all share, and
whatever follows a sample's last supervised token.

Two samples behind a shared prefix of two tokens; a figure is a supervised token, and stands under its predictor::

    sample 0    p p i i q a 1 2 .          sample 1    p p i i q q a 3 .
    packed          i i q a 1                              i i q q a
    targets               1 2                                      3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.spec import StepSpec
from llava_pipeline.training.samples import Samples


@dataclass(frozen=True, slots=True)
class Pack:
    """T packed tokens of B samples, S of which predict a supervised one."""

    input_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    lengths: tuple[int, ...]  # (B,)
    rows: Tensor  # (S,) in the pack
    targets: Tensor  # (S,)
    prefix_rows: Tensor  # in the prefix, of supervised tokens that it predicts
    prefix_targets: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same pack on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "positions", "rows", "targets", "prefix_rows", "prefix_targets")
        }
        return Pack(lengths=self.lengths, **moved)


def needed(samples: Samples, k: int, num_prefix: int, spec: StepSpec) -> int:
    """How many tokens of sample ``k`` are computed in a pack."""
    end = samples.last_predictor[k] + 1 if spec.select else samples.lengths[k]
    return end - num_prefix


def passes(samples: Samples, indices: Sequence[int], num_prefix: int, most: int, spec: StepSpec) -> list[list[int]]:
    """These samples in order, split so that no pass has more than ``most`` tokens, unless of one sample alone."""
    out: list[list[int]] = []
    total = longest = 0
    for k in indices:
        length = needed(samples, k, num_prefix, spec)
        longest = max(longest, length)
        count = total + length if spec.pack else longest * (len(out[-1]) + 1 if out else 1)
        if not out or count > most:
            out.append([])
            total, longest = 0, length
        out[-1].append(k)
        total += length
    return out


def make_pack(samples: Samples, indices: Sequence[int], num_prefix: int, spec: StepSpec) -> Pack:
    """The pack of these samples, behind a prefix of ``num_prefix`` tokens."""
    ids, positions, lengths, rows, targets = [], [], [], [], []
    prefix_rows, prefix_targets = [], []
    start = 0
    longest = max(needed(samples, k, num_prefix, spec) for k in indices)
    for k in indices:
        own, labels = samples.of(k)
        length = needed(samples, k, num_prefix, spec)
        kept, following = own[num_prefix : num_prefix + length], labels[num_prefix + 1 : num_prefix + 1 + length]
        if not spec.pack:
            kept = torch.nn.functional.pad(kept, (0, longest - length))
        supervised = (following != IGNORE_INDEX).nonzero()[:, 0]
        rows.append(supervised + start)
        targets.append(following[supervised])
        ids.append(kept)
        positions.append(torch.arange(num_prefix, num_prefix + len(kept)))
        lengths.append(len(kept))
        start += len(kept)
        in_prefix = (labels[1 : num_prefix + 1] != IGNORE_INDEX).nonzero()[:, 0]
        prefix_rows.append(in_prefix)
        prefix_targets.append(labels[in_prefix + 1])
    return Pack(
        torch.cat(ids), torch.cat(positions), tuple(lengths), torch.cat(rows), torch.cat(targets),
        torch.cat(prefix_rows), torch.cat(prefix_targets),
    )  # fmt: skip
