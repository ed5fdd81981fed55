"""What is trained on: token ids and labels of every sample one behind the other, and the order in which they come.

The order is a pure function of (seed, epoch), so the position in the data is one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from llava_pipeline.errors import NothingToLearn
from llava_pipeline.model.processor import IGNORE_INDEX

NO_PICTURE = -1
SAMPLES_AT_ONCE = 1 << 10  # what is found out about all tokens is found out of so many samples at a time


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
        return self.between(0, min(count, len(self)))

    def between(self, start: int, stop: int) -> Samples:
        """Those from ``start`` on, up to ``stop``."""
        begins = self.begins[start : stop + 1]
        span = slice(int(begins[0]), int(begins[-1]))
        return Samples(self.ids[span], self.labels[span], begins - begins[0], self.image[start:stop])

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
    def runs(self) -> Tensor:
        """(R + 1,) where each run of samples about one picture begins, and the end; a sample without one is a run."""
        new = (self.image.diff() != 0) | (self.image[1:] == NO_PICTURE)
        return torch.cat([torch.zeros(1, dtype=torch.long), new.nonzero()[:, 0] + 1, torch.tensor([len(self)])])

    @cached_property
    def supervised(self) -> list[int]:
        """Supervised tokens of each sample."""
        return list(self._over_tokens(lambda block, owner: _count(block._is_supervised(), owner, len(block))).tolist())

    @cached_property
    def last_predictor(self) -> list[int]:
        """Where in each sample the token stands that predicts its last supervised one; -1 where none is."""

        def last(block: Samples, owner: Tensor) -> Tensor:
            place = torch.arange(len(block.ids)) - block.begins[owner] - 1
            place = torch.where(block._is_supervised(), place, -1)
            return torch.full((len(block),), -1).scatter_reduce(0, owner, place, "amax")

        return list(self._over_tokens(last).tolist())

    def have_token(self, token: int) -> Tensor:
        """(N,) whether each sample has a token of this id."""
        return self._over_tokens(lambda block, owner: _count(block.ids == token, owner, len(block))) > 0

    def _over_tokens(self, found: Callable[[Samples, Tensor], Tensor]) -> Tensor:
        """(N,) of what is found out about some samples and which of them each token is of."""
        out = [torch.zeros(0, dtype=torch.long)]
        for start in range(0, len(self), SAMPLES_AT_ONCE):
            block = self.between(start, min(start + SAMPLES_AT_ONCE, len(self)))
            out.append(found(block, torch.repeat_interleave(torch.arange(len(block)), block.begins.diff())))
        return torch.cat(out)

    def _is_supervised(self) -> Tensor:
        """(T,) of all samples."""
        supervised = self.labels != IGNORE_INDEX
        supervised[self.begins[:-1]] = False
        return supervised


def _count(which: Tensor, owner: Tensor, num: int) -> Tensor:
    return torch.zeros(num, dtype=torch.long).index_add(0, owner, which.long())


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
def order(runs: Tensor, seed: int, epoch: int) -> Sequence[int]:
    """The permutation of one epoch. Samples about one picture that follow each other, a run, stay together: a step
    computes their picture once. Compared by identity, as tensors are."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    begins, lengths = runs[:-1], runs.diff()
    chosen = torch.randperm(len(lengths), generator=generator)
    if len(lengths) == int(runs[-1]):
        return tuple(chosen.tolist())
    lengths = lengths[chosen]
    within = torch.arange(int(runs[-1])) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return tuple((torch.repeat_interleave(begins[chosen], lengths) + within).tolist())


def sample_indices(runs: Tensor, seed: int, start: int, count: int) -> list[int]:
    """``count`` sample numbers from position ``start`` on, through as many epochs as it takes."""
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(start + len(out), int(runs[-1]))
        out += order(runs, seed, epoch)[offset : offset + count - len(out)]
    return out
