"""The aliases are followed beside what answers; a version that is not what it should be changes nothing."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import LlavaForConditionalGeneration

from llava_pipeline import store
from llava_pipeline.contracts import AssembledModel
from llava_pipeline.errors import DamagedArtifact, LlavaPipelineError, NoSuchRun, TrackingUnavailable
from llava_pipeline.evaluation.read import stop_ids
from llava_pipeline.model import adapter, projector
from llava_pipeline.model.assemble import Llava
from llava_pipeline.model.freeze import LANGUAGE_MODEL, full, let_learn
from llava_pipeline.serving import versions as serving_versions
from llava_pipeline.serving.conversation import prompt_of, question
from llava_pipeline.serving.engine import Ask, Engine, Failed, Piece
from llava_pipeline.serving.pictures import Picture
from llava_pipeline.serving.sampling import Sampling
from llava_pipeline.serving.versions import Follower, Version, Versions
from llava_pipeline.spec import LoraSpec, PartSpec, TrainingSpec
from llava_pipeline.tracking import bundle as bundles
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.settings import Settings, TrackingSettings
from tests.serving.conftest import other, picture
from tests.tiny import SPEC

NAME, GOLDEN = "llava-projector-tiny", "Which color?"
AWAY = Settings(tracking=TrackingSettings(uri="http://127.0.0.1:9"))
SECONDS, NUM_TOKENS = 30.0, 8
Harm = Callable[[Path], None]
Change = Callable[[LlavaForConditionalGeneration], None]


def answer_of(llava: Llava, loaded: torch.nn.Module, seen: Picture, change: Change = lambda model: None) -> str:
    """What transformers' own model answers to the golden question with a projector, and with what else was trained."""
    model = copy.deepcopy(llava.model)
    adapter.remove_all(model.model.language_model)
    change(model)
    model.model.multi_modal_projector = loaded
    ids = torch.tensor([prompt_of(llava.processor, question(GOLDEN, with_image=True))])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS,
        pixel_values=llava.processor.normalise(torch.from_numpy(seen.pixels.copy())[None]),
        eos_token_id=sorted(stop_ids(llava)), pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    return llava.processor.decode(out[0, ids.shape[1] :].tolist())


def putting(state: projector.State) -> Change:
    """Puts what was trained besides a projector into a model."""

    def change(model: LlavaForConditionalGeneration) -> None:
        parts = projector.split(state)
        adapter.put(model.model.language_model, parts[adapter.PREFIX])
        if parts[LANGUAGE_MODEL]:
            projector.copy_whole(model, parts[LANGUAGE_MODEL])

    return change


def adapter_of(llava: Llava, seed: int = 5) -> projector.State:
    """An adapter that changes much."""
    model, generator = copy.deepcopy(llava.model), torch.Generator().manual_seed(seed)
    let_learn(model, TrainingSpec(max_steps=1, language_model=PartSpec(mode="lora"), lora=LoraSpec(rank=4, alpha=8)))
    found = adapter.parameters(model.model.language_model)
    drawn = {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in found.items()}
    return drawn | {adapter.SCALE: torch.tensor(2.0)}


def whole_of(llava: Llava, seed: int = 6) -> projector.State:
    """A language model with other weights."""
    generator = torch.Generator().manual_seed(seed)
    found = full(llava.model).items()
    return {name: value + torch.randn(value.shape, generator=generator) * 0.3 for name, value in found}


@dataclass
class Registry:
    """Real versions of real projectors in a real MLflow."""

    llava: Llava
    model: AssembledModel
    settings: Settings
    folder: Path
    num_versions: int = 0

    def register(
        self, *, harm: Harm | None = None, late_harm: Harm | None = None, besides: projector.State | None = None,
        **alias: int,
    ) -> str:  # fmt: skip
        """Register a projector of its own, and what was trained ``besides``; ``harm`` is done before its digest is
        taken, ``late_harm`` after."""
        client = connect(self.settings)
        if self.num_versions == 0:
            client.create_registered_model(NAME)
        self.num_versions += 1
        folder = self.folder / f"run-{self.num_versions}"
        (folder / "projector").mkdir(parents=True)
        (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
        module = other(self.llava, 100 + self.num_versions).projector
        state = module.state_dict() | (besides or {})
        projector.save(folder / "projector", state, self.model, {})
        golden = folder / "evaluation" / "golden"
        golden.mkdir(parents=True)
        seen = picture(self.llava, 0)
        Image.fromarray(seen.pixels).save(golden / "0.png")
        asked = [
            {"picture": "0.png", "question": GOLDEN, "answer": answer_of(self.llava, module, seen, putting(state))}
        ]
        (golden / "questions.json").write_text(json.dumps(asked))
        if harm is not None:
            harm(folder)
        digest = store.digest_of(store.describe(folder / "projector"))
        if late_harm is not None:
            late_harm(folder)
        run = client.create_run(ensure_experiment(client, self.settings))
        client.log_artifacts(run.info.run_id, str(folder))
        source, tags = f"{run.info.artifact_uri}/projector", {"llava.projector_digest": digest}
        return str(client.create_model_version(NAME, source, run.info.run_id, tags=tags).version)

    def point(self, **aliases: str | None) -> None:
        client = connect(self.settings)
        for alias, version in aliases.items():
            if version is None:
                client.delete_registered_model_alias(NAME, alias)
            else:
                client.set_registered_model_alias(NAME, alias, version)

    @property
    def artifacts(self) -> Path:
        return store.home() / "mlartifacts"

    def hide(self) -> None:
        """The artifact store is away; the registry is there."""
        self.artifacts.rename(self.artifacts.with_name("away"))

    def show(self) -> None:
        self.artifacts.with_name("away").rename(self.artifacts)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_version_that_trained_more_than_its_projector_is_followed_to_and_from(
    registry: Registry, make: Make, lively: Llava, kind: str
) -> None:
    registry.register()
    registry.register(besides=adapter_of(lively) if kind == "lora" else whole_of(lively))
    registry.point(champion="1")
    versions = make("champion")
    versions.start()
    first = says(versions, versions.main)
    registry.point(champion="2")
    versions.look()
    assert versions.last_error is None  # its golden questions are answered as transformers' own model answers them
    assert versions.main is not None
    assert versions.main.bundle.version == "2"
    second = says(versions, versions.main)
    assert second != first
    registry.point(champion="1")
    versions.look()
    assert says(versions, versions.main) == first
    gc.collect()
    assert versions.engine.num_adapters == 0 or kind == "full"
    assert not versions.engine.others


@pytest.fixture
def registry(lively: Llava, assembled: AssembledModel, settings: Settings, tmp_path: Path) -> Registry:
    return Registry(lively, assembled, settings, tmp_path / "runs")


@pytest.fixture
def engine(lively: Llava) -> Iterator[Engine]:
    engine = Engine(lively)
    yield engine
    engine.close(0.0)


Make = Callable[..., Versions]


@pytest.fixture
def make(
    lively: Llava, assembled: AssembledModel, settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Make:
    # Random weights do not end their answers: these need not be as long as they may.
    monkeypatch.setattr(serving_versions, "GOLDEN_TOKENS", NUM_TOKENS)

    def versions(*aliases: str, settings: Settings = settings) -> Versions:
        return Versions(NAME, aliases or ("champion",), lively, assembled, engine, settings)

    return versions


def says(versions: Versions, version: Version | None) -> str:
    """What a version answers to the golden question."""
    assert version is not None
    llava, ended, pieces = versions.engine.llava, threading.Event(), list[str]()

    def tell(told: Piece | Failed) -> None:
        assert isinstance(told, Piece)
        pieces.append(told.text)
        if told.ended is not None:
            ended.set()

    prompt = prompt_of(llava.processor, question(GOLDEN, with_image=True))
    late = time.monotonic() + SECONDS
    versions.engine.submit(Ask(version.loaded, prompt, (picture(llava, 0),), Sampling(NUM_TOKENS), late, tell))
    assert ended.wait(SECONDS)
    return "".join(pieces)


def numbers(versions: Versions) -> dict[str, str]:
    return {alias: version.bundle.version for alias, version in versions.by_alias.items()}


def on_disk() -> set[str]:
    root = store.home() / "serving" / NAME
    return {path.name.split("-")[0] for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}


# ---------------------------------------------------------------------------------------- following


def test_a_new_champion_answers_and_who_had_turned_to_the_old_one_is_answered_by_it(
    registry: Registry, make: Make
) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    old = versions.main
    assert (numbers(versions), versions.num_swaps, versions.problems) == ({"champion": "1"}, 1, {})
    alone = says(versions, old)
    registry.point(champion=registry.register())
    versions.look()
    assert numbers(versions) == {"champion": "2"}
    assert says(versions, versions.main) != alone
    assert says(versions, old) == alone
    assert versions.main is not None
    assert (versions.main.name, versions.num_swaps, versions.num_refused) == (f"{NAME}-v2", 2, 0)
    assert on_disk() == {"2"}


def test_looking_again_changes_nothing(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    before = versions.main
    registry.hide()  # nothing is fetched either
    for _ in range(3):
        versions.look()
    assert versions.main is before
    assert (versions.num_swaps, versions.num_refused, versions.problems) == (1, 0, {})


def test_a_version_is_found_by_its_alias_and_by_its_name(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register(), challenger=registry.register())
    versions = make("champion", "challenger")
    versions.start()
    assert versions.named("champion") is versions.named(f"{NAME}-v1") is versions.main is not None
    assert versions.named("challenger") is versions.named(f"{NAME}-v2") is not None
    assert versions.named(f"{NAME}-v3") is None
    assert versions.named("previous") is None


def test_a_challenger_appears_moves_and_disappears(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make("champion", "challenger")
    versions.start()
    assert (numbers(versions), versions.problems) == ({"champion": "1"}, {})
    for number in ("2", "3"):
        registry.point(challenger=registry.register())
        versions.look()
        assert numbers(versions) == {"champion": "1", "challenger": number}
        assert on_disk() == {"1", number}
    registry.point(challenger=None)
    versions.look()
    assert (numbers(versions), versions.problems, on_disk()) == ({"champion": "1"}, {}, {"1"})


def test_a_challenger_that_is_promoted_is_neither_fetched_nor_loaded_again(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register(), challenger=registry.register())
    versions = make("champion", "challenger")
    versions.start()
    challenger = versions.by_alias["challenger"]
    registry.hide()
    registry.point(champion="2", challenger=None)
    versions.look()
    assert versions.main is challenger
    assert (numbers(versions), versions.problems, on_disk()) == ({"champion": "2"}, {}, {"2"})


def test_two_that_change_places_are_neither_fetched_nor_loaded_again(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register(), challenger=registry.register())
    versions = make("champion", "challenger")
    versions.start()
    before = versions.by_alias
    registry.hide()
    registry.point(champion="2", challenger="1")
    versions.look()
    assert versions.by_alias == {"champion": before["challenger"], "challenger": before["champion"]}
    assert (versions.problems, on_disk()) == ({}, {"1", "2"})


def test_a_flip_back_to_what_is_on_disk_needs_no_download(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register(), previous="1")
    other_server = make("previous")
    other_server.start()
    versions = make()
    versions.start()
    registry.point(champion=registry.register())
    versions.look()
    registry.hide()
    registry.point(champion="1")
    versions.look()
    assert (numbers(versions), versions.problems) == ({"champion": "1"}, {})


def test_an_alias_that_is_gone_is_told_and_its_version_goes_on_answering(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    registry.point(champion=None)
    versions.look()
    assert numbers(versions) == {"champion": "1"}
    assert versions.last_error == f"{NAME} has no alias champion any more"
    registry.point(champion="1")
    versions.look()
    assert versions.last_error is None


# ------------------------------------------------------------------------------------- refused versions


def not_numbers(folder: Path) -> None:
    rewrite(folder, lambda state: {name: tensor * float("nan") for name, tensor in state.items()})


def wider(folder: Path) -> None:
    rewrite(folder, lambda state: {name: torch.cat([tensor, tensor]) for name, tensor in state.items()})


def nameless(folder: Path) -> None:
    rewrite(folder, lambda state: {f"model.{name}": tensor for name, tensor in state.items()})


def rewrite(folder: Path, change: Callable[[projector.State], projector.State]) -> None:
    """Other weights, with a manifest that agrees."""
    from safetensors.torch import load_file, save_file

    path = folder / "projector" / projector.WEIGHTS
    state = change(load_file(path))
    save_file(state, path)
    edit(folder / "projector" / projector.MANIFEST, digest=projector.digest_of(state))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_parts(folder: Path) -> None:
    path = folder / "projector" / projector.MANIFEST
    identity = json.loads(path.read_text())["identity"] | {"frozen_digest": "0" * 64}
    edit(path, identity=identity)


def answered_otherwise(folder: Path) -> None:
    path = folder / "evaluation" / "golden" / "questions.json"
    path.write_text(json.dumps([json.loads(path.read_text())[0] | {"answer": "something else"}]))


def truncated(folder: Path) -> None:
    path = folder / "projector" / projector.WEIGHTS
    path.write_bytes(path.read_bytes()[:-7])


def without(*names: str) -> Harm:
    return lambda folder: folder.joinpath(*names).unlink()


def garbled(*names: str) -> Harm:
    return lambda folder: void(folder.joinpath(*names).write_bytes(b"\x80 not this"))


def void(value: object) -> None:
    del value


HARMS: dict[str, tuple[str, dict[str, Harm]]] = {
    "weights that are no numbers": ("not finite", {"harm": not_numbers}),
    "weights of another shape": ("linear_1", {"harm": wider}),
    "weights of other names": ("linear_1", {"harm": nameless}),
    "other parts": ("frozen_digest", {"harm": other_parts}),
    "another answer": ("something else", {"harm": answered_otherwise}),
    "truncated before it was registered": ("cannot be read", {"harm": truncated}),
    "truncated since": ("is not the one that was registered", {"late_harm": truncated}),
    "no weights": ("cannot be read", {"harm": without("projector", projector.WEIGHTS)}),
    "weights lost since": ("is not the one", {"late_harm": without("projector", projector.WEIGHTS)}),
    "no manifest": ("cannot be read", {"harm": without("projector", projector.MANIFEST)}),
    "garbled manifest": ("cannot be read", {"harm": garbled("projector", projector.MANIFEST)}),
    "garbled questions": ("cannot be read", {"harm": garbled("evaluation", "golden", "questions.json")}),
    "garbled golden picture": ("cannot be read", {"harm": garbled("evaluation", "golden", "0.png")}),
    "no golden picture": ("cannot be read", {"harm": without("evaluation", "golden", "0.png")}),
}


@pytest.mark.parametrize("kind", HARMS)
def test_a_bad_champion_changes_nothing_is_told_and_is_not_tried_again(
    registry: Registry, make: Make, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    words, harm = HARMS[kind]
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    good = versions.main
    alone = says(versions, good)
    registry.point(champion=registry.register(**harm))
    for _ in range(3):
        versions.look()
    assert versions.main is good
    assert versions.last_error is not None
    assert versions.last_error.startswith("version 2 does not answer: ")
    assert words in versions.last_error
    assert (versions.num_refused, versions.num_swaps) == (1, 1)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"champion: {versions.last_error}"
    ]
    assert says(versions, good) == alone
    assert on_disk() == {"1"}
    registry.hide()  # neither fetched anew
    versions.look()
    assert words in versions.last_error
    assert versions.num_refused == 1


def test_a_refused_version_is_tried_again_when_the_alias_comes_back_to_it(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    registry.register(late_harm=truncated)
    registry.register()
    for version, refused in (("2", 1), ("1", 1), ("2", 2), ("3", 2)):
        registry.point(champion=version)
        versions.look()
        assert versions.num_refused == refused
    assert (numbers(versions), versions.problems) == ({"champion": "3"}, {})


def test_a_version_that_two_aliases_point_to_is_refused_once(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register(), challenger="1")
    versions = make("champion", "challenger")
    versions.start()
    registry.register(harm=not_numbers)
    registry.point(champion="2", challenger="2")
    versions.look()
    assert numbers(versions) == {"champion": "1", "challenger": "1"}
    assert versions.num_refused == 1
    assert versions.problems["champion"] == versions.problems["challenger"]
    registry.point(challenger=None)
    versions.look()
    assert list(versions.problems) == ["champion"]


def test_a_bad_challenger_does_not_keep_a_good_champion_waiting(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register(), challenger=registry.register(harm=wider))
    versions = make("champion", "challenger")
    versions.start()
    assert (numbers(versions), versions.last_error) == ({"champion": "1"}, None)
    assert "linear_1" in versions.problems["challenger"]


def test_questions_are_answered_while_a_new_version_is_tried(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    registry.point(champion=registry.register(harm=answered_otherwise))
    alone = says(versions, versions.main)
    looking = threading.Thread(target=versions.look)
    looking.start()
    while looking.is_alive():
        assert says(versions, versions.main) == alone
    looking.join()


# ----------------------------------------------------------------------------------------------- outages


def test_a_registry_that_is_away_changes_nothing_and_is_followed_when_it_is_back(
    registry: Registry, make: Make
) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    versions.settings = AWAY
    for _ in range(2):
        versions.look()
    assert numbers(versions) == {"champion": "1"}
    assert (versions.last_error or "").startswith("the registry cannot be read: ")
    assert versions.num_refused == 0
    versions.settings = registry.settings
    registry.point(champion=registry.register())
    versions.look()
    assert (numbers(versions), versions.last_error) == ({"champion": "2"}, None)


def test_an_artifact_store_that_is_away_is_asked_again(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    registry.point(champion=registry.register())
    registry.hide()
    for _ in range(2):
        versions.look()
    assert numbers(versions) == {"champion": "1"}
    assert "version 2 does not answer: cannot fetch version 2" in (versions.last_error or "")
    assert versions.num_refused == 1
    registry.show()
    versions.look()
    assert (numbers(versions), versions.last_error, versions.num_refused) == ({"champion": "2"}, None, 1)


def test_a_start_without_mlflow_serves_what_answered_last(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    first = make()
    first.start()
    alone = says(first, first.main)
    versions = make(settings=AWAY)
    versions.start()
    assert says(versions, versions.main) == alone
    assert (versions.last_error or "").startswith("the registry cannot be read: ")
    versions.settings = registry.settings
    registry.point(champion=registry.register())
    versions.look()
    assert (numbers(versions), versions.last_error) == ({"champion": "2"}, None)


def test_a_start_with_a_bad_champion_serves_what_answered_last(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    make().start()
    registry.point(champion=registry.register(harm=not_numbers))
    versions = make()
    versions.start()
    assert numbers(versions) == {"champion": "1"}
    assert "not finite" in (versions.last_error or "")
    versions.look()
    assert "not finite" in (versions.last_error or "")
    assert (versions.num_refused, on_disk()) == (1, {"1"})


def test_a_start_with_nothing_to_serve_says_why(registry: Registry, make: Make) -> None:
    with pytest.raises(NoSuchRun, match="has no alias 'champion'; run the profile first"):
        make().start()
    with pytest.raises(TrackingUnavailable, match=r"does not answer.*no version that answered before is kept"):
        make(settings=AWAY).start()
    registry.point(champion=registry.register(harm=not_numbers))
    with pytest.raises(TrackingUnavailable, match=r"not finite.*no version that answered before is kept"):
        make().start()


def test_an_alias_that_was_taken_away_is_not_served_by_the_next_start(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    make().start()
    registry.point(champion=None)
    with pytest.raises(NoSuchRun):
        make().start()


def test_a_kept_version_that_was_damaged_is_not_served(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    first = make()
    first.start()
    assert first.main is not None
    truncated(first.main.bundle.folder)
    with pytest.raises(LlavaPipelineError):
        make(settings=AWAY).start()
    make().start()  # which heals it
    make(settings=AWAY).start()


def test_a_version_is_not_removed_from_disk_while_another_server_loads_it(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    with bundles.in_use(NAME):  # as another server does that follows another alias
        loading = bundles.fetch(NAME, registry.register(), registry.settings)
        registry.point(champion=registry.register())
        versions.look()
        assert numbers(versions) == {"champion": "3"}
        versions.load(loading)
        assert on_disk() == {"1", "2", "3"}
    versions.look()
    assert on_disk() == {"3"}


def test_a_home_that_cannot_be_written_costs_no_answer(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    good = versions.main
    folder = store.home() / "serving"
    shutil.rmtree(folder)
    folder.write_bytes(b"")  # a file where the folder was
    registry.point(champion=registry.register())
    versions.look()
    assert versions.main is good
    assert versions.last_error is not None
    folder.unlink()
    versions.look()
    assert (numbers(versions), versions.last_error) == ({"champion": "2"}, None)


def test_an_engine_that_goes_refuses_no_version(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    versions.engine.close(0.0)
    registry.point(champion=registry.register())
    versions.look()
    assert "the server is going" in (versions.last_error or "")
    assert not any(failure.is_final for failure in versions._failed.values())


def test_a_model_that_fails_for_a_moment_refuses_no_version(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    registry.point(champion=registry.register())
    model = registry.llava.model.model.language_model
    norm, model.norm = model.norm, torch.nn.Bilinear(1, 1, 1)  # which wants two inputs
    for _ in range(2):
        versions.look()
    assert numbers(versions) == {"champion": "1"}
    assert "version 2 does not answer (failed)" in (versions.last_error or "")
    assert versions.num_refused == 1
    model.norm = norm
    registry.hide()  # it is on disk
    versions.look()
    assert (numbers(versions), versions.last_error) == ({"champion": "2"}, None)


def test_a_damaged_version_is_refused_by_name(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    assert versions.main is not None
    truncated(versions.main.bundle.folder)
    with pytest.raises(DamagedArtifact, match="the projector of version 1 is not the one that was registered"):
        versions.load(versions.main.bundle)


# --------------------------------------------------------------------------------------------- follower


def test_a_follower_looks_until_it_is_closed() -> None:
    looked = threading.Semaphore(0)

    follower = Follower(lambda: looked.release(), 0.001)
    for _ in range(3):
        assert looked.acquire(timeout=SECONDS)
    follower.close()
    while looked.acquire(blocking=False):
        pass
    assert not looked.acquire(timeout=0.05)


def test_a_follower_brings_the_new_champion(registry: Registry, make: Make) -> None:
    registry.point(champion=registry.register())
    versions = make()
    versions.start()
    follower = Follower(versions.look, 0.05)
    registry.point(champion=registry.register())
    deadline = time.monotonic() + SECONDS
    while numbers(versions) != {"champion": "2"}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    follower.close()
