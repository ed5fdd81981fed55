"""The step's shortcuts change nothing: it has the loss and the gradient of the plain LlavaForConditionalGeneration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers import GPT2Config as Gpt2Config

from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import freeze_backbones
from llava_pipeline.model.processor import IGNORE_INDEX
from llava_pipeline.spec import StepSpec
from llava_pipeline.training import attention, frozen, llama, step
from llava_pipeline.training.attention import (
    Attend,
    Layout,
    has_varlen,
    lay_out,
    one_by_one,
    over_grid,
    over_segments,
    over_sequence,
)
from llava_pipeline.training.device import place
from llava_pipeline.training.features import tower_features
from llava_pipeline.training.llama import FrozenLlama, can_run, halve
from llava_pipeline.training.pack import make_pack
from llava_pipeline.training.plain import Batch, collate, embed, loss_sum
from llava_pipeline.training.samples import NO_PICTURE, Samples, collect
from llava_pipeline.training.step import PackedStep, PlainStep, Step, make_step
from llava_pipeline.training.work import useful_flops
from tests.tiny import IMAGES, pictures, samples_of

CPU = torch.device("cpu")
ALL = [0, 1, 2, 3, 4]
SWITCHES = ("pack", "share_prefix", "share_picture", "select", "fold", "lean")
OFF = StepSpec(**dict.fromkeys(SWITCHES, False))
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model, what it is trained on, and the pictures of that."""

    model: LlavaForConditionalGeneration
    samples: Samples
    pixels: Tensor

    def features(self, images: list[int]) -> Tensor:
        return tower_features(self.model, self.pixels)[images]

    def alike(self, **changes: Any) -> Case:
        """With a model of its own."""
        return replace(self, model=copy.deepcopy(self.model), **changes)

    def packed(self, spec: StepSpec | None = None, dtype: torch.dtype = torch.float32) -> PackedStep:
        return PackedStep(self.model, self.samples, self.features, dtype, spec or StepSpec())


def case_of(llava: Llava, seed_labels: bool = False) -> Case:
    return Case(llava.model, samples_of(llava, seed_labels=seed_labels), pictures(llava))


def gradients(model: LlavaForConditionalGeneration) -> Gradients:
    """The projector's, taken off the model; nothing else has one."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert {name.split(".")[1] for name in found} <= {"multi_modal_projector"}
    return found


def plain(case: Case, indices: Sequence[int]) -> tuple[float, Gradients]:
    """Loss and gradient of transformers' own forward, from pictures, a mean over supervised tokens."""
    rows = [case.samples.of(k) for k in indices]
    batch = collate([ids for ids, _ in rows], [labels for _, labels in rows], torch.empty(0), 0)
    images = case.samples.images_of(indices)
    loss = case.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        pixel_values=case.pixels[images] if images else None,
    ).loss
    if images:
        loss.backward()
    return loss.item(), gradients(case.model)


def ours(case: Case, step: Step, indices: Sequence[int], most: int = 1 << 14) -> tuple[float, Gradients]:
    """The same of a step, in as many passes as it takes."""
    scale = 1 / case.samples.num_supervised(indices)
    total = 0.0
    for part in step.split(indices, most):
        loss = step.loss(part, scale)
        if case.samples.images_of(part):  # without a picture there may be nothing to learn
            (loss * scale).backward()
        total += loss.item()
    return total * scale, gradients(case.model)


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 1e-6, name
        assert (found[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def assert_plain(case: Case, spec: StepSpec, indices: Sequence[int] = ALL, most: int = 1 << 14) -> PackedStep:
    """The packed step is the plain forward of the same model."""
    expected = plain(case, indices)
    made = case.packed(spec)
    assert_same(ours(case, made, indices, most), expected)
    return made


# --------------------------------------------------------------------------------------------- models of other shapes

VOCABULARY, IMAGE_TOKEN, NUM_BEFORE, PLACES = 60, 59, 6, 4


def llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**(sizes | changes))


def case_with(text: Any, seed_labels: bool = True) -> Case:
    """A model around a language model of this configuration, and samples that share a long beginning."""
    tower = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    generator = torch.Generator().manual_seed(3)
    tied = bool(text.tie_word_embeddings)
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PLACES,
        tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() > 1 else 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    freeze_backbones(model)
    samples = samples_with_prefix(seed_labels)
    return Case(model, samples, torch.randn(3, 3, 32, 32, generator=generator))


def samples_with_prefix(seed_labels: bool = True, images: Sequence[int] = IMAGES) -> Samples:
    """Five samples behind six shared tokens, of which the fourth has no picture if ``images`` says so."""
    generator = torch.Generator().manual_seed(11)
    shared = torch.randint(1, IMAGE_TOKEN, (NUM_BEFORE,), generator=generator)
    ids, labels = [], []
    for image, length in zip(images, (9, 17, 4, 12, 6), strict=True):
        text = torch.randint(1, IMAGE_TOKEN, (length,), generator=generator)
        text[0] = len(ids) + 1  # they differ from here on, pictures apart
        places = torch.full((PLACES if image != NO_PICTURE else 0,), IMAGE_TOKEN)
        row = torch.cat([shared, places, text])
        own = row.clone()
        if not seed_labels:
            own[: -length // 2] = IGNORE_INDEX
            own[-1] = IGNORE_INDEX  # whatever follows the last label is not needed
        ids.append(row)
        labels.append(own)
    return collect(ids, labels, images)


# --------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
@pytest.mark.parametrize("indices", [ALL, [2], [3, 0], [1, 1, 4]])
def test_loss_and_gradient_are_those_of_the_plain_forward(
    lively: Llava, indices: list[int], seed_labels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "FEWEST_PREFIX_TOKENS", 1)
    made = assert_plain(case_of(lively, seed_labels), StepSpec(), indices)
    assert made.num_prefix == 2


def test_so_are_those_of_a_fresh_model(llava: Llava) -> None:
    assert_plain(case_of(llava), StepSpec())


@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
@pytest.mark.parametrize("indices", [ALL, [2], [1, 1, 4]])
def test_so_are_those_of_padded_batches(lively: Llava, indices: list[int], seed_labels: bool) -> None:
    case = case_of(lively, seed_labels)
    expected = plain(case, indices)
    made = PlainStep(case.model, case.samples, case.features)
    assert_same(ours(case, made, indices), expected)
    assert_same(ours(case, made, indices, most=60), expected)


@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
@pytest.mark.parametrize("switch", [*SWITCHES, "halve", "keep_features"])
def test_every_switch_may_be_off(switch: str, seed_labels: bool) -> None:
    case = case_with(llama_config(num_key_value_heads=2), seed_labels)
    made = assert_plain(case, StepSpec(**{switch: False}))
    assert made.num_prefix == (0 if switch == "share_prefix" else NUM_BEFORE)


@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
def test_all_may_be_off(lively: Llava, seed_labels: bool) -> None:
    assert_plain(case_of(lively, seed_labels), OFF)
    assert_plain(case_with(llama_config(), seed_labels), OFF)


@pytest.mark.slow
def test_what_is_compiled_is_the_same() -> None:
    case = case_with(llama_config(num_key_value_heads=2))
    for indices in (ALL, [1], [2, 3]):
        assert_plain(case, StepSpec(compile=True), indices)


@pytest.mark.parametrize("most", [1, 12, 25, 40, 1000])
@pytest.mark.parametrize("spec", [StepSpec(), StepSpec(pack=False)], ids=["packed", "padded"])
def test_a_step_is_the_same_in_any_number_of_passes(most: int, spec: StepSpec) -> None:
    case = case_with(llama_config())
    made = assert_plain(case, spec, most=most)
    assert len(made.split(ALL, most)) == (1 if most == 1000 else 5 if most == 1 else len(made.split(ALL, most)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        {"rms_norm_eps": 0.1},
        {"attention_bias": True},
        {"mlp_bias": True},
    ],
    ids=["grouped", "one-key-head", "tied", "linear", "llama3", "yarn", "eps", "attention-bias", "mlp-bias"],
)  # fmt: skip
def test_llamas_of_other_shapes_are_the_same(changes: dict[str, Any]) -> None:
    case = case_with(llama_config(**changes))
    assert (case.model.lm_head.weight is case.model.get_input_embeddings().weight) == ("tie_word_embeddings" in changes)
    assert can_run(case.model.config.text_config)
    assert_plain(case, StepSpec())
    assert_plain(case_with(llama_config(**changes), seed_labels=False), OFF)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4, "original_max_position_embeddings": 16,
            }
        },
    ],
    ids=["gelu", "dynamic", "longrope"],
)  # fmt: skip
def test_a_llama_that_is_not_known_is_run_as_transformers_does(changes: dict[str, Any]) -> None:
    case = case_with(llama_config(**changes))
    expected = plain(case, ALL)
    made = make_step(case.model, case.samples, case.features, torch.float32, StepSpec())
    assert isinstance(made, PlainStep)
    assert_same(ours(case, made, ALL), expected)


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
RELATIVES = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-tied": lambda: Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=8, sliding_window=None),
}


@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
@pytest.mark.parametrize("kind", RELATIVES)
def test_relatives_of_llama_are_the_same(kind: str, seed_labels: bool) -> None:
    case = case_with(RELATIVES[kind](), seed_labels)
    attention = case.model.model.language_model.layers[0].self_attn
    assert (attention.q_proj.bias is not None and bool(attention.q_proj.bias.any())) == kind.startswith("qwen2")
    assert hasattr(attention, "q_norm") == (kind == "qwen3")
    assert can_run(case.model.config.text_config)
    assert_plain(case, StepSpec())
    assert_plain(case_with(RELATIVES[kind](), seed_labels), OFF)


@pytest.mark.parametrize("kind", ["sliding", "gpt2"])
def test_so_is_a_model_that_is_no_llama(kind: str) -> None:
    config: Any = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    if kind == "gpt2":
        config = Gpt2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, bos_token_id=1,
            eos_token_id=1, tie_word_embeddings=False,
        )  # fmt: skip
    case = case_with(config)
    made = make_step(case.model, case.samples, case.features, torch.float32, StepSpec())
    assert isinstance(made, PlainStep)
    expected = plain(case, ALL)
    assert_same(ours(case, made, ALL), expected)
    assert_same(ours(case, made, ALL, most=30), expected)


@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_sample_without_a_picture_may_be_among_others(seed_labels: bool, padded: bool) -> None:
    samples = samples_with_prefix(seed_labels, [0, 1, 2, NO_PICTURE, 1])
    case = case_with(llama_config()).alike(samples=samples)
    expected = plain(case, ALL)
    made: Step = PlainStep(case.model, samples, case.features) if padded else case.packed()
    assert_same(ours(case, made, ALL), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("most", [1, 1000])
def test_a_pass_may_be_of_such_samples_alone(padded: bool, most: int) -> None:
    samples = samples_with_prefix(True, [0, NO_PICTURE, 2, NO_PICTURE, 1])
    case = case_with(llama_config()).alike(samples=samples)
    expected = plain(case, [0, 1, 3])
    made: Step = PlainStep(case.model, samples, case.features) if padded else case.packed()
    assert_same(ours(case, made, [0, 1, 3], most), expected)
    loss, learned = ours(case, made, [1, 3], most)
    assert loss == pytest.approx(plain(case, [1, 3])[0], abs=1e-5)
    assert not any(gradient.any() for gradient in learned.values())


def test_a_held_out_step_shares_the_weights_and_has_a_prefix_of_its_own() -> None:
    case = case_with(llama_config())
    other = samples_of_other_text(case.samples)
    expected = plain(replace(case, samples=other), ALL)
    made = case.packed()
    held_out = make_step(case.model, other, case.features, torch.float32, StepSpec(), like=made)
    assert isinstance(held_out, PackedStep)
    assert held_out.llama is made.llama
    assert held_out.num_prefix == NUM_BEFORE
    assert_same(ours(replace(case, samples=other), held_out, ALL), expected)


def samples_of_other_text(samples: Samples) -> Samples:
    other = torch.where(samples.ids == IMAGE_TOKEN, samples.ids, (samples.ids + 5) % IMAGE_TOKEN)
    return replace(samples, ids=other, labels=other)


def test_samples_of_different_length_were_compared(llava: Llava) -> None:
    samples = samples_of(llava)
    assert len(set(samples.begins.diff().tolist())) == len(samples) == len(ALL)
    labels = [samples.of(k)[1] for k in ALL]
    assert [int(((row[1:] != IGNORE_INDEX) & (row[:-1] == IGNORE_INDEX)).sum()) for row in labels] == [1, 2, 3, 1, 1]


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_frozen_has_no_gradient_and_does_not_change(lively: Llava, padded: bool) -> None:
    case = case_of(lively)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    made: Step = PlainStep(case.model, case.samples, case.features) if padded else case.packed()
    made.loss(ALL).backward()
    for name, parameter in case.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert (parameter.grad is not None) == ("multi_modal_projector" in name), name


def test_folding_holds_no_weight_twice() -> None:
    case = case_with(llama_config())
    made = case.packed()
    for layer, parts in zip(made.llama.layers, case.model.model.language_model.layers, strict=True):
        attn, mlp = parts.self_attn, parts.mlp
        for product, modules in (
            (layer.qkv, (attn.q_proj, attn.k_proj, attn.v_proj)),
            (layer.gate_up, (mlp.gate_proj, mlp.up_proj)),
        ):
            ((whole, _),) = product.groups
            assert torch.equal(whole, torch.cat([module.weight for module in modules]))
            storages = {module.weight.untyped_storage().data_ptr() for module in modules}
            assert storages == {whole.untyped_storage().data_ptr()}


# --------------------------------------------------------------------------------------------- precision


def cosine(one: Gradients, other: Gradients) -> float:
    flat = [torch.cat([gradient[name].flatten().double() for name in one]) for gradient in (one, other)]
    return float(F.cosine_similarity(flat[0], flat[1], dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed_labels", [False, True], ids=["answers", "all"])
def test_frozen_parts_in_half_precision_point_the_same_way(llava: Llava, dtype: torch.dtype, seed_labels: bool) -> None:
    case = case_of(llava, seed_labels)
    loss, exact = plain(case, ALL)
    place(case.model, CPU, dtype)
    found, rounded = ours(case, case.packed(dtype=dtype), ALL)
    assert found == pytest.approx(loss, rel=2e-3)
    assert cosine(rounded, exact) >= 0.999
    assert {gradient.dtype for gradient in rounded.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_of_the_loss_keeps_the_direction_in_half_precision(llava: Llava, dtype: torch.dtype) -> None:
    case = case_of(llava)
    _, exact = plain(case, ALL)
    place(case.model, CPU, dtype)
    made = case.packed(dtype=dtype)
    scale = 1024.0 / case.samples.num_supervised(ALL)
    (made.loss(ALL, scale) * scale).backward()
    scaled = {name: gradient / 1024 for name, gradient in gradients(case.model).items()}
    assert cosine(scaled, exact) >= 0.999
    assert all((scaled[name] - exact[name]).norm() < 0.05 * exact[name].norm() for name in exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fold", [True, False])
def test_weights_that_16_bits_hold_are_stored_in_16_bits_and_give_the_same_bits(
    dtype: torch.dtype, fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "WORTH_HALVING_BYTES", 1)
    case = case_with(llama_config(tie_word_embeddings=True))
    language_model, head = case.model.model.language_model, case.model.lm_head
    for parameter in (*language_model.parameters(), *head.parameters()):
        parameter.data = parameter.data.to(dtype).float()
    spec = StepSpec(fold=fold)
    expected = ours(case, case.alike().packed(spec), ALL)[0]
    halved = case.alike()
    assert halve(halved.model.model.language_model, halved.model.lm_head) == dtype
    assert {p.dtype for p in halved.model.model.language_model.parameters()} == {dtype}
    assert halved.model.lm_head.weight is halved.model.get_input_embeddings().weight
    before = plain(case, ALL)
    loss, found = ours(halved, halved.packed(spec), ALL)
    assert loss == expected
    assert_same((loss, found), before)


def test_weights_that_16_bits_do_not_hold_stay_and_so_do_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_with(llama_config())
    parts = case.model.model.language_model, case.model.lm_head
    small = case.alike().model
    for parameter in small.parameters():
        parameter.data = parameter.data.bfloat16().float()
    assert halve(small.model.language_model, small.lm_head) is None
    monkeypatch.setattr(llama, "WORTH_HALVING_BYTES", 1)
    assert halve(*parts) is None
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


# --------------------------------------------------------------------------------------------- isolation


def losses_by_sample(made: PackedStep, features: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """The sum of each sample's losses in one pack, whose features are given by sample."""
    pack = make_pack(made.samples, indices, made.num_prefix, made.spec)
    made.features = lambda _: features
    attend = attention.attention(lay_out(pack.lengths, made.num_prefix, CPU), torch.float32)
    x = made.embed(pack)
    losses = made.llama.losses(made.llama.hidden(x, pack.positions, attend, made.prefix, pack.rows), pack.targets, 1.0)
    ends = torch.tensor(pack.lengths).cumsum(0)
    owner = torch.bucketize(pack.rows, ends, right=True)
    return [losses[owner == k].sum() for k in range(len(indices))]


@pytest.mark.parametrize("spec", [StepSpec(), StepSpec(share_prefix=False), OFF], ids=["prefix", "whole", "off"])
@pytest.mark.parametrize("wild", [1e3, -1e3])
def test_another_sample_in_the_pack_changes_no_loss(spec: StepSpec, wild: float) -> None:
    case = case_with(llama_config())
    made = case.packed(spec)
    own = case.features([0, 1])
    for order in ([0, 1], [1, 0]):
        at = order.index(0)
        (alone,) = losses_by_sample(made, own[:1], [0])
        together = losses_by_sample(made, own[order], order)[at]
        strange = own.clone()
        strange[1] = wild
        disturbed = losses_by_sample(made, strange[order], order)[at]
        assert together.item() == pytest.approx(alone.item(), rel=1e-6)
        assert disturbed.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("spec", [StepSpec(), StepSpec(share_prefix=False), OFF], ids=["prefix", "whole", "off"])
@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_nor_does_one_whose_picture_is_no_numbers(spec: StepSpec, wild: float) -> None:
    # A later one: the first of a pack fills the grid's padding. Such a step is skipped as a whole in any case.
    case = case_with(llama_config())
    made = case.packed(spec)
    features = case.features([0, 1])
    (alone,) = losses_by_sample(made, features[:1], [0])
    features[1] = wild
    own, other = losses_by_sample(made, features.requires_grad_(), [0, 1])
    assert other.isnan()
    assert own.item() == pytest.approx(alone.item(), rel=1e-6)


@pytest.mark.parametrize("spec", [StepSpec(), StepSpec(share_prefix=False), OFF], ids=["prefix", "whole", "off"])
def test_the_gradient_of_a_sample_knows_of_no_other(spec: StepSpec) -> None:
    case = case_with(llama_config())
    made = case.packed(spec)
    features = case.features([0, 1, 2]).requires_grad_()
    first, second, third = losses_by_sample(made, features, [0, 1, 2])
    (of_second,) = torch.autograd.grad(second, features, retain_graph=True)
    assert of_second[1].norm() > 0
    assert not of_second[[0, 2]].any()
    (of_all,) = torch.autograd.grad(first + second + third, features)
    torch.testing.assert_close(of_all[1], of_second[1], rtol=1e-5, atol=1e-7)


def test_other_text_in_the_pack_changes_no_gradient() -> None:
    case = case_with(llama_config())

    def of_first(samples: Samples) -> Tensor:
        made = replace(case, samples=samples).packed(StepSpec(share_prefix=False))
        features = case.features([0, 1]).requires_grad_()
        made.features = lambda _: features
        (found,) = torch.autograd.grad(made.loss([0, 1]), features)
        return found

    other = samples_of_other_text(case.samples)
    end = int(case.samples.begins[1])
    mixed = replace(
        other,
        ids=torch.cat([case.samples.ids[:end], other.ids[end:]]),
        labels=torch.cat([case.samples.labels[:end], other.labels[end:]]),
    )
    one, another = of_first(case.samples), of_first(mixed)
    torch.testing.assert_close(one[0], another[0], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(one[1], another[1], rtol=1e-2)


# --------------------------------------------------------------------------------------------- attention


def varlen_as_documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``torch.nn.attention.varlen.varlen_attn``: sequences by their ends, causal to the bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size == (-1, 0)
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)
    repeats = query.shape[1] // key.shape[1]
    out = []
    for number in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[number] : cu_seq_q[number + 1]].transpose(0, 1)
        k, v = (
            x[cu_seq_k[number] : cu_seq_k[number + 1]].transpose(0, 1).repeat_interleave(repeats, 0)
            for x in (key, value)
        )
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        row, column = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        seen = column <= row + k.shape[1] - q.shape[1]
        out.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_as_documented)


def attended(make: Callable[[Layout], Attend], layout: Layout, tensors: Sequence[Tensor], prefix: bool) -> list[Tensor]:
    """What attention gives, and the gradients to q, k and v of a sum of its squares."""
    q, k, v = (tensor.clone().requires_grad_() for tensor in tensors[:3])
    out = make(layout)(q, k, v, (tensors[3], tensors[4]) if prefix else None)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


@pytest.mark.usefixtures("varlen")
def test_all_kinds_of_attention_are_one() -> None:
    @settings(max_examples=40, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        num_prefix=st.integers(0, 5),
        heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
    )
    def hold(lengths: list[int], num_prefix: int, heads: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        total, (num, shared) = sum(lengths), heads
        shapes = [(total, num), (total, shared), (total, shared), (num_prefix, shared), (num_prefix, shared)]
        tensors = [torch.randn(*shape, 4, generator=generator) for shape in shapes]
        layout = lay_out(tuple(lengths), num_prefix, CPU)
        grid = attended(over_grid, layout, tensors, num_prefix > 0)
        for make in (over_sequence, one_by_one):
            for one, other in zip(grid, attended(make, layout, tensors, num_prefix > 0), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    hold()


@settings(max_examples=40, deadline=None)
@given(
    about=st.lists(
        st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    num_prefix=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
)
def test_what_samples_share_is_asked_once_with_the_same_result(
    about: list[list[tuple[int, int]]], num_prefix: int, heads: tuple[int, int]
) -> None:
    lengths: list[int] = []
    shared: list[tuple[int, int]] = []
    for samples in about:  # of one picture: each has some tokens of its own, and some of the first one's
        first = sum(lengths)
        for number, (own, count) in enumerate(samples):
            shared.append((first, min(count, lengths[len(lengths) - number]) if number else 0))
            lengths.append(own)
    assume(any(count for _, count in shared))
    generator = torch.Generator().manual_seed(sum(lengths))
    total, (num, kept) = sum(lengths), heads
    shapes = [(total, num), (total, kept), (total, kept), (num_prefix, kept), (num_prefix, kept)]
    tensors = [torch.randn(*shape, 4, generator=generator) for shape in shapes]
    layout = lay_out(tuple(lengths), num_prefix, CPU, tuple(shared))
    segments = attended(over_segments, layout, tensors, num_prefix > 0)
    for one, other in zip(attended(over_grid, layout, tensors, num_prefix > 0), segments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("make", [over_sequence, one_by_one, over_grid])
@pytest.mark.parametrize("spec", [StepSpec(), OFF], ids=["prefix", "off"])
def test_a_step_by_any_of_them_is_the_plain_forward(
    make: Callable[[Layout], Attend], spec: StepSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (step, llama):
        monkeypatch.setattr(module, "attention", lambda layout, _: make(layout))
    assert_plain(case_with(llama_config(num_key_value_heads=2)), spec)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_sequences_of_any_length_are_for_cards_that_have_them(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    has_varlen.cache_clear()
    found = has_varlen(torch.device("cuda"))
    has_varlen.cache_clear()
    assert found == (expected and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12))
    assert not has_varlen(CPU)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, "over_segments"), (torch.bfloat16, "over_grid"), (torch.float16, "over_grid")],
)
def test_samples_that_share_are_attended_to_by_segments_on_a_cpu(
    dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one_by_one", "over_grid", "over_segments", "over_sequence"):
        monkeypatch.setattr(attention, name, lambda _, name=name: name)
    assert attention.attention(lay_out((30, 4), 0, CPU, ((0, 0), (0, 20))), dtype) == expected
    long = lay_out((600, 90, 4), 0, CPU, ((0, 0), (0, 576), (0, 576)))  # 259 weights a row and a head
    assert attention.attention(long, dtype) == "over_grid"


@pytest.mark.parametrize(
    ("lengths", "varlen", "dtype", "expected"),
    [
        ((300, 20, 20), False, torch.float32, "one_by_one"),
        ((300, 290, 280), False, torch.float32, "over_grid"),
        ((30, 2, 2), False, torch.float32, "over_grid"),
        ((300, 20, 20), True, torch.float32, "one_by_one"),
        ((300, 20, 20), True, torch.bfloat16, "over_sequence"),
        ((30, 30), True, torch.float16, "over_sequence"),
    ],
)
def test_the_kind_of_attention_is_chosen(
    lengths: tuple[int, ...], varlen: bool, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_varlen", lambda _: varlen)
    for name in ("one_by_one", "over_grid", "over_sequence"):
        monkeypatch.setattr(attention, name, lambda _, name=name: name)
    assert attention.attention(lay_out(lengths, 0, CPU), dtype) == expected


# --------------------------------------------------------------------------------------- one picture, many samples


def about_one_picture(case: Case, changed: int | None = None, begin: int = NUM_BEFORE) -> Case:
    """The same texts, all about picture 1; one of them, if told, differs from its neighbours from ``begin`` on."""
    samples = samples_with_prefix(images=[1] * 5)
    if changed is not None:
        samples.ids[int(samples.begins[changed]) + begin] = 58
    return replace(case, samples=samples)


def computed(case: Case, spec: StepSpec) -> int:
    made = case.packed(spec)
    return len(make_pack(case.samples, ALL, made.num_prefix, spec, made.shares).input_ids)


@pytest.mark.parametrize("spec", [StepSpec(), StepSpec(share_prefix=False), StepSpec(select=False)])
@pytest.mark.parametrize("indices", [ALL, [2, 2], [3, 0, 3]])
@pytest.mark.parametrize("most", [1 << 14, 30, 1])
def test_a_picture_that_is_shared_changes_neither_loss_nor_gradient(
    spec: StepSpec, indices: list[int], most: int
) -> None:
    case = about_one_picture(case_with(llama_config(num_key_value_heads=2)))
    assert_plain(case, spec, indices, most)


def test_a_picture_is_computed_once_for_samples_side_by_side() -> None:
    case = about_one_picture(case_with(llama_config()))
    apart = replace(case, samples=samples_with_prefix())
    assert computed(apart, StepSpec()) - computed(case, StepSpec()) == 4 * PLACES
    assert computed(case, StepSpec(share_picture=False)) == computed(apart, StepSpec())
    without = StepSpec(share_prefix=False)
    assert computed(apart, without) - computed(case, without) == 4 * (PLACES + NUM_BEFORE)


def test_the_picture_of_another_run_is_computed_for_itself() -> None:
    case = case_with(llama_config())
    mixed = replace(case, samples=samples_with_prefix(images=[0, 0, 2, 2, 0]))
    assert_plain(mixed, StepSpec())
    assert make_pack(mixed.samples, ALL, 0, StepSpec(), IMAGE_TOKEN).images == [0, 2, 0]


def test_a_sample_that_differs_before_its_picture_shares_nothing() -> None:
    case = about_one_picture(case_with(llama_config()), changed=2, begin=3)
    assert_plain(case, StepSpec())
    # The second still shares with the first; the third is a first itself, and the fourth differs from that.
    assert [count for _, count in make_pack(case.samples, ALL, 0, StepSpec(), IMAGE_TOKEN).shared] == [0, 10, 0, 0, 10]


def test_a_shared_picture_counts_once_as_useful_work() -> None:
    case = case_with(llama_config())
    apart, together = case.samples, about_one_picture(case).samples
    first, pair = ([useful_flops(case.model, samples, part) for samples in (apart, together)] for part in ([0], [0, 1]))
    assert first[0] == first[1]
    num_body = sum(p.numel() for layer in case.model.model.language_model.layers for p in layer.parameters())
    saved = pair[0] - pair[1]
    assert saved > 4 * num_body * PLACES  # and the tower, the projector and some attention
    assert pair[1] > first[1]


def test_the_gradient_to_a_shared_picture_is_that_of_all_its_samples() -> None:
    found = []
    for share in (True, False):
        case = about_one_picture(case_with(llama_config()))
        made = case.packed(StepSpec(share_picture=share))
        features = case.features([1]).requires_grad_()
        made.features = lambda images, one=features: one.expand(len(images), -1, -1)
        found.append(torch.autograd.grad(made.loss(ALL), features)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------- the tower


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_features_of_the_tower_are_what_the_plain_forward_projects(llava: Llava, layer: int, strategy: str) -> None:
    model, pixels = llava.model, pictures(llava)
    model.config.vision_feature_layer, model.config.vision_feature_select_strategy = layer, strategy
    expected = model.model.get_image_features(
        pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy
    ).pooler_output
    ran: list[int] = []
    blocks = model.model.vision_tower.encoder.layers
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    features = tower_features(model, pixels)
    assert features.shape == (len(pixels), llava.processor.num_image_tokens + (strategy == "full"), 32)
    assert torch.equal(model.model.multi_modal_projector(features), torch.stack(tuple(expected)))
    assert ran == list(range(len(blocks)))[: len(blocks) + 1 + layer]
    assert model.model.vision_tower.encoder.layers is blocks
    assert not features.requires_grad


def test_the_plain_forward_works_after_features_were_computed() -> None:
    case, other = case_with(llama_config()), case_with(llama_config())
    case.features([0, 1, 2])
    assert plain(case, ALL)[0] == plain(other, ALL)[0]


# --------------------------------------------------------------------------------------------- padded batches


def test_features_stand_at_the_image_tokens_in_reading_order(llava: Llava) -> None:
    case = case_of(llava)
    rows = [case.samples.of(k) for k in ALL]
    features = case.features(case.samples.images_of(ALL))
    batch = collate([ids for ids, _ in rows], [labels for _, labels in rows], features, 0)
    found = embed(case.model, batch.input_ids, features)
    at_image = batch.input_ids == llava.processor.image_token_id
    words = case.model.get_input_embeddings()(batch.input_ids)
    projected = case.model.model.multi_modal_projector(features)
    assert torch.equal(found[~at_image], words[~at_image])
    for row in range(len(ALL)):
        assert torch.equal(found[row][at_image[row]], projected[row])


def test_so_they_do_in_a_pack(llava: Llava) -> None:
    case = case_of(llava)
    made = case.packed()
    pack = make_pack(case.samples, ALL, 0, StepSpec())
    found = made.embed(pack)
    at_image = pack.input_ids == llava.processor.image_token_id
    projected = case.model.model.multi_modal_projector(case.features(case.samples.images_of(ALL)))
    assert torch.equal(found[~at_image], case.model.get_input_embeddings()(pack.input_ids)[~at_image])
    assert torch.equal(found[at_image], projected.flatten(0, 1))


@pytest.mark.parametrize("padded", [False, True])
def test_the_sum_is_the_sum_of_every_sample_alone(lively: Llava, padded: bool) -> None:
    case = case_of(lively)
    made: Step = PlainStep(case.model, case.samples, case.features) if padded else case.packed()
    alone = [made.loss([k]).item() for k in ALL]
    assert made.loss(ALL).item() == pytest.approx(sum(alone), rel=1e-5)
    assert made.loss([3, 3]).item() == pytest.approx(2 * alone[3], rel=1e-5)
    rows = [case.samples.of(k) for k in ALL]
    batch = collate([ids for ids, _ in rows], [labels for _, labels in rows], case.features(IMAGES), 0)
    assert loss_sum(case.model, batch, per_sample=True).tolist() == pytest.approx(alone, rel=1e-5)


def test_a_row_without_a_label_has_no_loss(llava: Llava) -> None:
    case = case_of(llava)
    rows = [case.samples.of(k) for k in ALL]
    labels = [labels if k != 1 else torch.full_like(labels, IGNORE_INDEX) for k, (_, labels) in enumerate(rows)]
    batch = collate([ids for ids, _ in rows], labels, case.features(IMAGES), 0)
    per_sample = loss_sum(case.model, batch, per_sample=True)
    assert [bool(loss) for loss in per_sample] == [True, False, True, True, True]


def test_a_batch_is_padded_on_the_right(llava: Llava) -> None:
    (short, short_labels), (long, long_labels) = (samples_of(llava).of(k) for k in (0, 2))
    features = torch.rand(2, 4, 32)
    batch = collate([short, long], [short_labels, long_labels], features, 3)
    rest = len(long) - len(short)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2, len(long))
    assert batch.input_ids[0].tolist() == short.tolist() + [3] * rest
    assert batch.labels[0].tolist() == short_labels.tolist() + [IGNORE_INDEX] * rest
    assert batch.attention_mask.sum(1).tolist() == [len(short), len(long)]
    assert batch.features is features


@pytest.mark.parametrize("pad", [3, 0, 2])  # 2 ends every answer: the mask comes from lengths, not from the id
def test_padding_changes_nothing(lively: Llava, pad: int) -> None:
    case = case_of(lively)
    expected = plain(case, ALL)
    case.model.config.pad_token_id = pad
    assert_same(ours(case, PlainStep(case.model, case.samples, case.features), ALL), expected)


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    labels = torch.tensor([[5, IGNORE_INDEX, 7], [5, 6, 7]])
    assert Batch(labels, labels, torch.ones(2, 3), torch.ones(2, 1, 1)).num_labels == 3
    assert collect(list(labels), list(labels), [0, 0]).num_supervised([0, 1]) == 3


def test_the_mean_is_over_tokens_not_over_samples(lively: Llava) -> None:
    case = case_of(lively)
    made = case.packed()
    mean = ours(case, made, ALL)[0]
    singles = [ours(case, made, [k])[0] for k in ALL]
    assert abs(mean - sum(singles) / len(singles)) > 1e-3


# --------------------------------------------------------------------------------------------- frozen operations


def same_gradient(
    found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    """Two functions of float32 have one value and one gradient, by torch's own autograd of the plain expression."""
    values, slopes = [], []
    for function in (found, expected):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        weight = torch.linspace(-1, 1, value.numel()).view_as(value)
        values.append(value)
        slopes.append(torch.autograd.grad((value * weight).sum(), leaves))
    torch.testing.assert_close(values[0], values[1], rtol=tolerance, atol=tolerance)
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=10 * tolerance)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_norm_is_the_plain_expression() -> None:
    weight = random(7, seed=1)

    def expected(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    same_gradient(lambda x: frozen.rms_norm(x, weight, 1e-5, torch.float32), expected, [random(5, 7)])
    assert frozen.rms_norm(random(5, 7), weight, 1e-5, torch.bfloat16).dtype == torch.bfloat16
    zeros = torch.zeros(2, 7, requires_grad=True)
    frozen.rms_norm(zeros, weight, 1e-5, torch.float32).sum().backward()
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=40))
def test_the_gate_is_the_plain_expression_for_any_numbers(values: list[float]) -> None:
    half = len(values) // 2
    gate, up = torch.tensor(values[:half])[:, None], torch.tensor(values[half : 2 * half])[:, None]
    leaves = [(gate.clone().requires_grad_(), up.clone().requires_grad_()) for _ in range(2)]
    found, expected = frozen.swiglu(*leaves[0]), F.silu(leaves[1][0]) * leaves[1][1]
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(found, expected)
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_turning_is_the_plain_expression_and_is_turned_back() -> None:
    angles = random(5, 1, 3, seed=1)
    cos, sin = angles.cos() * 1.3, angles.sin() * 1.3  # yarn scales them

    def expected(x: Tensor) -> Tensor:
        a, b = x[..., :3], x[..., 3:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    same_gradient(lambda x: frozen.rotate(x, cos, sin), expected, [random(5, 2, 6)])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_product_with_a_frozen_weight_is_the_plain_one(stored: torch.dtype) -> None:
    weight = random(4, 6).to(stored)
    same_gradient(lambda x: frozen.linear(x, weight), lambda x: F.linear(x, weight.float()), [random(5, 6)])
    assert frozen.linear(random(5, 6).half(), weight).dtype == torch.float16


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_spread_puts_every_row_in_its_cell_and_gathers_its_gradient(lengths: list[int]) -> None:
    layout = lay_out(tuple(lengths), 0, CPU)
    x = random(sum(lengths), 3).requires_grad_()
    out = frozen.spread(x, layout.grid, layout.back, layout.again)
    assert out.shape == (len(lengths), max(lengths), 3)
    for row, part in enumerate(x.split(lengths)):
        assert torch.equal(out[row, : len(part)], part)
    weight = random(*out.shape, seed=2)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(gradient, torch.cat([weight[row, :length] for row, length in enumerate(lengths)]))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("scale", [1.0, 0.25, 4096.0])
def test_token_losses_are_the_plain_cross_entropies_in_chunks_of_any_number(
    rows: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "CHUNK_ROWS", 16)
    weight = random(11, 6, seed=1)
    targets = torch.randint(11, (rows,), generator=torch.Generator().manual_seed(2))

    def expected(x: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T, targets, reduction="none") * scale

    def found(x: Tensor) -> Tensor:
        return frozen.token_losses(x, weight, targets, scale) * scale

    hidden = random(rows, 6)
    for reduce in (lambda losses: losses, torch.Tensor.sum):
        same_gradient(
            lambda x, reduce=reduce: reduce(found(x)) / scale,
            lambda x, reduce=reduce: reduce(expected(x)) / scale,
            [hidden],
        )


def test_real_chunks_join() -> None:
    rows = 2 * frozen.CHUNK_ROWS + 3
    weight, targets = random(11, 6, seed=1), torch.arange(rows) % 11
    same_gradient(
        lambda x: frozen.token_losses(x, weight, targets),
        lambda x: F.cross_entropy(x @ weight.T, targets, reduction="none"),
        [random(rows, 6)],
    )


def test_the_scale_keeps_small_gradients_alive_in_half_precision() -> None:
    weight, targets = random(11, 6).half(), torch.arange(5)

    def slope(scale: float) -> Tensor:
        hidden = random(5, 6).half().requires_grad_()
        (frozen.token_losses(hidden, weight, targets, scale).sum() * scale).backward()
        assert hidden.grad is not None
        return hidden.grad.float() / scale

    exact = random(5, 6).half().float().requires_grad_()
    F.cross_entropy(exact @ weight.float().T, targets, reduction="sum").backward()
    assert exact.grad is not None
    assert (slope(1024.0) - exact.grad).norm() < 5e-3 * exact.grad.norm()
    assert (slope(1e-8) - exact.grad).norm() > 0.5 * exact.grad.norm()


def test_losses_without_a_gradient_are_the_same() -> None:
    weight, targets, hidden = random(11, 6), torch.arange(5), random(5, 6)
    learned = frozen.token_losses(hidden.clone().requires_grad_(), weight, targets)
    assert torch.equal(frozen.token_losses(hidden, weight, targets), learned)


def test_keys_and_values_of_a_prefix_are_those_of_every_sample() -> None:
    case = case_with(llama_config(num_key_value_heads=2))
    made = case.packed()
    assert made.prefix is not None
    out = case.model.model.language_model(case.samples.ids[None, :NUM_BEFORE], use_cache=True)
    for number, (keys, values) in enumerate(made.prefix.layers):
        cached = out.past_key_values.layers[number]
        torch.testing.assert_close(keys.transpose(0, 1), cached.keys[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values.transpose(0, 1), cached.values[0], rtol=1e-4, atol=1e-5)
    expected = case.model.lm_head(out.last_hidden_state[0]).log_softmax(-1)
    torch.testing.assert_close(made.prefix.log_probs, expected, rtol=1e-4, atol=1e-5)
    assert not made.prefix.log_probs.requires_grad


def test_hidden_states_are_those_of_transformers() -> None:
    case = case_with(llama_config())
    made = FrozenLlama(case.model.model.language_model, case.model.lm_head.weight, torch.float32, StepSpec())
    ids = torch.arange(1, 15)
    attend = over_grid(lay_out((14,), 0, CPU))
    found = made.hidden(made.embed(ids), torch.arange(14), attend, None, torch.arange(14))
    expected = case.model.model.language_model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
