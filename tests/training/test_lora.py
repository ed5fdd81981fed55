"""A LoRA on the language model: learned in the packed step as peft's own forward learns it, kept, put back, merged."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import IncompatibleParts, SpecError, WeightsMismatch
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import frozen_digest, learned, let_learn
from llava_pipeline.model.quantize import to_nf4
from llava_pipeline.spec import LoraSpec, PartSpec, StepSpec, TrainingSpec
from llava_pipeline.training.device import place
from llava_pipeline.training.step import PackedStep, PlainStep, Step, make_step
from tests.tiny import features_of, samples_of

LORA = TrainingSpec(
    max_steps=1, language_model=PartSpec(mode="lora", learning_rate=1e-4), lora=LoraSpec(rank=4, alpha=8)
)
ATTENTION = LORA.model_copy(update={"lora": LoraSpec(rank=2, alpha=2, targets=("q_proj", "v_proj"))})
OFF = StepSpec(pack=False, share_prefix=False, select=False, fold=False, lean=False)


@pytest.fixture
def adapted(lively: Llava) -> Llava:
    """A model with an adapter that changes much."""
    return with_adapter(lively, LORA)


def with_adapter(llava: Llava, spec: TrainingSpec) -> Llava:
    let_learn(llava.model, spec)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters(llava.model.model.language_model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return llava


def state_of(llava: Llava, spec: TrainingSpec = LORA) -> projector.State:
    found = projector.state_of(llava.model) | {k: v.detach().clone() for k, v in learned(llava.model, spec).items()}
    return found | {adapter.SCALE: adapter.scale(llava.model.model.language_model)}


def gradients(llava: Llava, step: Step, spec: TrainingSpec) -> tuple[float, dict[str, Tensor]]:
    indices = range(len(step.samples))
    total = 0.0
    for part in step.split(list(indices), 60):
        loss = step.loss(part, 0.01)
        (loss * 0.01).backward()
        total += loss.item()
    found = {name: p.grad for name, p in learned(llava.model, spec).items() if p.grad is not None}
    assert sum(p.grad is not None for p in llava.model.parameters()) == len(found)
    llava.model.zero_grad(set_to_none=True)
    return total, found


def assert_same(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]],
    rel: float = 1e-5, of_gradients: float = 1e-4,
) -> None:  # fmt: skip
    """Loss and gradients of two steps."""
    assert found[0] == pytest.approx(expected[0], rel=rel)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= of_gradients * gradient.norm(), name


def logits_of(llava: Llava) -> Tensor:
    ids = samples_of(llava).of(2)[0][None]
    with torch.no_grad():
        return llava.model.lm_head(llava.model.model.language_model(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("spec", [LORA, ATTENTION], ids=["all-matrices", "attention"])
@pytest.mark.parametrize("tricks", [StepSpec(), OFF], ids=["packed", "no-tricks"])
def test_the_packed_step_learns_an_adapter_as_peft_does(lively: Llava, spec: TrainingSpec, tricks: StepSpec) -> None:
    adapted = with_adapter(lively, spec)
    samples, features = samples_of(adapted), features_of(adapted)
    expected = gradients(adapted, PlainStep(adapted.model, samples, lambda images: features[images]), spec)
    step = make_step(adapted.model, samples, lambda images: features[images], torch.float32, tricks)
    assert isinstance(step, PackedStep)
    found = gradients(adapted, step, spec)
    assert_same(found, expected)
    assert len(found[1]) == 4 + 2 * 2 * len(spec.lora.targets)
    assert all(gradient.norm() > 1e-7 for gradient in expected[1].values())


def test_an_adapter_learns_from_samples_about_one_picture_as_peft_does(lively: Llava) -> None:
    adapted = with_adapter(lively, LORA)
    samples, features = samples_of(adapted, image=torch.tensor([0, 0, 0, 2, 2])), features_of(adapted)
    expected = gradients(adapted, PlainStep(adapted.model, samples, lambda images: features[images]), LORA)
    step = make_step(adapted.model, samples, lambda images: features[images], torch.float32, StepSpec())
    assert_same(gradients(adapted, step, LORA), expected)


def test_activations_that_are_computed_again_change_no_gradient(adapted: Llava) -> None:
    samples, features = samples_of(adapted), features_of(adapted)
    both = []
    for spec in (StepSpec(), StepSpec(recompute=True)):
        step = PackedStep(adapted.model, samples, lambda images: features[images], torch.float32, spec)
        both.append(gradients(adapted, step, LORA))
    assert both[0][0] == both[1][0]
    for name, gradient in both[0][1].items():
        assert torch.equal(gradient, both[1][1][name]), name


def test_a_fresh_adapter_changes_nothing_and_is_a_function_of_its_seed(lively: Llava) -> None:
    before, other = logits_of(lively), copy.deepcopy(lively.model)
    let_learn(lively.model, LORA)
    let_learn(other, LORA)
    assert torch.equal(logits_of(lively), before)
    ours, theirs = (adapter.parameters(model.model.language_model) for model in (lively.model, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(value.any() for value in ours.values())


def test_the_frozen_digest_does_not_see_an_adapter(lively: Llava) -> None:
    before = frozen_digest(lively.model)
    with_adapter(lively, LORA)
    assert frozen_digest(lively.model) == before
    with torch.no_grad():
        lively.model.model.language_model.layers[1].mlp.down_proj.base_layer.weight[0, 0] += 1
    assert frozen_digest(lively.model) != before


def test_what_was_saved_is_put_back_bit_by_bit(
    adapted: Llava, shared: Llava, assembled: AssembledModel, tmp_path: Path
) -> None:
    projector.save(tmp_path, state_of(adapted), assembled, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "manifest.json", "projector.safetensors"]
    state = projector.load(tmp_path, assembled)
    fresh = copy.deepcopy(adapted.model)
    projector.put(fresh, {k: v for k, v in state.items() if not k.startswith(adapter.PREFIX)})
    assert not adapter.layers(fresh.model.language_model)
    assert not hasattr(fresh.model.language_model, "peft_config")
    projector.put(fresh, state)
    assert torch.equal(logits_of(Llava(fresh, shared.processor, {})), logits_of(adapted))
    assert not any(parameter.requires_grad for parameter in fresh.model.language_model.parameters())


def test_peft_itself_reads_what_was_saved(adapted: Llava, assembled: AssembledModel, tmp_path: Path) -> None:
    from peft import PeftModel

    projector.save(tmp_path, state_of(adapted), assembled, {})
    expected = logits_of(adapted)
    plain = copy.deepcopy(adapted)
    adapter.remove(plain.model.model.language_model)
    read = PeftModel.from_pretrained(plain.model.model.language_model, tmp_path / "adapter")
    ids = samples_of(adapted).of(2)[0][None]
    with torch.no_grad():
        found = plain.model.lm_head(read(input_ids=ids).last_hidden_state)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_merged_adapter_answers_as_one_beside_the_weights(adapted: Llava) -> None:
    expected = logits_of(adapted)
    adapter.merge(adapted.model.model.language_model)
    assert not adapter.layers(adapted.model.model.language_model)
    assert torch.allclose(logits_of(adapted), expected, atol=1e-4)


def test_each_row_of_a_batch_may_ask_another_adapter(adapted: Llava) -> None:
    language_model = adapted.model.model.language_model
    state = {k: v for k, v in state_of(adapted).items() if k.startswith(adapter.PREFIX)}
    weaker = {k: v * 0.5 if k.endswith("lora_B.weight") else v for k, v in state.items()}
    few = {k: v for k, v in weaker.items() if "q_proj" in k or k == adapter.SCALE}
    adapter.remove(language_model)
    alone = [logits_of(adapted)]
    for one in (state, few):
        adapter.put(language_model, one)
        alone.append(logits_of(adapted))
    adapter.remove(language_model)
    adapter.put(language_model, state, "a")
    adapter.put(language_model, few, "b")
    ids = samples_of(adapted).of(2)[0][None]
    with torch.no_grad(), adapter.asked(language_model, [None, "b", "a", "a"]):
        mixed = adapted.model.lm_head(language_model(input_ids=ids.repeat(4, 1)).last_hidden_state)
    for row, k in enumerate((0, 2, 1, 1)):
        assert torch.allclose(mixed[row], alone[k][0], atol=1e-4)
    for k, name in enumerate((None, "a", "b")):
        with adapter.asked(language_model, [name]):
            assert torch.equal(logits_of(adapted), alone[k])


def test_a_damaged_adapter_is_refused(adapted: Llava, assembled: AssembledModel, tmp_path: Path) -> None:
    projector.save(tmp_path, state_of(adapted), assembled, {})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsMismatch, match="differ from its manifest"):
        projector.load(tmp_path, assembled)


def test_an_adapter_for_other_shapes_is_refused(adapted: Llava) -> None:
    state = state_of(adapted)
    key = next(name for name in state if name.endswith("lora_B.weight"))
    with pytest.raises(WeightsMismatch, match="the model asks for"):
        projector.put(adapted.model, state | {key: state[key][:-1]})
    moved = {name.replace("layers.1.", "layers.9."): value for name, value in state.items()}
    with pytest.raises(WeightsMismatch, match=r"layers\.9"):
        projector.put(adapted.model, moved)


def test_going_on_with_another_rank_or_other_matrices_is_refused(adapted: Llava, lively: Llava) -> None:
    for lora in (LoraSpec(rank=8, alpha=16), LoraSpec(rank=4, alpha=4), ATTENTION.lora):
        with pytest.raises(IncompatibleParts, match=r"set training\.lora to the same"):
            let_learn(adapted.model, LORA.model_copy(update={"lora": lora}))


def test_targets_that_the_model_does_not_have_are_refused(lively: Llava) -> None:
    with pytest.raises(IncompatibleParts, match="no matrix named c_attn"):
        let_learn(lively.model, LORA.model_copy(update={"lora": LoraSpec(targets=("c_attn",))}))


def test_a_model_in_four_bits_learns_what_a_plain_one_of_the_same_numbers_does(lively: Llava) -> None:
    from bitsandbytes.functional import dequantize_4bit

    state = state_of(with_adapter(lively, LORA))
    plain = copy.deepcopy(lively)
    language_model = lively.model.model.language_model
    adapter.remove(language_model)
    bytes_before = sum(p.nbytes for p in language_model.layers.parameters())
    to_nf4(language_model, torch.float32)
    place(lively.model, torch.device("cpu"), torch.float32)
    assert sum(p.nbytes for p in language_model.layers.parameters()) < bytes_before / 6
    before = frozen_digest(lively.model)
    projector.put(lively.model, state)
    let_learn(lively.model, LORA)
    with torch.no_grad():
        for name, layer in adapter.layers(plain.model.model.language_model).items():
            small = language_model.get_submodule(name).base_layer.weight
            layer.base_layer.weight.copy_(dequantize_4bit(small.data, small.quant_state))
    samples, features = samples_of(plain), features_of(plain)
    expected = gradients(plain, PlainStep(plain.model, samples, lambda images: features[images]), LORA)
    step = make_step(lively.model, samples, lambda images: features[images], torch.float32, StepSpec())
    assert isinstance(step, PlainStep)
    found = gradients(lively, step, LORA)
    assert_same(found, expected, rel=1e-4, of_gradients=1e-3)
    assert frozen_digest(lively.model) == before


def test_without_bitsandbytes_four_bits_are_refused_with_the_remedy(
    lively: Llava, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(SpecError, match=r"pip install 'llava-pipeline\[qlora\]'"):
        to_nf4(lively.model.model.language_model, torch.float32)
