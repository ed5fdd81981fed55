"""Questions read by the model: how likely the true answer is, and what it says itself. Nothing is read twice.

The keys and values of a picture are computed once and serve all questions about it, whichever condition they are asked
under. The true answer is scored first; where it is also what the model finds most likely at every token, it is the
greedy answer, and is not generated again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

from llava_pipeline.evaluation.questions import Advance, Question, answer_ids
from llava_pipeline.model.assemble import Llava
from llava_pipeline.training.plain import embed

NOT_FINITE = 100.0  # nats per token told for a loss that is no number: the answer is impossible


@dataclass(frozen=True, slots=True)
class Job:
    """A question, the picture it is asked about (None: without any), and whether the model answers in its own words."""

    question: Question
    picture: int | None
    generate: bool


@dataclass(frozen=True, slots=True)
class Told:
    """What came of a job."""

    loss: float  # nats per token of the true answer
    nats_over_opposite: float | None  # by which the opposite answer is less likely; None where there is no opposite
    answer: tuple[int, ...] | None  # greedy, without its stop token
    ended: bool  # it has one
    finite: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """How many rows are computed at once, how long an answer may become, and what ends it."""

    batch_size: int
    max_new_tokens: int
    stop_ids: frozenset[int]


KeysValues = list[tuple[Tensor, Tensor]]  # of every layer (B, heads, T, d)


@dataclass(frozen=True, slots=True)
class Begun:
    """A prefix that was read with each of some pictures: keys and values, and the last token's hidden state (B, D)."""

    kept: KeysValues
    hidden: Tensor | None  # None for a prefix of no token


def stop_ids(llava: Llava) -> frozenset[int]:
    """Tokens that end an answer."""
    tokenizer = llava.processor.tokenizer
    ends = {tokenizer.eos_token_id, answer_ids(llava.processor, "word")[-1]}  # the template may write another
    chatml_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if chatml_end is not None and chatml_end != tokenizer.unk_token_id:
        ends.add(chatml_end)
    return frozenset(int(token) for token in ends if token is not None)


@torch.no_grad()
def read(llava: Llava, jobs: Sequence[Job], features: Tensor, limits: Limits, advance: Advance) -> list[Told]:
    """What comes of every job. ``features`` is (N, P, D_vision), one row per picture of the set."""
    told: dict[int, Told] = {}
    for prefix, pictures, numbers in _groups(jobs, limits.batch_size):
        shown = None if pictures[0] is None else features[[k for k in pictures if k is not None]]
        known = _read_prefix(llava.model, prefix, shown)
        slot = {picture: k for k, picture in enumerate(pictures)}
        for start in range(0, len(numbers), limits.batch_size):
            rows = numbers[start : start + limits.batch_size]
            slots = torch.tensor([slot[jobs[k].picture] for k in rows], device=llava.model.device)
            batch = _read_batch(llava.model, known, slots, [jobs[k] for k in rows], limits)
            told |= zip(rows, batch, strict=True)
            advance(len(rows))
    return [told[k] for k in range(len(jobs))]


def _groups(jobs: Sequence[Job], batch_size: int) -> Iterator[tuple[tuple[int, ...], list[int | None], list[int]]]:
    """A prefix, pictures to read it with, and the numbers of the jobs about them, shortest suffix first.

    Jobs without a picture share one prefix, that of others less the image tokens, and their group's only picture is
    None.
    """
    about: dict[tuple[tuple[int, ...], int | None], list[int]] = defaultdict(list)
    for number, job in enumerate(jobs):
        about[(job.question.prefix, job.picture)].append(number)
    by_prefix: dict[tuple[tuple[int, ...], bool], list[int | None]] = defaultdict(list)
    for prefix, picture in about:
        by_prefix[(prefix, picture is None)].append(picture)
    for (prefix, _), pictures in by_prefix.items():
        for start in range(0, len(pictures), batch_size):
            some = pictures[start : start + batch_size]
            numbers = [number for picture in some for number in about[(prefix, picture)]]
            yield prefix, some, sorted(numbers, key=lambda k: (len(jobs[k].question.suffix), k))


def _read_prefix(model: LlavaForConditionalGeneration, prefix: tuple[int, ...], features: Tensor | None) -> Begun:
    """A prefix with each of some pictures, or once without its image tokens."""
    image = model.config.image_token_index
    ids = [token for token in prefix if features is not None or token != image]
    if not ids:
        return Begun([], None)
    count = 1 if features is None else len(features)
    tokens = torch.tensor([ids], device=model.device).expand(count, -1)
    embeddings = (
        model.get_input_embeddings()(tokens) if features is None else embed(model, tokens, features.to(model.device))
    )
    cache = DynamicCache(config=model.config.text_config)
    done = model.model.language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return Begun(_kept(cache), done.last_hidden_state[:, -1])


def _read_batch(
    model: LlavaForConditionalGeneration, known: Begun, slots: Tensor, jobs: list[Job],
    limits: Limits,
) -> list[Told]:  # fmt: skip
    """What comes of some jobs, given the keys and values of their pictures."""
    seen = _Seen.after(model, known, slots, [job.question.suffix for job in jobs])
    truths = [job.question.truth for job in jobs]
    losses, chosen, finite = seen.score(truths)
    opposites = _opposites(seen, jobs, losses)
    own = [
        k for k, job in enumerate(jobs)
        if job.generate and not _is_greedy(truths[k], chosen[k], limits)
    ]  # fmt: skip
    generated = dict(zip(own, seen.select(own).generate(limits), strict=True)) if own else {}
    told = []
    for k, job in enumerate(jobs):
        answer, ended, well = generated.get(k, (truths[k][:-1], True, True))
        number = losses[k] / len(truths[k])
        is_finite = finite[k] and (well or not job.generate)
        told.append(Told(
            number if finite[k] else NOT_FINITE, opposites.get(k), answer if job.generate else None, ended, is_finite,
        ))  # fmt: skip
    return told


def _is_greedy(truth: tuple[int, ...], chosen: list[int], limits: Limits) -> bool:
    """Whether the true answer is what would be generated: most likely at every token, ended, not too long."""
    return truth[-1] in limits.stop_ids and len(truth) <= limits.max_new_tokens and list(truth) == chosen


def _opposites(seen: _Seen, jobs: list[Job], losses: list[float]) -> dict[int, float]:
    """By how many nats the opposite of a yes/no answer is less likely than the true one."""
    rows = [k for k, job in enumerate(jobs) if job.question.opposite]
    if not rows:
        return {}
    others, _, _ = seen.select(rows).score([jobs[k].question.opposite for k in rows])
    return {k: other - losses[k] for k, other in zip(rows, others, strict=True)}


@dataclass(frozen=True, slots=True)
class _Seen:
    """Prompts that have been read: keys and values, which positions are real, and the last token's hidden state."""

    model: LlavaForConditionalGeneration
    kept: KeysValues
    mask: Tensor  # (B, T)
    hidden: Tensor  # (B, D)

    @classmethod
    def after(
        cls, model: LlavaForConditionalGeneration, known: Begun, slots: Tensor, suffixes: list[tuple[int, ...]]
    ) -> _Seen:
        """Read suffixes behind the prefixes of their pictures, padded on the left; they may all be empty."""
        width = max(map(len, suffixes))
        ids = torch.full((len(suffixes), width), int(model.config.pad_token_id))
        real = torch.zeros((len(suffixes), width), dtype=torch.long)
        for row, suffix in enumerate(suffixes):
            ids[row, width - len(suffix) :] = torch.tensor(suffix)
            real[row, width - len(suffix) :] = 1
        prefix = known.kept[0][0].shape[2] if known.kept else 0
        before = torch.ones((len(suffixes), prefix), dtype=torch.long)
        mask = torch.cat([before, real], 1).to(model.device)
        kept = [(keys[slots], values[slots]) for keys, values in known.kept]
        if width == 0 and known.hidden is not None:
            return cls(model, kept, mask, known.hidden[slots])
        cache = _cache(model, kept)
        embeddings = model.get_input_embeddings()(ids.to(model.device))
        hidden = _forward(model, embeddings, mask, cache)
        return cls(model, _kept(cache), mask, hidden[:, -1])

    def select(self, rows: list[int]) -> _Seen:
        """Some of the prompts."""
        at = torch.tensor(rows, device=self.mask.device)
        kept = [(keys[at], values[at]) for keys, values in self.kept]
        return _Seen(self.model, kept, self.mask[at], self.hidden[at])

    def score(self, answers: list[tuple[int, ...]]) -> tuple[list[float], list[list[int]], list[bool]]:
        """Of each answer the nats, the token that was most likely in each of its places, and whether all is finite."""
        longest = max(map(len, answers))
        ids = torch.zeros((len(answers), longest), dtype=torch.long)
        real = torch.zeros((len(answers), longest), dtype=torch.long)
        for row, answer in enumerate(answers):
            ids[row, : len(answer)] = torch.tensor(answer)
            real[row, : len(answer)] = 1
        ids, real = ids.to(self.mask.device), real.to(self.mask.device)
        hidden = self.hidden[:, None]
        if longest > 1:
            mask = torch.cat([self.mask, real[:, :-1]], 1)
            embeddings = self.model.get_input_embeddings()(ids[:, :-1])
            further = _forward(self.model, embeddings, mask, _cache(self.model, self.kept))
            hidden = torch.cat([hidden, further], 1)
        at = real.bool()
        logits = self.model.lm_head(hidden[at]).float()
        nats = torch.zeros(ids.shape, device=ids.device)
        nats[at] = torch.nn.functional.cross_entropy(logits, ids[at], reduction="none")
        best = torch.zeros_like(ids)
        best[at] = logits.argmax(-1)
        sums = nats.double().sum(1)
        chosen = [row[: len(answer)] for row, answer in zip(best.tolist(), answers, strict=True)]
        return sums.tolist(), chosen, torch.isfinite(sums).tolist()

    def generate(self, limits: Limits) -> list[tuple[tuple[int, ...], bool, bool]]:
        """Greedy answers without their stop token, with whether they have one and whether every logit was finite.

        Rows that have ended leave the batch.
        """
        stops = torch.tensor(sorted(limits.stop_ids), dtype=torch.long, device=self.mask.device)
        out: list[list[int]] = [[] for _ in range(len(self.mask))]
        ended, finite = [False] * len(out), [True] * len(out)
        rows = list(range(len(out)))
        cache, mask, hidden = _cache(self.model, self.kept), self.mask, self.hidden
        for step in range(limits.max_new_tokens):
            logits = self.model.lm_head(hidden)
            chosen, well = logits.argmax(-1), torch.isfinite(logits).all(-1).tolist()
            stopped = torch.isin(chosen, stops).tolist()
            for row, token, has_stopped, is_well in zip(rows, chosen.tolist(), stopped, well, strict=True):
                finite[row] &= is_well
                ended[row] = has_stopped
                if not has_stopped:
                    out[row].append(token)
            going = [k for k, has_stopped in enumerate(stopped) if not has_stopped]
            if not going or step == limits.max_new_tokens - 1:
                break
            if len(going) < len(rows):
                at = torch.tensor(going, device=mask.device)
                cache = _cache(self.model, [(keys[at], values[at]) for keys, values in _kept(cache)])
                mask, chosen, rows = mask[at], chosen[at], [rows[k] for k in going]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            embeddings = self.model.get_input_embeddings()(chosen)[:, None]
            hidden = _forward(self.model, embeddings, mask, cache)[:, -1]
        return [(tuple(ids), has_ended, well) for ids, has_ended, well in zip(out, ended, finite, strict=True)]


def _forward(model: LlavaForConditionalGeneration, embeddings: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """(B, T, D) hidden states of T tokens behind a cache; a position counts the real tokens before it."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
    hidden: Tensor = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return hidden


def _cache(model: LlavaForConditionalGeneration, kept: KeysValues) -> DynamicCache:
    cache = DynamicCache(config=model.config.text_config)
    for layer, (keys, values) in enumerate(kept):
        cache.update(keys, values, layer)
    return cache


def _kept(cache: DynamicCache) -> KeysValues:
    return [(layer.keys, layer.values) for layer in cache.layers]
