"""Several samples as one row of tokens, without what need not be computed: padding, the prefix that all share, what
samples about one picture begin with after that, and whatever follows a sample's last supervised token.

Two samples behind a shared prefix of two tokens; a figure is a supervised token, and stands under its predictor::

    sample 0    p p i i q a 1 2 .          sample 1    p p i i q q a 3 .
    packed          i i q a 1                              i i q q a
    targets               1 2                                      3

Two samples about one picture, side by side: its tokens, and what is alike after them, are there once::

    sample 0    p p i i q a 1 2 .          sample 1    p p i i q r a 3 .
    packed          i i q a 1                                    r a
    targets               1 2                                      3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.spec import StepSpec
from llava_pipeline.training.samples import NO_PICTURE, Samples


@dataclass(frozen=True, slots=True)
class Pack:
    """T packed tokens of B samples, S of which predict a supervised one."""

    input_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    lengths: tuple[int, ...]  # (B,) without what is shared
    shared: tuple[tuple[int, int], ...]  # (B,) the first row of what a sample shares with an earlier one, and how many
    images: list[int]  # whose tokens are there, in order
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
        return Pack(lengths=self.lengths, shared=self.shared, images=self.images, **moved)


def needed(samples: Samples, k: int, num_prefix: int, spec: StepSpec) -> int:
    """How many tokens of sample ``k`` are computed in a pack where it shares none."""
    end = samples.last_predictor[k] + 1 if spec.select else samples.lengths[k]
    return end - num_prefix


class Sharing:
    """How many tokens each sample of a pass shares with an earlier one: those that both begin with, if they are about
    one picture and its tokens are among them. Asked for every sample of a pass, in order."""

    def __init__(self, samples: Samples, num_prefix: int, spec: StepSpec, image_token: int | None) -> None:
        self.samples, self.num_prefix, self.spec, self.image_token = samples, num_prefix, spec, image_token
        self.first: int | None = None  # of the samples about the picture that the last one was about

    def __call__(self, k: int) -> int:
        """For sample ``k``; 0 where it is the first itself."""
        count = 0 if self.first is None else self.alike(self.first, k)
        if count == 0:
            self.first = k
        return count

    def alike(self, first: int, k: int) -> int:
        """Tokens behind the prefix that two samples about one picture begin with; each keeps one of its own."""
        image = int(self.samples.image[k])
        if self.image_token is None or image == NO_PICTURE or image != int(self.samples.image[first]):
            return 0
        end = min(needed(self.samples, one, self.num_prefix, self.spec) for one in (first, k)) - 1
        ours, theirs = (self.samples.of(one)[0][self.num_prefix :] for one in (k, first))
        count = int((ours[:end] == theirs[:end]).long().cumprod(0).sum())
        return count if self.image_token in ours[:count] and self.image_token not in ours[count:] else 0


def passes(
    samples: Samples, indices: Sequence[int], num_prefix: int, most: int, spec: StepSpec, image_token: int | None = None
) -> list[list[int]]:
    """These samples in order, split so that no pass has more than ``most`` tokens, unless of one sample alone.

    With ``image_token``, samples about one picture share it where they stand side by side.
    """
    out: list[list[int]] = []
    total = longest = 0
    sharing = Sharing(samples, num_prefix, spec, image_token if spec.pack else None)
    for k in indices:
        length = needed(samples, k, num_prefix, spec)
        own = length - sharing(k)
        longest = max(longest, length)
        count = total + own if spec.pack else longest * (len(out[-1]) + 1 if out else 1)
        if not out or count > most:
            out.append([])
            total, longest, own = 0, length, length
            sharing.first = k
        out[-1].append(k)
        total += own
    return out


def make_pack(
    samples: Samples, indices: Sequence[int], num_prefix: int, spec: StepSpec, image_token: int | None = None
) -> Pack:
    """The pack of these samples, behind a prefix of ``num_prefix`` tokens; with ``image_token``, those about one
    picture share it where they stand side by side."""
    ids, positions, lengths, rows, targets, images = [], [], [], [], [], []
    prefix_rows, prefix_targets = [], []
    shared: list[tuple[int, int]] = []
    start = of_first = 0
    longest = max(needed(samples, k, num_prefix, spec) for k in indices)
    sharing = Sharing(samples, num_prefix, spec, image_token if spec.pack else None)
    for k in indices:
        tokens, labels = samples.of(k)
        length, count = needed(samples, k, num_prefix, spec), sharing(k)
        kept, following = tokens[num_prefix : num_prefix + length], labels[num_prefix + 1 : num_prefix + 1 + length]
        if not spec.pack:
            kept = torch.nn.functional.pad(kept, (0, longest - length))
        if count == 0:
            of_first = start
            images += samples.images_of([k])
        supervised = (following != IGNORE_INDEX).nonzero()[:, 0]
        rows.append(torch.where(supervised < count, of_first + supervised, start + supervised - count))
        targets.append(following[supervised])
        ids.append(kept[count:])
        positions.append(torch.arange(num_prefix, num_prefix + len(kept))[count:])
        lengths.append(len(kept) - count)
        shared.append((of_first, count))
        start += len(kept) - count
        in_prefix = (labels[1 : num_prefix + 1] != IGNORE_INDEX).nonzero()[:, 0]
        prefix_rows.append(in_prefix)
        prefix_targets.append(labels[in_prefix + 1])
    return Pack(
        torch.cat(ids), torch.cat(positions), tuple(lengths), tuple(shared), images, torch.cat(rows),
        torch.cat(targets), torch.cat(prefix_rows), torch.cat(prefix_targets),
    )  # fmt: skip
