"""What is trained on: token ids and labels of every sample one behind the other, and the order in which they come.

The order is a pure function of (seed, epoch), so the position in the data is one integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from llava_pipeline.errors import NothingToLearn
from llava_pipeline.model.processor import IGNORE_INDEX

NO_PICTURE = -1


@dataclass(frozen=True)
class Samples:
    """N samples: (T,) ids and labels of all, (N + 1,) places where each begins, (N,) its picture or ``NO_PICTURE``.

    A token is supervised if it has a label and another one before it, which predicts it.
    """

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
        return sum(self.lengths[k] for k in indices)

    def num_supervised(self, indices: Iterable[int]) -> int:
        """Supervised tokens of these samples."""
        return sum(self.supervised[k] for k in indices)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return list(self.begins.diff().tolist())

    @cached_property
    def supervised(self) -> list[int]:
        """Supervised tokens of each sample."""
        count = torch.cat([torch.zeros(1, dtype=torch.long), self._is_supervised().long().cumsum(0)])
        return list(count[self.begins].diff().tolist())

    @cached_property
    def last_predictor(self) -> list[int]:
        """Where in each sample the token stands that predicts its last supervised one; -1 where none is."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.begins.diff())
        place = torch.arange(len(self.ids)) - self.begins[owner] - 1
        place = torch.where(self._is_supervised(), place, -1)
        last = torch.full((len(self),), -1).scatter_reduce(0, owner, place, "amax")
        return list(last.tolist())

    def _is_supervised(self) -> Tensor:
        """(T,) of all samples."""
        supervised = self.labels != IGNORE_INDEX
        supervised[self.begins[:-1]] = False
        return supervised


def collect(input_ids: Sequence[Tensor], labels: Sequence[Tensor], image: Sequence[int]) -> Samples:
    """Samples from one tensor each.

    Raises:
        NothingToLearn: a sample has no supervised token.
    """
    lengths = torch.tensor([len(row) for row in input_ids])
    begins = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    samples = Samples(torch.cat([*input_ids]), torch.cat([*labels]), begins, torch.tensor(image))
    refuse_unsupervised(samples)
    return samples


def refuse_unsupervised(samples: Samples) -> None:
    """Every sample must have something to learn: the loss of one without would be a division by nothing.

    Raises:
        NothingToLearn: a sample has no supervised token.
    """
    if 0 in samples.supervised:
        number = samples.supervised.index(0)
        raise NothingToLearn(f"sample {number} has no supervised token; leave it out of the training data")


def shared_prefix(samples: Samples, image_token: int) -> Tensor:
    """Ids that every sample begins with and that stand before any picture; each sample keeps a token of its own."""
    prefix, _ = samples.of(0)
    for k in range(len(samples)):
        ids, _ = samples.of(k)
        length = min(len(prefix), samples.last_predictor[k])
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
