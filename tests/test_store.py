"""The store holds whole, undamaged artifacts or none."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_pipeline import store
from llava_pipeline.contracts import ArtifactRef
from llava_pipeline.errors import DamagedArtifact, DiskFull, MissingArtifact
from llava_pipeline.store import MANIFEST, open_artifact, writing

FILES = {"a.txt": b"one", "sub/b.bin": bytes(range(256)), "sub/MANIFEST.json": b"{}", "empty": b""}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, of which nothing has been checked yet."""
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(store, "_verified", set())
    return tmp_path / "home"


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def put(files: dict[str, bytes] = FILES, kind: str = "snapshot") -> ArtifactRef:
    with writing(kind) as (folder, done):
        fill(folder, files)
    return done[0]


def found(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    }


def as_if_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process, which has not checked anything yet."""
    monkeypatch.setattr(store, "_verified", set())


# --------------------------------------------------------------------------------------------- putting


def test_what_is_put_is_what_is_found(home: Path) -> None:
    ref = put()
    folder = open_artifact(ref)
    assert found(folder) == FILES
    assert folder == home / "store" / "snapshot" / ref.digest
    assert (ref.kind, ref.num_bytes) == ("snapshot", sum(map(len, FILES.values())))
    assert set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))) == set(FILES)


def test_the_same_content_is_one_artifact(home: Path) -> None:
    assert put() == put(dict(reversed(FILES.items())))
    assert len(list((home / "store" / "snapshot").iterdir())) == 1


def digest_of(files: dict[str, bytes]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), files)
        return store.digest_of(store.describe(Path(folder)))


NAMES = st.from_regex(r"[a-y]{1,4}(/[a-y]{1,4}\.[a-y])?", fullmatch=True)


@settings(deadline=None, max_examples=25)
@given(files=st.dictionaries(NAMES, st.binary(max_size=4), max_size=4), data=st.data())
def test_other_names_or_other_bytes_have_another_digest(files: dict[str, bytes], data: st.DataObject) -> None:
    files = {name: files[name] for name in files if not any(other.startswith(f"{name}/") for other in files)}
    changed = dict(files)
    name = data.draw(st.sampled_from([*files, "z"]))
    if name in files and data.draw(st.booleans()):
        changed["z"] = changed.pop(name)
    else:
        changed[name] = changed.get(name, b"") + b"!"
    assert digest_of(changed) != digest_of(files) == digest_of(dict(reversed(files.items())))


def test_the_digest_does_not_depend_on_when_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = put()
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", str(tmp_path / "elsewhere"))
    again = put(kind="projector")
    assert (again.digest, again.num_bytes) == (ref.digest, ref.num_bytes)


def test_a_reference_comes_only_once_the_artifact_is_whole(home: Path) -> None:
    with writing("snapshot") as (folder, done):
        fill(folder, FILES)
        assert done == []
        assert [path.name for path in (home / "store" / "snapshot").iterdir()] == [folder.name]
        assert folder.name.startswith(".writing-")
    assert [path.name for path in (home / "store" / "snapshot").iterdir()] == [done[0].digest]


def test_writers_of_the_same_content_do_not_disturb_each_other(home: Path) -> None:
    together = threading.Barrier(4)
    refs: list[ArtifactRef] = []

    def write() -> None:
        for number in range(8):
            with writing("snapshot") as (folder, done):
                fill(folder, {"n": str(number).encode()})
                together.wait(timeout=10)
            refs.append(done[0])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refs) == 32
    assert {ref.digest for ref in refs} == {path.name for path in (home / "store" / "snapshot").iterdir()}


# --------------------------------------------------------------------------------------------- failing


class Trouble(Exception):
    pass


def put_and_raise(error: BaseException) -> None:
    with writing("snapshot") as (folder, _):
        fill(folder, FILES)
        raise error


@pytest.mark.parametrize("error", [Trouble(), KeyboardInterrupt(), OSError(errno.EACCES, "not yours")])
def test_nothing_is_left_when_the_block_raises(error: BaseException, home: Path) -> None:
    with pytest.raises(type(error)) as caught:
        put_and_raise(error)
    assert caught.value is error
    assert list((home / "store" / "snapshot").iterdir()) == []


def test_an_error_that_passes_through_is_not_its_own_cause() -> None:
    with pytest.raises(OSError, match="not yours") as caught, writing("snapshot"):
        raise OSError(errno.EACCES, "not yours")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_a_remedy(number: int, home: Path) -> None:
    with pytest.raises(DiskFull, match=r"no space left below .*snapshot; free some, or point LLAVA_PIPELINE_HOME"):
        put_and_raise(OSError(number, os.strerror(number)))
    assert list((home / "store" / "snapshot").iterdir()) == []


def test_a_disk_that_fills_up_at_the_very_end_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        put()
    assert list((home / "store" / "snapshot").iterdir()) == []


def test_a_home_that_cannot_be_made_is_told(home: Path) -> None:
    home.write_text("a file where the home should be")
    with pytest.raises(NotADirectoryError):
        put()


def test_a_writer_that_was_killed_leaves_nothing_that_looks_like_an_artifact(home: Path) -> None:
    code = (
        "import os\nfrom llava_pipeline.store import writing\n"
        "with writing('snapshot') as (folder, done):\n    (folder / 'a').write_text('half')\n    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60, check=False)
    assert done.returncode == 9
    assert [path.name[:9] for path in (home / "store" / "snapshot").iterdir()] == [".writing-"]
    assert found(open_artifact(put())) == FILES


KILLED = """
import os, signal
from llava_pipeline.store import writing
with writing("snapshot") as (folder, done):
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by_a_killed_writer(root: Path) -> Path:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=Path(__file__).parents[1], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = root.glob(".writing-*")
    return left


def make_older(folder: Path, seconds: float) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


def test_what_a_killed_writer_left_is_removed_after_a_day(home: Path) -> None:
    root = home / "store" / "snapshot"
    left = left_by_a_killed_writer(root)
    make_older(left, store.ABANDONED_SECONDS - 600)
    put()
    assert left.exists()
    make_older(left, 1200)
    put(kind="projector")
    assert left.exists()
    ref = put()
    assert [path.name for path in root.iterdir()] == [ref.digest]


def test_a_folder_in_which_something_was_written_lately_is_not_abandoned(home: Path) -> None:
    left = left_by_a_killed_writer(home / "store" / "snapshot")
    make_older(left, 2 * store.ABANDONED_SECONDS)
    (left / "sub" / "a").write_text("more")
    put()
    assert left.exists()


# --------------------------------------------------------------------------------------------- opening


def test_an_artifact_that_is_not_there_is_told_with_a_remedy(home: Path) -> None:
    ref = ArtifactRef(kind="projector", digest="0" * 64, num_bytes=1)
    with pytest.raises(MissingArtifact) as caught:
        open_artifact(ref)
    assert str(caught.value) == (
        f"projector {'0' * 12} is not in the store at {home / 'store'}; run again with --refresh to make it anew"
    )


def test_an_artifact_is_not_found_under_another_kind() -> None:
    ref = put()
    with pytest.raises(MissingArtifact):
        open_artifact(ref.model_copy(update={"kind": "projector"}))


DAMAGE = {
    r"a\.txt was changed": lambda folder: (folder / "a.txt").write_bytes(b"two"),
    r"sub/b\.bin was changed": lambda folder: (folder / "sub/b.bin").write_bytes(b"shorter"),
    r"sub/MANIFEST\.json was changed": lambda folder: (folder / "sub/MANIFEST.json").write_bytes(b"[]"),
    r"empty was changed": lambda folder: (folder / "empty").write_bytes(b"no longer"),
    r"a\.txt is missing": lambda folder: (folder / "a.txt").unlink(),
    r"its manifest is missing or unreadable": lambda folder: (folder / MANIFEST).unlink(),
    r"its manifest is missing or unreadable ": lambda folder: (folder / MANIFEST).write_bytes(b"\xff{"),
    r"its manifest was changed": lambda folder: (folder / MANIFEST).write_text("{}"),
    r"its manifest was changed ": lambda folder: (folder / MANIFEST).write_text("[1]"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_damage_is_found_and_told_with_a_remedy(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = put()
    folder = open_artifact(ref)
    DAMAGE[problem](folder)
    as_if_later(monkeypatch)
    with pytest.raises(
        DamagedArtifact, match=f"is damaged: {problem.strip()}; delete {folder} and run again with --refresh"
    ):
        open_artifact(ref)


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_artifact_is_replaced_when_it_is_made_again(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    DAMAGE[problem](open_artifact(put()))
    as_if_later(monkeypatch)
    ref = put()
    as_if_later(monkeypatch)
    assert found(open_artifact(ref)) == FILES


def test_an_artifact_is_checked_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ref = put()
    as_if_later(monkeypatch)
    read: list[Path] = []
    sha256_of = store.sha256_of
    monkeypatch.setattr(store, "sha256_of", lambda path: (read.append(path), sha256_of(path))[1])
    assert open_artifact(ref) == open_artifact(ref)
    assert len(read) == len(FILES)


def test_opening_an_artifact_says_that_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever clears up goes by the age of the folder; a run may reuse one that is a month old."""
    with writing("kind") as (folder, done):
        fill(folder, FILES)
    final = store.home() / "store" / "kind" / done[0].digest
    os.utime(final, (1, 1))
    monkeypatch.setattr(store, "_verified", set())
    assert open_artifact(done[0]).stat().st_mtime > 1_000_000


def test_home_is_the_variable_or_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAVA_PIPELINE_HOME", "relative")
    assert store.home() == tmp_path / "relative"
    for unset in ("", None):
        monkeypatch.delenv("LLAVA_PIPELINE_HOME") if unset is None else monkeypatch.setenv("LLAVA_PIPELINE_HOME", unset)
        assert store.home() == tmp_path / ".llava-pipeline"
