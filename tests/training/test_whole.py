"""A language model that is trained whole: its gradient, what is kept of it, and that it is put back and taken away."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import WeightsMismatch
from llava_pipeline.model import projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import LANGUAGE_MODEL, frozen_digest, learned, let_learn
from llava_pipeline.spec import PartSpec, StepSpec, TrainingSpec
from llava_pipeline.training.loop import make_learner
from llava_pipeline.training.plain import collate
from llava_pipeline.training.step import PlainStep, make_step
from tests.tiny import features_of, pictures, samples_of

WHOLE = TrainingSpec(
    max_steps=1, learning_rate=1e-3, language_model=PartSpec(mode="full", learning_rate=2e-4), weight_decay=0.0
)


@pytest.mark.parametrize("spec", [StepSpec(), StepSpec(recompute=True)], ids=["kept", "recomputed"])
def test_the_gradient_of_every_weight_is_that_of_the_plain_forward(lively: Llava, spec: StepSpec) -> None:
    model = lively.model
    let_learn(model, WHOLE)
    samples, features = samples_of(lively), features_of(lively)
    rows = [samples.of(k) for k in range(len(samples))]
    batch = collate([ids for ids, _ in rows], [labels for _, labels in rows], torch.empty(0), 0)
    pixels = pictures(lively)[samples.images_of(range(len(samples)))]
    model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, pixel_values=pixels
    ).loss.backward()
    expected = {name: p.grad for name, p in learned(model, WHOLE).items()}
    model.zero_grad(set_to_none=True)
    step = make_step(model, samples, lambda images: features[images], torch.float32, spec)
    assert isinstance(step, PlainStep)
    for part in step.split(list(range(len(samples))), 60):
        (step.loss(part) / samples.num_supervised(range(len(samples)))).backward()
    assert len(expected) == 4 + sum(1 for _ in model.model.language_model.parameters()) + (
        model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    )
    for name, parameter in learned(model, WHOLE).items():
        gradient = expected[name]
        assert gradient is not None, name
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert all(parameter.grad is None for parameter in model.model.vision_tower.parameters())


def test_each_part_learns_at_its_own_rate(lively: Llava) -> None:
    let_learn(lively.model, WHOLE)
    learner = make_learner(learned(lively.model, WHOLE), WHOLE, torch.float32)
    assert [group["share"] for group in learner.optimizer.param_groups] == pytest.approx([1.0, 0.2])
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(learner.parameters)


def test_the_frozen_digest_is_of_what_does_not_learn(lively: Llava) -> None:
    let_learn(lively.model, WHOLE)
    before = frozen_digest(lively.model)
    with torch.no_grad():
        lively.model.model.language_model.norm.weight += 1
    assert frozen_digest(lively.model) == before
    with torch.no_grad():
        next(lively.model.model.vision_tower.parameters()).add_(1)
    assert frozen_digest(lively.model) != before


def test_it_is_kept_put_back_and_taken_away(
    lively: Llava, shared: Llava, assembled: AssembledModel, tmp_path: Path
) -> None:
    let_learn(lively.model, WHOLE)
    whole = {name: value.detach().clone() for name, value in learned(lively.model, WHOLE).items()}
    projector.save(tmp_path, projector.state_of(lively.model) | whole, assembled, {})
    names = ["language_model.safetensors", "manifest.json", "projector.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    state = projector.load(tmp_path, assembled)
    model = copy.deepcopy(shared.model)
    own = copy.deepcopy(model.state_dict())
    projector.put(model, state)
    found = learned(model, WHOLE)
    assert all(torch.equal(value, found[name]) for name, value in learned(lively.model, WHOLE).items())
    projector.put(model, projector.state_of(shared.model))
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused(lively: Llava) -> None:
    let_learn(lively.model, WHOLE)
    state = projector.state_of(lively.model) | {f"{LANGUAGE_MODEL}norm.weight": torch.ones(3)}
    with pytest.raises(WeightsMismatch, match="other weights"):
        projector.put(lively.model, state)
