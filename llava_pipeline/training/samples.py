"""What is trained on: token ids and labels of every sample one behind the other, and the order in which they come.

The order is a pure function of (seed, epoch), so the position in the data is one integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llava_pipeline.errors import NothingToLearn
from llava_pipeline.model.processor import IGNORE_INDEX

NO_PICTURE = -1


@dataclass(frozen=True, slots=True)
class Samples:
    """N samples: (T,) ids and labels of all, (N + 1,) places where each begins, (N,) its picture or ``NO_PICTURE``."""

    ids: Tensor
    labels: Tensor
    begins: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def first(self, count: int) -> Samples:
        """The first of them."""
        count = min(count, len(self))
        end = int(self.begins[count])
        return Samples(self.ids[:end], self.labels[:end], self.begins[: count + 1], self.image[:count])

    def of(self, k: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of sample ``k``, int64."""
        span = slice(int(self.begins[k]), int(self.begins[k + 1]))
        return self.ids[span].long(), self.labels[span].long()

    def images_of(self, indices: Iterable[int]) -> list[int]:
        """Pictures of these samples that have one, in order."""
        return [image for k in indices if (image := int(self.image[k])) != NO_PICTURE]

    def num_tokens(self, indices: Iterable[int]) -> int:
        """Tokens of these samples, image tokens included."""
        return sum(int(self.begins[k + 1] - self.begins[k]) for k in indices)

    def num_supervised(self, indices: Iterable[int]) -> int:
        """Tokens that are predicted and learned; the first of a sample is predicted by none."""
        return sum(int((self.of(k)[1][1:] != IGNORE_INDEX).sum()) for k in indices)


def collect(input_ids: Sequence[Tensor], labels: Sequence[Tensor], image: Sequence[int]) -> Samples:
    """Samples from one tensor each.

    Raises:
        NothingToLearn: a sample has no supervised token; its loss would be a division by nothing.
    """
    for number, row in enumerate(labels):
        if not (row[1:] != IGNORE_INDEX).any():
            raise NothingToLearn(f"sample {number} has no supervised token; leave it out of the training data")
    lengths = torch.tensor([len(row) for row in input_ids])
    begins = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Samples(torch.cat([*input_ids]), torch.cat([*labels]), begins, torch.tensor(image))


def shared_prefix(samples: Samples, image_token: int) -> Tensor:
    """Ids that every sample begins with and that stand before any picture; each sample keeps a token of its own."""
    prefix, _ = samples.of(0)
    for k in range(len(samples)):
        ids, labels = samples.of(k)
        last = int((labels[1:] != IGNORE_INDEX).nonzero().max())  # the row that predicts the last supervised token
        length = min(len(prefix), last)
        same = (ids[:length] == prefix[:length]).long().cumprod(0).sum()
        prefix = prefix[: int(same)]
    before_picture = (prefix != image_token).long().cumprod(0).sum()
    return prefix[: int(before_picture)]


@lru_cache(maxsize=4)
def order(num_samples: int, seed: int, epoch: int) -> Sequence[int]:
    """The permutation of one epoch."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return tuple(torch.randperm(num_samples, generator=generator).tolist())


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> list[int]:
    """``count`` sample numbers from position ``start`` on, through as many epochs as it takes."""
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), num_samples)
        out += order(num_samples, seed, epoch)[offset : offset + count - len(out)]
    return out
