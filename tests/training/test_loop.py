"""The loop is repeatable, in a known order, touches the projector alone, and stops when numbers are none any more."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llava_pipeline.errors import Diverged, SpecError
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import frozen_digest
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.model.projector import digest_of, state_of
from llava_pipeline.spec import TrainingSpec, load_spec, profile_names
from llava_pipeline.training.loop import (
    Samples,
    StepRecord,
    choose_device,
    choose_precision,
    order,
    place,
    sample_indices,
    train,
)
from tests.tiny import samples_of

CPU = torch.device("cpu")


def a_spec(**changes: Any) -> TrainingSpec:
    values = {"max_steps": 4, "batch_size": 2, "accumulation": 2, "learning_rate": 1e-2, "device": "cpu"}
    return TrainingSpec(**(values | changes))


def run(llava: Llava, spec: TrainingSpec, samples: Samples | None = None) -> tuple[list[StepRecord], str]:
    """Records of a training on a copy, and the digest of its projector."""
    model = copy.deepcopy(llava.model)
    place(model, CPU, choose_precision(spec.precision, CPU))
    records = list(train(model, samples or samples_of(llava), spec))
    return records, digest_of(state_of(model))


def without_seconds(records: list[StepRecord]) -> list[StepRecord]:
    return [replace(record, seconds=0.0) for record in records]


def with_bad_pictures(llava: Llava, pictures: list[int], value: float = torch.inf) -> Samples:
    samples = samples_of(llava)
    features = samples.features.clone()
    features[pictures] = value
    return replace(samples, features=features)


# --------------------------------------------------------------------------------------------- the same again


def test_the_same_seed_gives_the_same_bytes(llava: Llava) -> None:
    first, digest = run(llava, a_spec())
    torch.rand(5)
    second, again = run(llava, a_spec())
    assert digest == again
    assert without_seconds(first) == without_seconds(second)


def test_another_seed_gives_another_projector(llava: Llava) -> None:
    assert run(llava, a_spec(seed=1))[1] != run(llava, a_spec(seed=2))[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_never_change(llava: Llava, precision: Any) -> None:
    place(llava.model, CPU, choose_precision(precision, CPU))
    frozen, projector = frozen_digest(llava.model), digest_of(state_of(llava.model))
    list(train(llava.model, samples_of(llava), a_spec(weight_decay=0.1)))
    assert frozen_digest(llava.model) == frozen
    assert digest_of(state_of(llava.model)) != projector
    assert all(p.grad is None for p in llava.model.parameters())


def test_it_learns_a_few_samples(lively: Llava) -> None:
    records, _ = run(lively, a_spec(max_steps=25, batch_size=5, accumulation=1, learning_rate=3e-2))
    losses = [record.loss for record in records]
    assert losses[-1] < 0.8 * losses[0]
    assert not any(record.skipped for record in records)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_frozen_parts_in_half_precision_learn_alike(llava: Llava, precision: Any) -> None:
    exact, _ = run(llava, a_spec(max_steps=8))
    rounded, _ = run(llava, a_spec(max_steps=8, precision=precision))
    assert [r.loss for r in rounded] == pytest.approx([r.loss for r in exact], rel=0.02)


def test_the_projector_stays_in_full_precision(llava: Llava) -> None:
    place(llava.model, CPU, torch.bfloat16)
    parts = llava.model.model
    assert {p.dtype for p in parts.multi_modal_projector.parameters()} == {torch.float32}
    frozen = [*parts.vision_tower.parameters(), *parts.language_model.parameters(), *llava.model.lm_head.parameters()]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_frequencies_and_other_buffers_are_not_rounded(llava: Llava, precision: torch.dtype) -> None:
    before = {name: buffer.clone() for name, buffer in llava.model.named_buffers()}
    assert {name.rsplit(".", 1)[-1] for name in before} >= {"inv_freq", "original_inv_freq"}
    place(llava.model, CPU, precision)
    for name, buffer in llava.model.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name


def test_placing_rounds_no_projector_and_keeps_the_head_tied(llava: Llava) -> None:
    before = digest_of(state_of(llava.model))
    place(llava.model, CPU, torch.bfloat16)
    assert digest_of(state_of(llava.model)) == before
    assert llava.model.lm_head.weight is llava.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("computes", "emulates", "expected"),
    [(True, True, torch.bfloat16), (False, True, torch.float16), (False, False, torch.float16)],
)
def test_a_card_that_only_emulates_bf16_trains_in_fp16(
    monkeypatch: pytest.MonkeyPatch, computes: bool, emulates: bool, expected: torch.dtype
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return computes or (including_emulation and emulates)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert choose_precision("auto", torch.device("cuda")) == expected


def test_a_card_that_is_not_there_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(SpecError, match=r"but torch .* finds no card .* set training\.device=auto"):
        choose_device("cuda")


def test_the_optimizer_has_the_betas_of_the_spec(llava: Llava) -> None:
    assert a_spec().betas == (0.9, 0.999)
    assert run(llava, a_spec())[1] == run(llava, a_spec(betas=(0.9, 0.999)))[1]
    assert run(llava, a_spec())[1] != run(llava, a_spec(betas=(0.9, 0.98)))[1]


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), (0.9, 0.98, 0.9)])
def test_betas_that_are_none_are_refused(betas: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="betas"):
        a_spec(betas=betas)


@pytest.mark.parametrize("profile", profile_names())
def test_the_seeds_recipes_have_torchs_betas(profile: str) -> None:
    expected = (0.9, 0.999) if profile.startswith("budget") else (0.9, 0.98)
    assert load_spec(profile).training.betas == expected


def test_a_cpu_trains_in_full_precision_unless_told() -> None:
    assert choose_precision("auto", CPU) == torch.float32
    assert [choose_precision(name, CPU) for name in ("fp16", "bf16")] == [torch.float16, torch.bfloat16]
    assert choose_device("cpu") == CPU


# --------------------------------------------------------------------------------------------- what a step tells


def test_a_record_has_what_was_seen(llava: Llava) -> None:
    samples = samples_of(llava)
    records, _ = run(llava, a_spec(seed=3))
    for number, record in enumerate(records):
        seen = sample_indices(len(samples.input_ids), 3, number * 4, 4)
        labels = torch.cat([samples.labels[k][1:] for k in seen])
        assert record.step == number + 1
        assert record.num_samples == 4
        assert record.num_tokens == sum(len(samples.input_ids[k]) for k in seen)
        assert record.num_supervised_tokens == int((labels != IGNORE_INDEX).sum())
    assert records[0].learning_rate == 1e-2
    assert records[-1].learning_rate == pytest.approx(2e-5)


def test_a_record_is_plain_json(llava: Llava) -> None:
    record = run(llava, a_spec(max_steps=1))[0][0]
    assert StepRecord(**json.loads(json.dumps(record.as_json()))) == record


def test_accumulation_is_one_large_batch(llava: Llava) -> None:
    small, _ = run(llava, a_spec(batch_size=1, accumulation=4))
    large, _ = run(llava, a_spec(batch_size=4, accumulation=1))
    assert [r.loss for r in small] == pytest.approx([r.loss for r in large], rel=1e-4)
    assert [r.grad_norm for r in small] == pytest.approx([r.grad_norm for r in large], rel=1e-3)


def test_the_gradient_is_clipped_and_its_whole_norm_told(llava: Llava) -> None:
    def moved(max_grad_norm: float) -> tuple[float, float]:
        model = copy.deepcopy(llava.model)
        before = state_of(model)
        (record,) = train(model, samples_of(llava), a_spec(max_steps=1, max_grad_norm=max_grad_norm))
        after = state_of(model)
        return record.grad_norm, max(float((after[name] - before[name]).abs().max()) for name in before)

    whole, free = moved(1e9)
    clipped_norm, clipped = moved(1e-12)  # far below AdamW's epsilon, which makes its step as small
    assert clipped_norm == whole > 1e-6
    assert free == pytest.approx(1e-2, rel=0.05)
    assert clipped < 1e-4 * free


# --------------------------------------------------------------------------------------------- order


@given(num=st.integers(1, 60), seed=st.integers(0, 2**31), epoch=st.integers(0, 1000))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(num: int, seed: int, epoch: int) -> None:
    before = torch.get_rng_state()
    found = order(num, seed, epoch)
    assert sorted(found) == list(range(num))
    torch.rand(1)
    assert order(num, seed, epoch) == found
    torch.set_rng_state(before)
    if num > 20:
        assert order(num, seed, epoch + 1) != found
        assert order(num, seed + 1, epoch) not in (found, order(num, seed, epoch + 1))


@given(num=st.integers(1, 20), seed=st.integers(0, 99), start=st.integers(0, 90), counts=st.lists(st.integers(0, 30)))
def test_pieces_of_the_order_join_to_the_whole(num: int, seed: int, start: int, counts: list[int]) -> None:
    pieces: list[int] = []
    for count in counts:
        piece = sample_indices(num, seed, start + len(pieces), count)
        assert len(piece) == count
        pieces += piece
    assert pieces == sample_indices(num, seed, start, sum(counts))


@given(num=st.integers(1, 20), seed=st.integers(0, 99), epochs=st.integers(0, 4))
def test_every_epoch_has_every_sample_once(num: int, seed: int, epochs: int) -> None:
    found = sample_indices(num, seed, 0, num * epochs)
    assert [found[k * num : (k + 1) * num] for k in range(epochs)] == [order(num, seed, k) for k in range(epochs)]
    assert set(Counter(found).values()) <= {epochs}


# --------------------------------------------------------------------------------------------- no numbers


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_loss_that_is_no_number_is_skipped_and_counted(llava: Llava, value: float) -> None:
    samples = with_bad_pictures(llava, [0], value)
    spec = a_spec(max_steps=5, batch_size=1, accumulation=1)
    seen = [samples.image[k] for k in sample_indices(len(samples.image), spec.seed, 0, 5)]
    records, _ = run(llava, spec, samples)
    assert [record.skipped for record in records] == [image == 0 for image in seen]
    assert 0 < sum(record.skipped for record in records) < 5
    assert all(math.isfinite(record.loss) != record.skipped for record in records)


def test_a_skipped_step_changes_nothing(llava: Llava) -> None:
    samples = with_bad_pictures(llava, [0])
    spec = a_spec(max_steps=5, batch_size=1, accumulation=1)
    digests = []
    for record in train(llava.model, samples, spec):
        digests.append((record.skipped, digest_of(state_of(llava.model))))
    for (_, before), (skipped, after) in pairwise(digests):
        assert (before == after) == skipped
    assert all(torch.isfinite(tensor).all() for tensor in state_of(llava.model).values())


def test_five_in_a_row_stop_the_training_with_a_remedy(llava: Llava) -> None:
    before = digest_of(state_of(llava.model))
    records: list[StepRecord] = []
    training = train(llava.model, with_bad_pictures(llava, [0, 1, 2]), a_spec(max_steps=20))
    with pytest.raises(Diverged) as error:
        records.extend(training)
    assert [record.skipped for record in records] == [True] * 5
    assert digest_of(state_of(llava.model)) == before
    assert "loss nan and gradient norm nan at step 5, the 5th in a row that is no number" in str(error.value)
    assert "lower training.learning_rate (0.01) or set training.precision=fp32" in str(error.value)


def test_four_in_a_row_do_not_stop_it(llava: Llava) -> None:
    records: list[StepRecord] = []
    broken = llava.model.model.multi_modal_projector.linear_2.bias.register_hook(lambda gradient: gradient * math.nan)
    for record in train(llava.model, samples_of(llava), a_spec(max_steps=6)):
        records.append(record)
        if record.step == 4:
            broken.remove()
    assert [record.skipped for record in records] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("max_steps", [1, 4])
def test_a_training_that_applied_nothing_has_diverged(llava: Llava, max_steps: int) -> None:
    with pytest.raises(Diverged, match=f"none of {max_steps} steps .* nothing was learned; raise training.max_steps"):
        run(llava, a_spec(max_steps=max_steps), with_bad_pictures(llava, [0, 1, 2]))


# --------------------------------------------------------------------------------------------- the scale of the loss


def test_a_scale_that_is_too_large_is_lowered_and_stops_nothing(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    records, _ = run(llava, a_spec(max_steps=40, precision="fp16"))
    skipped = [record.skipped for record in records]
    num_skipped = sum(skipped)
    assert 5 < num_skipped < 40
    assert skipped == [True] * num_skipped + [False] * (40 - num_skipped)
    assert all(math.isfinite(record.loss) for record in records)


def test_a_gradient_that_no_scale_can_mend_stops_the_training(llava: Llava) -> None:
    place(llava.model, CPU, torch.float16)
    llava.model.model.multi_modal_projector.linear_2.bias.register_hook(lambda gradient: gradient * math.nan)
    records: list[StepRecord] = []
    with pytest.raises(Diverged, match="gradient norm nan at step 21, the 5th in a row"):
        records.extend(train(llava.model, samples_of(llava), a_spec(max_steps=40)))
    assert len(records) == 16 + 5  # from 65536 to 1 by halves, and five more


def test_a_loss_that_is_no_number_is_no_matter_of_scale(llava: Llava) -> None:
    with pytest.raises(Diverged, match="at step 5, the 5th in a row"):
        run(llava, a_spec(max_steps=20, precision="fp16"), with_bad_pictures(llava, [0, 1, 2]))


def test_nor_do_many_that_are_not_in_a_row(llava: Llava) -> None:
    records, _ = run(llava, a_spec(max_steps=20, batch_size=1, accumulation=1), with_bad_pictures(llava, [0]))
    assert sum(record.skipped for record in records) == 8  # two of five samples, four epochs: never five in a row
