"""The step's shortcuts change nothing: it has the loss and the gradient of the plain LlavaForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.training.loop import Samples, accumulate
from llava_pipeline.training.step import Batch, collate, embed, loss_sum, tower_features
from tests.tiny import pictures, samples_of

CPU = torch.device("cpu")
ALL = [0, 1, 2, 3, 4]
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
Gradients = dict[str, torch.Tensor]


def gradients(llava: Llava) -> Gradients:
    """The projector's, taken off the model; nothing else has one."""
    found = {name: p.grad for name, p in llava.model.named_parameters() if p.grad is not None}
    llava.model.zero_grad(set_to_none=True)
    return found


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    assert {name.split(".")[1] for name in found} == {"multi_modal_projector"}
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, name
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def plain(llava: Llava, samples: Samples, indices: Sequence[int]) -> tuple[float, Gradients]:
    """Loss and gradient of transformers' own forward, from pictures."""
    batch = samples.batch(list(indices), CPU)
    loss = llava.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        pixel_values=pictures(llava)[[samples.image[k] for k in indices]],
    ).loss
    loss.backward()
    return loss.item(), gradients(llava)


def ours(llava: Llava, batch: Batch) -> tuple[float, Gradients]:
    """Loss and gradient of the step, a mean over its tokens."""
    loss = loss_sum(llava.model, batch) / batch.num_labels
    loss.backward()
    return loss.item(), gradients(llava)


@pytest.mark.parametrize("indices", [ALL, [2], [3, 0], [1, 1, 4]])
def test_loss_and_gradient_are_those_of_the_plain_forward(lively: Llava, indices: list[int]) -> None:
    samples = samples_of(lively)
    expected, expected_gradients = plain(lively, samples, indices)
    found, found_gradients = ours(lively, samples.batch(indices, CPU))
    assert found == pytest.approx(expected, abs=1e-5)
    assert_same(found_gradients, expected_gradients)


def test_so_are_those_of_a_fresh_model(llava: Llava) -> None:
    samples = samples_of(llava)
    expected, expected_gradients = plain(llava, samples, ALL)
    found, found_gradients = ours(llava, samples.batch(ALL, CPU))
    assert found == pytest.approx(expected, abs=1e-5)
    assert_same(found_gradients, expected_gradients)


def test_samples_of_different_length_were_compared(llava: Llava) -> None:
    samples = samples_of(llava)
    assert len({len(ids) for ids in samples.input_ids}) >= 3
    rounds = [int(((row[1:] != IGNORE_INDEX) & (row[:-1] == IGNORE_INDEX)).sum()) for row in samples.labels]
    assert rounds == [1, 2, 3, 1, 1]


def test_features_of_the_tower_are_what_the_plain_forward_projects(llava: Llava) -> None:
    pixels = pictures(llava)
    features = tower_features(llava.model, pixels)
    projected = llava.model.model.multi_modal_projector(features)
    expected = llava.model.model.get_image_features(pixels).pooler_output
    assert features.shape[:2] == (len(pixels), llava.processor.num_image_tokens)
    assert torch.equal(projected, torch.stack(tuple(expected)))


def test_features_stand_at_the_image_tokens_in_reading_order(llava: Llava) -> None:
    samples = samples_of(llava)
    batch = samples.batch(ALL, CPU)
    found = embed(llava.model, batch.input_ids, batch.features)
    at_image = batch.input_ids == llava.processor.image_token_id
    words = llava.model.get_input_embeddings()(batch.input_ids)
    projected = llava.model.model.multi_modal_projector(batch.features)
    assert torch.equal(found[~at_image], words[~at_image])
    for row in range(len(ALL)):
        assert torch.equal(found[row][at_image[row]], projected[row])


def test_the_sum_is_the_sum_of_every_sample_alone(lively: Llava) -> None:
    samples = samples_of(lively)
    batch = samples.batch(ALL, CPU)
    per_sample = loss_sum(lively.model, batch, per_sample=True)
    alone = [loss_sum(lively.model, samples.batch([k], CPU)).item() for k in ALL]
    assert per_sample.tolist() == pytest.approx(alone, rel=1e-5)
    assert loss_sum(lively.model, batch).item() == pytest.approx(sum(alone), rel=1e-5)


def test_a_sample_without_a_label_has_no_loss(llava: Llava) -> None:
    samples = samples_of(llava)
    labels = [*samples.labels[:1], torch.full_like(samples.labels[1], IGNORE_INDEX), *samples.labels[2:]]
    per_sample = loss_sum(llava.model, replace(samples, labels=labels).batch(ALL, CPU), per_sample=True)
    assert [bool(loss) for loss in per_sample] == [True, False, True, True, True]


# --------------------------------------------------------------------------------------------- padding


def test_a_batch_is_padded_on_the_right(llava: Llava) -> None:
    samples = samples_of(llava)
    batch = samples.batch([0, 2], CPU)
    short, long = len(samples.input_ids[0]), len(samples.input_ids[2])
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2, long)
    assert batch.input_ids[0].tolist() == samples.input_ids[0].tolist() + [samples.pad_token_id] * (long - short)
    assert batch.labels[0].tolist() == samples.labels[0].tolist() + [IGNORE_INDEX] * (long - short)
    assert batch.attention_mask.sum(1).tolist() == [short, long]
    assert torch.equal(batch.features, samples.features[[0, 2]])


def test_padding_changes_nothing(lively: Llava) -> None:
    samples = samples_of(lively)
    ids, labels, features = samples.input_ids[0], samples.labels[0], samples.features[:1]
    expected, expected_gradients = ours(lively, collate([ids], [labels], features, samples.pad_token_id))
    for pad in (samples.pad_token_id, 0, int(ids[-1])):
        padded = collate([ids, torch.cat([ids, ids])], [labels, torch.cat([labels, labels])], features, pad)
        only_first = Batch(padded.input_ids[:1], padded.labels[:1], padded.attention_mask[:1], features)
        assert only_first.input_ids.shape[1] == 2 * len(ids)
        found, found_gradients = ours(lively, only_first)
        assert found == pytest.approx(expected, abs=1e-5)
        assert_same(found_gradients, expected_gradients)


def test_a_padding_token_inside_a_sample_is_a_token(lively: Llava) -> None:
    samples = samples_of(lively)
    end = int(samples.input_ids[0][-1])  # every sample ends with it and holds it where an answer ends
    batch = replace(samples, pad_token_id=end).batch(ALL, CPU)
    assert batch.attention_mask.sum(1).tolist() == [len(ids) for ids in samples.input_ids]
    assert batch.num_labels == samples.batch(ALL, CPU).num_labels
    expected = loss_sum(lively.model, samples.batch(ALL, CPU), per_sample=True)
    torch.testing.assert_close(loss_sum(lively.model, batch, per_sample=True), expected, rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    labels = torch.tensor([[5, IGNORE_INDEX, 7], [5, 6, 7]])
    assert Batch(labels, labels, torch.ones(2, 3), torch.ones(2, 1, 1)).num_labels == 3


# --------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_unequal_micro_batches_equal_one_large_batch(lively: Llava, size: int) -> None:
    samples = samples_of(lively)
    expected, expected_gradients = plain(lively, samples, ALL)
    total, num_supervised, num_tokens = accumulate(lively.model, samples, ALL, size, NO_SCALER)
    assert num_supervised == sum(int((labels[1:] != IGNORE_INDEX).sum()) for labels in samples.labels)
    assert num_tokens == sum(len(ids) for ids in samples.input_ids)
    assert total / num_supervised == pytest.approx(expected, abs=1e-5)
    assert_same(gradients(lively), expected_gradients)


def test_the_mean_is_over_tokens_not_over_micro_batches(lively: Llava) -> None:
    samples = samples_of(lively)
    singles = [ours(lively, samples.batch([k], CPU))[0] for k in ALL]
    total, num_supervised, _ = accumulate(lively.model, samples, ALL, 1, NO_SCALER)
    assert abs(total / num_supervised - sum(singles) / len(singles)) > 1e-3
