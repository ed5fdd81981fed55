"""First weights of a projector with which a patch reads as the words that its picture is told with.

torch's first weights put patches far from every word, and training with a frozen language model moves them further off.
What a patch shows can be read then, but how the language model finds one word by another does not work on patches
(docs/benchmarks.md, "What each step buys"). Here they begin among the words. Nobody says which patch shows what:

1. ``learn_to_read``: a linear reader learns which words lie under which patch, from which pictures are told with them.
   A word is told of a picture unless no patch has it: multiple-instance learning by a noisy or (Maron and Lozano-Pérez
   1998), with a bag of words as in Joulin et al. 2016 (arXiv 1511.02251).
2. ``as_words``: a patch is the average word, and of each word so much of its embedding as the patch has more of it than
   patches have on average. AlignVLM (arXiv 2502.01341) keeps patches such means of embeddings for good.
3. ``fit``: the second layer by least squares, over what torch's first layer makes of the features.

It takes no pass through the language model, and nothing but what is trained on anyway.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.training.features import StepFeatures
from llava_pipeline.training.samples import NO_PICTURE, Samples
from llava_pipeline.training.shard import gathered

log = logging.getLogger(__name__)
NUM_PICTURES, NUM_PATCHES = 1200, 1 << 18  # that are read at most
FITTED_PATCHES = 1 << 15  # that the layer is fitted to at most
MAX_WORDS, MIN_SHARE = 2000, 0.005  # the commonest, and of how many pictures a word must be told
STEPS, PICTURES, PATCHES, RATE, DECAY = 400, 256, 1 << 14, 0.02, 0.01  # of the reader: Adam, at most so many at once
RIDGE, ROWS = 1e-4, 1 << 12  # of the fit, and patches in float64 at once


@dataclass(frozen=True)
class Told:
    """What pictures are told with: ``ids`` (V,) of words, ``of`` (N, V) whether each picture is told with it, and
    ``counts`` (V,) of how often it is said."""

    ids: Tensor
    of: Tensor
    counts: Tensor


def start_with_words(
    model: LlavaForConditionalGeneration, samples: Samples, features: StepFeatures, special: Set[int]
) -> None:
    """Give a projector its first weights, from the first pictures of what it will be trained on.

    Where that cannot be done it keeps those it has, and a warning says why.

    Args:
        special: ids that are no words.
    """
    began = time.monotonic()
    num = max(1, min(NUM_PICTURES, NUM_PATCHES // int(model.config.image_seq_length)))
    images = sorted(set(samples.image.tolist()) - {NO_PICTURE})[:num]
    told = what_is_told(samples, images, special)
    if not len(told.ids):
        log.warning("no word is told of pictures often enough to begin with; the projector keeps its first weights")
        return
    seen = seen_features(features, images)
    usable = seen.isfinite().flatten(1).all(1)
    seen, of = seen[usable], told.of.to(seen.device)[usable]
    if not len(seen):
        log.warning("no picture has features that are numbers; the projector keeps its first weights")
        return
    read, patches = learn_to_read(seen, of), some_patches(seen)
    words = gathered(model.get_input_embeddings().weight.detach())[told.ids].float()  # each process may have a part
    share = fit(model.model.multi_modal_projector, patches, as_words(read(patches), words, told.counts))
    if math.isnan(share):
        log.warning("what pictures are told with cannot be solved for; the projector keeps its first weights")
        return
    log.info(
        "the projector begins with %d words of %d pictures, %.0f %% of what they should be, in %.0f s",
        len(told.ids), len(seen), 100 * share, time.monotonic() - began,
    )  # fmt: skip


def what_is_told(samples: Samples, images: Sequence[int], special: Set[int]) -> Told:
    """The words that samples about these pictures are supervised with, the commonest ``MAX_WORDS``."""
    place = {image: k for k, image in enumerate(images)}
    words: list[set[int]] = [set() for _ in images]
    said: Counter[int] = Counter()
    for k, image in enumerate(samples.image.tolist()):
        if image in place:
            _, labels = samples.of(k)
            own = [token for token in labels[labels != IGNORE_INDEX].tolist() if token not in special]
            words[place[image]].update(own)
            said.update(own)
    common = Counter(word for own in words for word in own).most_common(MAX_WORDS)
    ids = sorted(word for word, count in common if count >= MIN_SHARE * len(images))
    of = torch.tensor([[word in own for word in ids] for own in words]).view(len(images), len(ids))
    return Told(torch.tensor(ids, dtype=torch.long), of, torch.tensor([float(said[word]) for word in ids]))


def seen_features(features: StepFeatures, images: Sequence[int]) -> Tensor:
    """(N, P, D_vision) features of pictures, float32."""
    seen = []
    for start in range(0, len(images), PICTURES):
        batch = list(images[start : start + PICTURES])
        features.load(batch, [])
        seen.append(features(batch).float())
    return torch.cat(seen)


def some_patches(seen: Tensor) -> Tensor:
    """(M, D) of all patches of (N, P, D), at most ``FITTED_PATCHES``, of every place in a picture alike."""
    patches = seen.flatten(0, 1)
    if len(patches) <= FITTED_PATCHES:
        return patches
    drawn = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:FITTED_PATCHES]
    return patches[drawn.to(patches.device)]


def learn_to_read(seen: Tensor, told: Tensor) -> Callable[[Tensor], Tensor]:
    """What tells how surely each of V words lies under patches, (M, D) to (M, V) in [0, 1]; it learns from (N, P, D)
    features of pictures and (N, V) whether each is told with a word.

    P(told) = 1 - product over patches of (1 - p), with p = 1 - exp(-softplus(linear(patch))): the sum of softplus over
    patches is the negative logarithm of "no patch has it".
    """
    center, spread = seen.mean((0, 1)), seen.std((0, 1)) + 1e-6
    num, patches, width = seen.shape
    often = told.float().mean(0).clamp(1e-4, 1 - 1e-4)
    weight = torch.zeros(width, told.shape[1], device=seen.device, requires_grad=True)
    # At first all patches are alike, and each word is as likely as it is often told.
    bias = (-torch.log1p(-often) / patches).expm1().log().requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=RATE)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    draw, at_once = torch.Generator().manual_seed(0), max(1, min(PICTURES, num, PATCHES // patches))
    for _ in range(STEPS):
        some = torch.randint(num, (at_once,), generator=draw).to(seen.device)
        nowhere = functional.softplus((seen[some] - center) / spread @ weight + bias).sum(1)
        somewhere = -torch.log(-torch.expm1(-nowhere).clamp(max=-1e-6))
        loss = torch.where(told[some], somewhere, nowhere).sum(1).mean() + DECAY * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return lambda rows: -torch.expm1(-functional.softplus((rows - center) / spread @ weight.detach() + bias.detach()))


def as_words(shares: Tensor, words: Tensor, counts: Tensor) -> Tensor:
    """(M, D_text) what patches should be projected to, as long as words are on average.

    Args:
        shares: (M, V) how surely each word lies under each patch.
        words: (V, D_text) embeddings.
        counts: (V,) how often each is said.
    """
    average = (counts / counts.sum()).to(words) @ words
    patches = average + (shares - shares.mean(0)) @ words
    longer: Tensor = words.norm(dim=-1).mean() / patches.norm(dim=-1).mean()
    return patches * longer


@torch.no_grad()
def fit(projector: Any, patches: Tensor, targets: Tensor) -> float:
    """Set the second layer so that (M, D) patches are projected to (M, D_text) targets.

    Ridge regression in float64 on what the first layer, left as it is, makes of the features.

    Returns:
        The share of the targets' variance that is reached on these patches; NaN, and nothing set, where none can be.
    """
    first, second = projector.linear_1, projector.linear_2

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for some, wanted in zip(patches.split(ROWS), targets.split(ROWS), strict=True):
            yield projector.act(first(some.to(first.weight.dtype))).double(), wanted.double()

    width = first.out_features
    center, mean = patches.new_zeros(width, dtype=torch.float64), targets.mean(0, dtype=torch.float64)
    for inside, _ in chunks():
        center += inside.sum(0) / len(patches)
    squares, products = center.new_zeros(width, width), center.new_zeros(width, targets.shape[1])
    for inside, wanted in chunks():
        squares += (inside - center).T @ (inside - center)
        products += (inside - center).T @ (wanted - mean)
    squares.diagonal().add_(RIDGE * squares.diagonal().mean())
    weight, failed = torch.linalg.solve_ex(squares, products)
    left = sum(float(((inside - center) @ weight - wanted + mean).square().sum()) for inside, wanted in chunks())
    whole = float((targets.double() - mean).square().sum())
    if failed or not whole or not math.isfinite(left):
        return math.nan
    second.weight.copy_(weight.T)
    second.bias.copy_(mean - center @ weight)
    return 1 - left / whole
