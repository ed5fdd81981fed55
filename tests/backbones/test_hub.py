from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from llava_pipeline import store
from llava_pipeline.backbones import hub as hub_module
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.errors import BackboneUnavailable, DigestMismatch, DiskFull, LlavaPipelineError, NotFound
from llava_pipeline.spec import HubBackbone
from tests.backbones.conftest import REVISION, repository_files
from tests.backbones.hub import Fault, Hub

WEIGHTS = repository_files()["model.safetensors"]
PIN = {"model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def a_part(**changes: object) -> HubBackbone:
    return HubBackbone.model_validate({"repo_id": "owner/name", "revision": REVISION, "sha256": PIN} | changes)


def stored(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "store" / "backbone").glob("*"))


def test_a_download_holds_the_needed_files_and_their_digests(hub: Hub) -> None:
    fetched = fetch(a_part(license="MIT"), None, 0)
    folder = store.open_artifact(fetched.files)
    assert {path.name for path in folder.iterdir()} == NEEDED | {store.MANIFEST}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert fetched.sha256 == {name: hashlib.sha256(repository_files()[name]).hexdigest() for name in NEEDED}
    assert (fetched.origin, fetched.license, fetched.weights) == (
        f"hub:owner/name@{REVISION}",
        "MIT",
        "model.safetensors",
    )


def test_only_the_named_weight_file_is_downloaded(hub: Hub) -> None:
    fetch(a_part(weights="pytorch_model.bin"), None, 0)
    assert "pytorch_model.bin" in hub.downloads()
    assert not {"model.safetensors", "README.md"} & set(hub.downloads())


def test_the_cache_and_the_store_share_the_bytes_on_disk(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch(a_part(), None, 0)
    assert (store.open_artifact(fetched.files) / "model.safetensors").stat().st_nlink == 2


def test_where_hard_links_are_refused_files_are_copied(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "across devices")

    monkeypatch.setattr(os, "link", refuse)
    fetched = fetch(a_part(), None, 0)
    assert (store.open_artifact(fetched.files) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_second_fetch_asks_the_hub_nothing(hub: Hub) -> None:
    first = fetch(a_part(), None, 0)
    hub.requests.clear()
    hub.stop()
    assert fetch(a_part(), None, 0) == first
    assert hub.requests == []


def test_a_cache_filled_by_others_is_enough_when_the_hub_is_down(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = fetch(a_part(), None, 0)
    shutil.rmtree(tmp_path / "hf" / "hub" / "models--owner--name" / ".no_exist")
    hub.stop()
    started = time.monotonic()
    assert fetch(a_part(), None, 30) == first
    assert time.monotonic() - started < 30
    assert "taken from the cache without asking for generation_config.json" in caplog.text


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip", "dinov2"])
def test_so_is_that_of_a_tower_with_its_image_processor(hub: Hub, tmp_path: Path, kind: str) -> None:
    files = repository_files() | {"config.json": json.dumps({"model_type": kind}).encode()}
    files["preprocessor_config.json"] = files.pop("tokenizer.json")
    hub.add("owner/name", REVISION, files)
    first = fetch(a_part(), None, 0)
    shutil.rmtree(tmp_path / "hf" / "hub" / "models--owner--name" / ".no_exist")
    hub.stop()
    assert fetch(a_part(), None, 0) == first


def test_a_cache_without_tokenizer_is_not_enough_when_the_hub_is_down(hub: Hub, tmp_path: Path) -> None:
    fetch(a_part(), None, 0)
    (tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots" / REVISION / "tokenizer.json").unlink()
    hub.stop()
    with pytest.raises(BackboneUnavailable, match=r"cannot get tokenizer\.json of owner/name"):
        fetch(a_part(), None, 0)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_is_waited_out(hub: Hub, status: int) -> None:
    hub.faults.append(Fault(status, times=2, file="config.json"))
    assert fetch(a_part(), None, 10).weights == "model.safetensors"
    assert hub.faults[0].times == 0


def test_the_pause_the_hub_asks_for_is_kept(hub: Hub) -> None:
    hub.faults.append(Fault(429, file="tokenizer.json", headers={"Retry-After": "2"}))
    started = time.monotonic()
    fetch(a_part(), None, 10)
    assert time.monotonic() - started >= 2


def test_a_pause_longer_than_the_patience_is_not_begun(hub: Hub) -> None:
    hub.faults.append(Fault(429, times=99, headers={"Retry-After": "3600"}))
    started = time.monotonic()
    with pytest.raises(BackboneUnavailable, match="status 429"):
        fetch(a_part(), None, 10)
    assert time.monotonic() - started < 30


def test_a_hub_that_stays_broken_is_given_up_within_the_patience(hub: Hub, home: Path) -> None:
    hub.faults.append(Fault(503, times=99))
    started = time.monotonic()
    with pytest.raises(BackboneUnavailable, match=r"status 503 \(asked for 1 s\).*backbones\.source=DIR.*pocket"):
        fetch(a_part(), None, 1)
    assert time.monotonic() - started < 30
    assert stored(home) == []


def test_a_hub_that_is_down_is_told_with_the_remedy(hub: Hub, home: Path) -> None:
    hub.stop()
    with pytest.raises(BackboneUnavailable, match=r"which is not in the cache at .*backbones\.source=DIR.*pocket"):
        fetch(a_part(), None, 0)
    assert stored(home) == []


def test_a_storage_that_comes_back_is_used(hub: Hub) -> None:
    hub.faults.append(Fault(502, times=1, file="model.safetensors", stored=True))
    assert fetch(a_part(), None, 10).sha256["model.safetensors"] == PIN["model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"repo_id": "owner/nothing"}, NotFound, "has no public owner/nothing"),
        ({"revision": "f" * 40}, NotFound, "has no commit f{40}"),
        ({"weights": "model.gguf", "sha256": {}}, NotFound, r"has no model\.gguf"),
        ({"repo_id": "owner/locked"}, BackboneUnavailable, "gated; accept its terms"),
    ],
)
def test_a_final_refusal_is_not_repeated(
    hub: Hub, changes: dict[str, object], kind: type[LlavaPipelineError], message: str
) -> None:
    hub.gated.add("owner/locked")
    started = time.monotonic()
    with pytest.raises(kind, match=message):
        fetch(a_part(**changes), None, 30)
    assert time.monotonic() - started < 30


def test_offline_with_nothing_cached_is_told_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    with pytest.raises(BackboneUnavailable, match=r"not in the cache at .* and HF_HUB_OFFLINE is set; unset it, or"):
        fetch(a_part(), None, 30)
    assert time.monotonic() - started < 30
    assert hub.requests == []


def test_a_forbidden_file_is_a_final_refusal(hub: Hub) -> None:
    hub.faults.append(Fault(403, times=99))
    with pytest.raises(BackboneUnavailable, match="status 403; set HF_TOKEN"):
        fetch(a_part(), None, 30)


def test_wrong_bytes_are_refused_and_the_next_run_heals(hub: Hub, home: Path) -> None:
    hub.faults.append(Fault("garbled", file="model.safetensors"))
    found = hashlib.sha256(bytes(255 - byte for byte in WEIGHTS)).hexdigest()
    with pytest.raises(DigestMismatch, match=f"{found}, pinned is {PIN['model.safetensors']}.*run again"):
        fetch(a_part(), None, 0)
    assert stored(home) == []
    assert fetch(a_part(), None, 0).sha256["model.safetensors"] == PIN["model.safetensors"]


def test_a_cached_file_that_was_changed_is_refused_and_the_next_run_heals(hub: Hub, tmp_path: Path) -> None:
    fetch(a_part(sha256={}), None, 0)
    cached = tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots" / REVISION / "model.safetensors"
    blob = cached.resolve()
    blob.unlink()
    blob.write_bytes(b"something else")
    with pytest.raises(DigestMismatch, match="removed from the hub's cache"):
        fetch(a_part(), None, 0)
    assert not blob.exists()
    assert fetch(a_part(), None, 0).sha256["model.safetensors"] == PIN["model.safetensors"]


def test_a_download_that_is_cut_is_resumed(hub: Hub) -> None:
    hub.faults.append(Fault("cut", file="model.safetensors"))
    assert fetch(a_part(), None, 10).sha256["model.safetensors"] == PIN["model.safetensors"]
    assert hub.downloads().count("model.safetensors") == 2


def test_a_truncated_download_never_enters_the_store(hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("short", times=99, file="model.safetensors"))
    with pytest.raises(BackboneUnavailable, match="should be of size 10240 but has size 5120"):
        fetch(a_part(sha256={}), None, 0)
    assert stored(home) == []
    hub.faults.clear()
    assert fetch(a_part(), None, 0).sha256["model.safetensors"] == PIN["model.safetensors"]
    assert list((tmp_path / "hf").rglob("*.incomplete")) == []


def test_a_pinned_file_the_repository_lacks_is_told(hub: Hub) -> None:
    with pytest.raises(NotFound, match=r"has no preprocessor_config\.json"):
        fetch(a_part(sha256={"preprocessor_config.json": "0" * 64}), None, 0)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, DiskFull, "point HF_HOME at a larger disk"),
        (errno.EROFS, BackboneUnavailable, "HF_HOME to a folder that can be written"),
    ],
)
def test_trouble_with_the_cache_s_disk_is_told_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    def fail(*_: object) -> Path:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(hub_module, "_download", fail)
    with pytest.raises(kind, match=message):
        fetch(a_part(), None, 30)


def test_a_full_disk_of_the_store_is_told(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(DiskFull, match="LLAVA_PIPELINE_HOME"):
        fetch(a_part(), None, 0)
    assert stored(home) == []


def test_retries_are_told_in_the_log(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llava_pipeline")
    hub.faults.append(Fault(503, file="config.json"))
    fetch(a_part(), None, 5)
    assert (
        "config.json of owner/name did not come (the hub answers with status 503); asking again in 0.5 s" in caplog.text
    )
