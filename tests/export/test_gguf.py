"""llama.cpp, for real, on two GGUF files: the same token ids, the same first token, the same log-probabilities."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llava_pipeline.errors import ExportRefused
from llava_pipeline.export.card import Facts
from llava_pipeline.export.gguf_text import interleave
from llava_pipeline.export.verify import PART, Question, expect
from llava_pipeline.model.assemble import Llava
from llava_pipeline.spec import ModelSpec
from llava_pipeline.stages.export import export, refuse_unverified
from tests.backbones.families import FULL, LANGUAGE_MODELS, TOWER, TOWERS, joined
from tests.export.conftest import ask

WIDE = TOWER | {"intermediate_size": 64}


@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
def test_llama_cpp_answers_as_the_model_here(
    pocket: Llava, facts: Facts, questions: list[Question], tmp_path: Path, quantize: str
) -> None:
    done = export(pocket, facts, "gguf", tmp_path / "out", quantize, questions)  # type: ignore[arg-type]
    assert (done.problem, done.verified) == ("", True)
    judged, told = done.checks
    assert (judged.pictures, judged.judged, told.judged) == ("at the tower's size", True, False)
    assert judged.num_same_ids == judged.num_same_first == told.num_same_ids == len(questions)
    assert judged.largest_top < (0.05 if quantize == "f16" else 0.5)
    assert {f"llava-pocket-{quantize}.gguf", "mmproj-llava-pocket-f16.gguf", "LICENSES.md"} <= set(done.files)


PAIRS = {
    "clip+qwen3": (lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE)), "qwen3", ModelSpec()),
    "clip-last-layer+mistral": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE, hidden_act="gelu")), "mistral",
        ModelSpec(vision_feature_layer=-1),
    ),
    "siglip+llama-3.1": (lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)), "llama-3.1", FULL),
    "siglip+qwen2": (lambda: SiglipVisionModel(SiglipVisionConfig(**TOWER)), "qwen2", FULL),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_other_families_answer_in_llama_cpp_too(pair: str, facts: Facts, tmp_path: Path) -> None:
    tower, language_model, spec = PAIRS[pair]
    llava = joined(tower, LANGUAGE_MODELS[language_model], spec, tmp_path)
    done = export(llava, facts, "gguf", tmp_path / "out", "f16", clearly_answered(llava, ask(18)))
    assert done.problem == ""
    assert done.verified
    assert done.checks[0].num_prompts > 2


def clearly_answered(llava: Llava, questions: list[Question]) -> list[Question]:
    """Those whose likeliest tokens are not as likely as each other and whole letters, which random weights seldom
    give; llama.cpp tells nothing of an answer that begins with a part of a letter."""
    return [
        question
        for question, ours in zip(questions, expect(llava, questions), strict=True)
        if ours.logprobs.topk(2).values.diff().abs() > 0.05 and PART not in llava.processor.words([ours.tokens[0]])
    ]


def test_an_engine_that_answers_otherwise_is_found_out_and_the_files_are_put_aside(
    pocket: Llava, facts: Facts, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_pipeline.export.gguf_text.interleave", lambda weight, heads: weight)
    done = export(pocket, facts, "gguf", tmp_path / "out", "f16", questions)
    assert not done.verified
    assert done.folder == str(tmp_path / "out.unverified")
    assert not (tmp_path / "out").exists()
    assert "asked " in done.problem
    with pytest.raises(Exception, match=r"differs from the model here .*out\.unverified"):
        refuse_unverified(done)


@pytest.mark.parametrize(
    ("tower", "changes", "reason"),
    [
        ("dinov2", {}, "the vision tower is a dinov2; of LLaVA's towers llama.cpp reads CLIP and SigLIP; use --to hf"),
        ("clip-full", {}, "the class token is projected too"),
        ("siglip", {"pixel_shuffle": 2}, r"joined to one token \(model.pixel_shuffle=2\)"),
    ],
)
def test_what_llama_cpp_cannot_represent_is_refused_before_anything_is_written(
    tower: str, changes: dict[str, int], reason: str, facts: Facts, tmp_path: Path
) -> None:
    make, spec, _ = TOWERS[tower]
    llava = joined(make, LANGUAGE_MODELS["llama"], spec.model_copy(update=changes), tmp_path)
    with pytest.raises(ExportRefused, match=reason):
        export(llava, facts, "gguf", tmp_path / "out", "f16", [])
    assert not list(tmp_path.glob("*out*"))


def test_a_vocabulary_that_llama_cpp_splits_otherwise_is_refused(pocket: Llava, facts: Facts, tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Punctuation, Sequence

    processor = copy.deepcopy(pocket.processor)
    processor.tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Punctuation(), ByteLevel(add_prefix_space=False)])
    with pytest.raises(ExportRefused, match=r"splits text by Punctuation \+ ByteLevel"):
        export(replace(pocket, processor=processor), facts, "gguf", tmp_path / "out", "f16", [])


def test_both_files_say_what_they_are_and_under_which_licence(pocket: Llava, facts: Facts, tmp_path: Path) -> None:
    export(pocket, facts, "gguf", tmp_path / "out", "f16", [])
    for path in (tmp_path / "out").glob("*.gguf"):
        fields = gguf.GGUFReader(path).fields
        assert fields["general.license"].contents() == "Apache-2.0"
        assert fields["general.name"].contents() == "llava-pocket"


def test_rows_of_a_head_are_interleaved() -> None:
    rows = torch.arange(8)[:, None]
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
