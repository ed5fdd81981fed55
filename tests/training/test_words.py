"""A projector that begins with words: patches read as what their pictures are told with, the same at every start."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.contracts import Backbones
from llava_pipeline.data import scenes
from llava_pipeline.model.assemble import Llava, assemble
from llava_pipeline.model.projector import digest_of, state_of
from llava_pipeline.spec import load_spec
from llava_pipeline.training.features import Computed
from llava_pipeline.training.samples import NO_PICTURE, collect
from llava_pipeline.training.words import as_words, fit, learn_to_read, some_patches, start_with_words
from tests.tiny import samples_of
from tests.training.job import Make, history, nursery, outcome, train, train_together

CPU = torch.device("cpu")


def pictures_with_words(num: int, patches: int, words: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N, P, D) noisy features and (N, P, V) which words lie under each patch; three patches have two words each."""
    under = torch.zeros(num, patches, words, dtype=torch.bool)
    for picture in under:
        for patch in torch.randperm(patches, generator=generator)[:3]:
            picture[patch, torch.randperm(words, generator=generator)[:2]] = True
    mixing = torch.randn(words, 24, generator=generator)
    return under.float() @ mixing + 0.3 * torch.randn(num, patches, 24, generator=generator), under


def test_words_are_found_under_their_patches_though_only_pictures_are_told_with_them() -> None:
    seen, under = pictures_with_words(400, 9, 12, torch.Generator().manual_seed(3))
    told = under.any(1)
    read = learn_to_read(seen[:300], told[:300])
    surely, truth = read(seen[300:].flatten(0, 1)), under[300:].flatten(0, 1)
    assert surely[truth].mean() > 0.6
    assert surely[~truth].mean() < 0.05
    blank = learn_to_read(seen[:300], told[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    shuffled = blank(seen[300:].flatten(0, 1))
    assert shuffled[truth].mean() < 0.2


def test_a_patch_becomes_the_average_word_and_more_of_what_it_has() -> None:
    words = torch.eye(3) * 2
    shares = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.9, 0.1]])
    first, second = as_words(shares, words, torch.tensor([1.0, 1.0, 2.0]))
    assert first[0] > first[1]
    assert second[1] > second[0]
    assert first[2] == second[2]  # both have it alike
    assert torch.stack([first, second]).norm(dim=-1).mean() == pytest.approx(2.0)


def test_the_second_layer_is_the_best_there_is_for_its_targets(llava: Llava) -> None:
    projector = llava.model.model.multi_modal_projector
    generator = torch.Generator().manual_seed(5)
    seen = torch.randn(500, projector.linear_1.in_features, generator=generator)
    wanted = torch.randn(16, projector.linear_2.in_features, generator=generator).T
    targets = projector.act(projector.linear_1(seen)).detach() @ wanted @ torch.randn(16, 32, generator=generator) + 3
    assert fit(projector, seen, targets) > 0.999
    torch.testing.assert_close(projector(seen).detach(), targets, atol=0.3, rtol=0.05)


def scenes_of_pocket(num: int) -> tuple[Llava, list[scenes.Scene], Computed, list[list[int]]]:
    """The pocket model, scenes, their features, and their captions in ids."""
    parts = load_spec("pocket").backbones
    llava = assemble(
        Backbones(vision_tower=fetch(parts.vision_tower, None, 0), language_model=fetch(parts.language_model, None, 0)),
        load_spec("pocket").model,
    )
    drawn = [scenes.scene_at(3, "train", k)[0] for k in range(num)]
    pixels = torch.from_numpy(np.stack([llava.processor.resize(scenes.draw(scene)) for scene in drawn]))
    captions = [llava.processor.tokenizer(f" {scene.caption}", add_special_tokens=False).input_ids for scene in drawn]
    return llava, drawn, Computed(llava.model, pixels, llava.processor.normalise, CPU), captions


def test_from_captions_alone_real_patches_come_to_lie_near_the_words_of_what_is_under_them() -> None:
    llava, drawn, features, captions = scenes_of_pocket(700)
    rows = [torch.tensor([0, *caption]) for caption in captions]
    samples = collect(rows[:600], rows[:600], list(range(600)))
    start_with_words(llava.model, samples, features, set(llava.processor.tokenizer.all_special_ids))
    features.load(range(600, 700), [])
    with torch.no_grad():
        patches = llava.model.model.multi_modal_projector(features(list(range(600, 700))).float())
    words = llava.model.get_input_embeddings().weight.detach().float()
    length = words[sorted({token for caption in captions for token in caption})].norm(dim=-1).mean()
    assert patches.norm(dim=-1).mean() == pytest.approx(float(length), rel=0.2)
    right, asked = dict.fromkeys(("color", "shape"), 0), 0
    for picture, scene in zip(patches - patches.mean((0, 1)), drawn[600:], strict=True):
        for shape in scene.shapes:
            patch = picture[int(shape.y * 4) * 4 + int(shape.x * 4)]
            for attribute, values in (("color", tuple(scenes.COLORS)), ("shape", scenes.SHAPES)):
                ids = [llava.processor.tokenizer(f" {value}", add_special_tokens=False).input_ids for value in values]
                embedded = torch.stack([words[token].sum(0) for token in ids])
                embedded = embedded - embedded.mean(0)
                nearest = torch.cosine_similarity(patch[None], embedded).argmax()
                right[attribute] += values[int(nearest)] == getattr(shape, attribute)
            asked += 1
    assert right["color"] / asked > 0.8
    assert right["shape"] / asked > 0.8


class Noise:
    """Features of pictures that show nothing."""

    def __init__(self, llava: Llava) -> None:
        width = llava.model.model.multi_modal_projector.linear_1.in_features
        self.features = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(1))

    def load(self, images: Sequence[int], following: Sequence[int]) -> None:
        """They are there."""

    def __call__(self, images: list[int]) -> Tensor:
        return self.features[images]


def test_where_nothing_is_told_of_pictures_the_first_weights_stay_and_that_is_said(
    llava: Llava, caplog: pytest.LogCaptureFixture
) -> None:
    before = digest_of(state_of(llava.model))
    samples = samples_of(llava)
    features = Noise(llava)
    no_pictures = replace(samples, image=torch.full_like(samples.image, NO_PICTURE))
    with caplog.at_level(logging.WARNING):
        start_with_words(llava.model, no_pictures, features, set())
        start_with_words(llava.model, samples, features, set(range(1 << 16)))
    assert len([line for line in caplog.messages if "keeps its first weights" in line]) == 2
    assert digest_of(state_of(llava.model)) == before


def test_a_training_begins_with_words_and_goes_on_exactly_after_it_was_stopped(make: Make, tmp_path: Path) -> None:
    job = make(projector_start="words")
    whole = train(job, tmp_path / "whole")
    assert any("the projector begins with" in note for note in whole.notes("info"))
    stopped = nursery().start(job, tmp_path / "again")
    stopped.until(3)
    stopped.kill()
    again = train(job, tmp_path / "again")
    assert not any("the projector begins with" in note for note in again.notes("info"))
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")
    train(make(), tmp_path / "random")
    assert outcome(tmp_path / "random")["projector"] != outcome(tmp_path / "whole")["projector"]


def test_a_projector_that_does_not_learn_has_its_words_after_a_kill_too(make: Make, tmp_path: Path) -> None:
    parts = {"projector": {"mode": "frozen"}, "language_model": {"mode": "lora"}}
    job = make(projector_start="words", **parts)
    train(job, tmp_path / "whole")
    stopped = nursery().start(job, tmp_path / "again")
    stopped.until(3)
    stopped.kill()
    train(job, tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(tmp_path / "whole")


def test_all_processes_begin_with_the_first_one_s_words(make: Make, tmp_path: Path) -> None:
    job = make(projector_start="words", max_steps=3)
    ranks = train_together(job, tmp_path / "together", faults=[("reads_otherwise",)])
    assert any("the projector begins with" in note for note in ranks[0].notes("info"))
    train(job, tmp_path / "alone")
    together, alone = ([row["loss"] for row in history(tmp_path / name)] for name in ("together", "alone"))
    assert together == pytest.approx(alone, rel=1e-4)


def test_words_are_found_in_a_language_model_that_is_split_over_processes(make: Make, tmp_path: Path) -> None:
    job = make(projector_start="words", max_steps=2, language_model={"mode": "full"})
    train_together(job, tmp_path / "together")
    train(job, tmp_path / "alone")
    together, alone = ([row["loss"] for row in history(tmp_path / name)] for name in ("together", "alone"))
    assert together == pytest.approx(alone, rel=1e-4)


def test_every_place_in_a_picture_is_fitted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava_pipeline.training.words.FITTED_PATCHES", 1024)
    places = torch.arange(16.0).expand(512, 16)[..., None]
    drawn = some_patches(places).flatten().long().bincount(minlength=16)
    assert drawn.sum() == 1024
    assert drawn.min() > 32  # 64 on average


def test_a_picture_with_features_that_are_no_number_spoils_nothing(llava: Llava) -> None:
    features = Noise(llava)
    features.features[1, 2, 0] = torch.nan
    start_with_words(llava.model, samples_of(llava), features, set())
    assert all(value.isfinite().all() for value in state_of(llava.model).values())
    before = digest_of(state_of(llava.model))
    features.features[:] = torch.nan
    start_with_words(llava.model, samples_of(llava), features, set())
    assert digest_of(state_of(llava.model)) == before
