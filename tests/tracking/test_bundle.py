"""A version's files on disk: whole or not there, and gone when nobody needs them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_pipeline import store
from llava_pipeline.errors import DamagedArtifact, NoSuchRun, TrackingError, TrackingUnavailable
from llava_pipeline.spec import RunSpec
from llava_pipeline.tracking import bundle as bundles
from llava_pipeline.tracking.bundle import Bundle, fetch, keep, kept, sweep
from llava_pipeline.tracking.client import connect, ensure_experiment
from llava_pipeline.tracking.settings import Settings, TrackingSettings

NAME = "llava-projector-tiny"
Register = Callable[..., str]
AWAY = Settings(tracking=TrackingSettings(uri="http://127.0.0.1:9"))


@pytest.fixture
def register(settings: Settings, spec: RunSpec, tmp_path: Path) -> Register:
    """Registers a version with a projector's files, a spec and, unless left out, what evaluation keeps."""

    def make(evaluation: tuple[str, ...] = ("golden", "samples"), **tags: str) -> str:
        client = connect(settings)
        if NAME not in {model.name for model in client.search_registered_models()}:
            client.create_registered_model(NAME)
        count = len(client.search_model_versions(f"name = '{NAME}'"))
        folder = tmp_path / f"run-{count}"
        (folder / "projector").mkdir(parents=True)
        (folder / "projector" / "projector.safetensors").write_bytes(f"weights {count}".encode())
        (folder / "projector" / "manifest.json").write_text("{}")
        (folder / "spec.yaml").write_text(spec_text(spec))
        for kind in evaluation:
            (folder / "evaluation" / kind).mkdir(parents=True)
            (folder / "evaluation" / kind / "0.png").write_bytes(b"png")
        run = client.create_run(ensure_experiment(client, settings))
        client.log_artifacts(run.info.run_id, str(folder))
        digest = store.digest_of(store.describe(folder / "projector"))
        known = {"llava.projector_digest": digest, "llava.exact_match": "0.5"} | tags
        source = f"{run.info.artifact_uri}/projector"
        return str(client.create_model_version(NAME, source, run.info.run_id, tags=known).version)

    return make


def spec_text(spec: RunSpec) -> str:
    return json.dumps(spec.model_dump(mode="json"))


def artifacts(home: Path) -> Path:
    return home / "mlartifacts"


def weights_of(home: Path, bundle: Bundle) -> Path:
    """Where MLflow keeps a version's weights."""
    (found,) = artifacts(home).rglob(f"{bundle.run_id}/artifacts/projector/projector.safetensors")
    return found


def folders(bundle: Bundle) -> set[str]:
    return {path.name for path in bundle.folder.parent.iterdir() if path.is_dir()}


def test_a_version_is_fetched_whole_and_says_what_it_is(register: Register, settings: Settings, spec: RunSpec) -> None:
    found = fetch(NAME, register(), settings)
    assert (found.version, found.scores) == ("1", {"exact_match": "0.5"})
    files = sorted(path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    assert files == [
        "bundle.json", "golden/0.png", "projector/manifest.json", "projector/projector.safetensors", "samples/0.png",
        "spec.yaml",
    ]  # fmt: skip
    assert found.spec() == spec
    assert found.run_id in found.run_address


def test_a_version_without_golden_questions_is_fetched_too(register: Register, settings: Settings) -> None:
    found = fetch(NAME, register(evaluation=()), settings)
    assert not (found.folder / "golden").exists()


def test_what_is_on_disk_is_not_fetched_again(register: Register, settings: Settings, home: Path) -> None:
    first = fetch(NAME, register(), settings)
    shutil.rmtree(artifacts(home))
    assert fetch(NAME, "1", settings) == first


@pytest.mark.parametrize("harm", ["truncated", "missing", "no mark"])
def test_what_is_damaged_on_disk_is_fetched_again(register: Register, settings: Settings, harm: str) -> None:
    found = fetch(NAME, register(), settings)
    path = found.projector / "projector.safetensors"
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (path if harm == "missing" else found.folder / "bundle.json").unlink()
    fetch(NAME, "1", settings).check()
    assert path.read_bytes() == b"weights 0"
    assert (found.folder / "bundle.json").is_file()


@pytest.mark.parametrize("harm", ["truncated", "missing", "other"])
def test_what_is_not_what_was_registered_is_refused_and_not_kept(
    register: Register, settings: Settings, home: Path, harm: str
) -> None:
    whole = fetch(NAME, register(), settings)
    shutil.rmtree(whole.folder)
    path = weights_of(home, whole)
    good = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(good[:-1] if harm == "truncated" else good[::-1])
    with pytest.raises(
        DamagedArtifact, match=r"version 1 in MLflow's artifact store is not the one that was registered"
    ):
        fetch(NAME, "1", settings)
    assert folders(whole) == set()
    path.write_bytes(good)
    assert fetch(NAME, "1", settings) == whole


def test_what_cannot_be_had_is_told_in_one_sentence(register: Register, settings: Settings, home: Path) -> None:
    register()
    with pytest.raises(NoSuchRun, match="no version 7; newest versions: 1"):
        fetch(NAME, "7", settings)
    with pytest.raises(TrackingUnavailable, match="does not answer"):
        fetch(NAME, "1", AWAY)
    shutil.rmtree(artifacts(home))
    with pytest.raises(TrackingError, match="cannot fetch version 1 of llava-projector-tiny"):
        fetch(NAME, "1", settings)


def test_a_version_whose_tags_say_nothing_is_refused(register: Register, settings: Settings) -> None:
    with pytest.raises(TrackingError, match="do not say what it is"):
        fetch(NAME, register(**{"llava.projector_digest": "not a digest"}), settings)
    connect(settings).delete_model_version_tag(NAME, "1", "llava.projector_digest")
    with pytest.raises(TrackingError, match="was not registered by this pipeline"):
        fetch(NAME, "1", settings)


def test_what_answered_last_is_found_without_mlflow_while_it_is_whole(register: Register, settings: Settings) -> None:
    found = fetch(NAME, register(), settings)
    assert kept(NAME, "champion") is None
    keep("champion", found)
    assert kept(NAME, "champion") == found
    (found.projector / "projector.safetensors").write_bytes(b"other")
    assert kept(NAME, "champion") is None


@given(st.binary(max_size=40) | st.sampled_from([b"{}", b"null", b"[]", b'{"version": "1"}']))
def test_a_note_that_says_nothing_is_no_note(data: bytes) -> None:
    path = store.home() / "serving" / NAME / "champion.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    assert kept(NAME, "champion") is None


def test_files_go_when_no_alias_needs_them(register: Register, settings: Settings) -> None:
    one, two, three = (fetch(NAME, register(), settings) for _ in range(3))
    keep("champion", one)
    keep("challenger", two)
    assert sweep(NAME)
    assert folders(one) == {one.folder.name, two.folder.name}
    keep("champion", two)
    assert sweep(NAME)
    assert folders(one) == {two.folder.name}
    bundles.forget(NAME, "challenger")
    bundles.forget(NAME, "challenger")
    assert sweep(NAME)
    assert folders(one) == {two.folder.name}
    assert three.folder.name not in folders(one)


def test_files_that_are_just_being_loaded_do_not_go(register: Register, settings: Settings) -> None:
    with bundles.in_use(NAME):
        found = fetch(NAME, register(), settings)
        with bundles.in_use(NAME):  # a second process loads too
            assert not sweep(NAME)
        assert not sweep(NAME)
        found.check()
        keep("champion", found)
    assert sweep(NAME)
    found.check()


def test_what_a_killed_fetch_left_harms_nothing_and_goes_after_a_day(register: Register, settings: Settings) -> None:
    found = fetch(NAME, register(), settings)
    keep("champion", found)
    root = found.folder.parent
    for name in (".fetching-old", ".fetching-new", ".gone-old", ".writing-old"):
        (root / name / "bundle").mkdir(parents=True)
        (root / name / "bundle" / "bundle.json").write_text("{")
        if name.endswith("old"):
            for path in (root / name / "bundle" / "bundle.json", root / name / "bundle", root / name):
                os.utime(path, (0, time.time() - store.ABANDONED_SECONDS - 60))
    assert fetch(NAME, "1", settings) == found
    assert sweep(NAME)
    assert folders(found) == {found.folder.name, ".fetching-new"}
